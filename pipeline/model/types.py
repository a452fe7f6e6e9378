"""Types that everything around a denoiser shares: named inputs, and a denoiser as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    pass


Inputs = Mapping[str, torch.Tensor]


Values: TypeAlias = Callable[[Inputs], Mapping[str, torch.Tensor]]
"""A deployed graph as a function that also gives values inside it, by the names they have in the graph."""


Denoise = Callable[[Inputs], torch.Tensor]
"""Takes the inputs of one call by flat name, with R rows; returns the prediction, as many channels as the sample."""
