"""Tiny denoisers with random weights, as diffusers folders."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel


def tiny_dit() -> DiTTransformer2DModel:
    return _dit(heads=2, width=32, layers=2)


def wide_dit() -> DiTTransformer2DModel:
    """64 M parameters, of which the largest layer has 3.5 M."""
    return _dit(heads=12, width=64, layers=6)


def _dit(heads: int, width: int, layers: int) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
    ).eval()


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=5,
    ).eval()


def save_folder(module: torch.nn.Module, folder: Path) -> Path:
    module.save_pretrained(folder / ("unet" if isinstance(module, UNet2DModel) else "transformer"))
    DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return folder


FACTORY = """
import torch
from diffusers import DDIMScheduler
from intaglio.pipeline.model.checkpoint import DenoiserModel


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample, timestep):
        return self.body(sample) + timestep.reshape(-1, 1, 1, 1) / 1000


def make():
    torch.manual_seed(0)
    return DenoiserModel(Net(), DDIMScheduler(), (3, 8, 8))
"""
"""A file with a model factory."""
