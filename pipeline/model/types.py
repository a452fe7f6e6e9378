"""Define the types around a denoiser: named inputs, and a denoiser as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

Inputs = Mapping[str, torch.Tensor]


Values: TypeAlias = Callable[[Inputs], Mapping[str, torch.Tensor]]
"""Function that runs a deployed graph and returns its outputs, or values inside it, by name."""


Denoise = Callable[[Inputs], torch.Tensor]
"""Function from the inputs of one call, by flat name with R rows, to the prediction, with the sample's channels."""
