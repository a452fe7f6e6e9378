"""Distances of samples to their reference, in decibels.

Shapes: B samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import torch

PEAK = 2.0
"""Range of samples in [-1, 1]."""
LEAST_MSE = 1e-20
"""Mean squared error that equal samples count with, so that their PSNR is finite: 206 dB."""


@overload
def decibels(ratio: float) -> float: ...
@overload
def decibels(ratio: torch.Tensor) -> torch.Tensor: ...
def decibels(ratio: float | torch.Tensor) -> float | torch.Tensor:
    """Return a ratio of powers in dB: 10 log10(ratio), of a tensor element by element."""
    return 10 * (math.log10(ratio) if isinstance(ratio, float | int) else ratio.log10())


@overload
def psnr_db(mse: float) -> float: ...
@overload
def psnr_db(mse: torch.Tensor) -> torch.Tensor: ...
def psnr_db(mse: float | torch.Tensor) -> float | torch.Tensor:
    """Return the peak signal-to-noise ratio of samples in [-1, 1], in dB: 10 log10(PEAK^2 / mse), with PEAK = 2.

    `mse` is the mean squared error to the reference, one number or one for each sample (B,). Infinite where it is zero.

    >>> psnr_db(0.04)
    20.0
    """
    if isinstance(mse, float | int):
        return decibels(PEAK**2 / mse) if mse > 0 else math.inf
    return decibels(PEAK**2 / mse)


def sqnr_db(mse_B: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-quantization-noise ratio of each sample (B,), in dB: 10 log10(mean(reference^2) / mse)."""
    return decibels(reference.flatten(1).square().mean(1) / mse_B)


def mean_squared_error(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample (B, ...) to its reference, (B,), at least `LEAST_MSE`."""
    return (samples - reference).flatten(1).square().mean(1).clamp_min(LEAST_MSE)
