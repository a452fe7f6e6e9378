"""emoji-mixer as a model factory: `model: {path: models/emoji-mixer/mixer.py:make, sampling_steps: 24}`.

The network is hard to quantize on purpose. It is an MLP-mixer (Tolstikhin et al. 2021) with ReLU and without
normalization, and it reads pictures as luma 0..255 and chroma -128..127: values that are not centred, in channels of
different range.

Shapes: B batch, L patches, D channels of a patch.
"""

from pathlib import Path

import torch
from diffusers import EDMEulerScheduler
from safetensors.torch import load_file
from torch import nn

from intaglio import DenoiserModel

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SIZE, PATCH, WIDTH, BLOCKS = 24, 4, 128, 6
PICTURES = 24
"""Classes: each is one emoji, at any of 25 places. Class 24 is the null class."""


class Block(nn.Module):
    """Mix patches, then channels. The step and the class enter as one bias for each channel."""

    def __init__(self) -> None:
        super().__init__()
        patches = (SIZE // PATCH) ** 2
        self.condition = nn.Linear(64, WIDTH)
        self.patches_in, self.patches_out = nn.Linear(patches, 2 * patches), nn.Linear(2 * patches, patches)
        self.channels_in, self.channels_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BLD: torch.Tensor, condition_BE: torch.Tensor) -> torch.Tensor:
        x_BLD = x_BLD + self.condition(condition_BE).unsqueeze(1)
        x_BLD = x_BLD + self.patches_out(self.patches_in(x_BLD.transpose(1, 2)).relu()).transpose(1, 2)
        return x_BLD + self.channels_out(self.channels_in(x_BLD).relu())


class Mixer(nn.Module):
    """F(c_in x, log(sigma) / 4, class) of Karras et al. 2022, Eq. 7."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Embedding(PICTURES + 1, 64)
        self.step_in, self.step_out = nn.Linear(16, 64), nn.Linear(64, 64)
        self.patch_in = nn.Linear(3 * PATCH**2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.patch_out = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        angles = timestep.unsqueeze(-1) * torch.arange(1, 9, device=sample.device)
        step = self.step_out(self.step_in(torch.cat([angles.sin(), angles.cos()], -1)).relu())
        condition = (step + self.picture(class_labels)).relu()
        x = self.patch_in(nn.functional.pixel_unshuffle(sample, PATCH).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, condition)
        side = SIZE // PATCH
        return nn.functional.pixel_shuffle(self.patch_out(x).transpose(1, 2).unflatten(2, (side, side)), PATCH)


def untrained() -> DenoiserModel:
    """Return the model with random weights. Its scheduler solves the probability flow in the range of the pictures."""
    scheduler = EDMEulerScheduler(sigma_min=2.0, sigma_max=4000.0, sigma_data=128.0)
    return DenoiserModel(Mixer(), scheduler, (3, SIZE, SIZE), classes=PICTURES)


def make() -> DenoiserModel:
    """Return the trained model."""
    model = untrained()
    model.module.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model
