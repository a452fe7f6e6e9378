"""Compute distances of samples to their reference: in decibels, as a cosine, and as the largest error.

Nothing is clamped: the peak of a PSNR is the range of the full-precision samples. Shapes: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, overload

if TYPE_CHECKING:
    import torch

LEAST_MSE = 1e-20
"""Mean squared error that equal samples count with, so that their distance is finite: 200 dB at a peak of 1."""


@dataclass(frozen=True)
class SampleRange:
    """Range and mean square of the full-precision samples. Raises ValueError if no sample can have them."""

    low: float
    high: float
    energy: float

    def __post_init__(self) -> None:
        """Check the three numbers."""
        if not (-math.inf < self.low <= self.high < math.inf and 0 <= self.energy < math.inf):
            raise ValueError(f"no samples range from {self.low:g} to {self.high:g} with a mean square {self.energy:g}")

    @classmethod
    def of(cls, samples: torch.Tensor) -> Self:
        """Return the range of samples (B, ...), which are finite."""
        low, high = samples.aminmax()
        return cls(float(low), float(high), float(samples.double().square().mean()))

    @classmethod
    def joined(cls, parts: Sequence[Self], counts: Sequence[int]) -> Self:
        """Return the range of all samples together, from the range and the number of samples of each part."""
        energy = sum(part.energy * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        return cls(min(part.low for part in parts), max(part.high for part in parts), energy)

    @property
    def peak(self) -> float:
        """Largest value minus smallest: the peak of every PSNR. It is 1 for constant samples, which have no range."""
        return self.high - self.low or 1.0

    def psnr_db(self, mse: float) -> float:
        """Return the PSNR of samples with this mean squared error, in dB; infinite where it is zero.

        >>> SampleRange(-1.0, 1.0, 0.25).psnr_db(0.04)
        20.0
        """
        return decibels(self.peak**2 / mse) if mse > 0 else math.inf

    def mse(self, psnr_db: float) -> float:
        """Return the mean squared error of samples with this PSNR in dB.

        >>> round(SampleRange(-1.0, 1.0, 0.25).mse(20.0), 12)
        0.04
        """
        return float(self.peak**2 / 10 ** (psnr_db / 10))

    def sqnr_db(self, mse: float) -> float:
        """Return the SQNR of samples with this mean squared error, in dB; infinite where it is zero.

        Samples of zeros count with a mean square of 1.
        """
        return decibels((self.energy or 1.0) / mse) if mse > 0 else math.inf


@overload
def decibels(ratio: float) -> float: ...
@overload
def decibels(ratio: torch.Tensor) -> torch.Tensor: ...
def decibels(ratio: float | torch.Tensor) -> float | torch.Tensor:
    """Return a ratio of powers in dB: 10 log10(ratio), of a tensor element by element."""
    return 10 * (math.log10(ratio) if isinstance(ratio, float | int) else ratio.log10())


def psnr_db(mse_B: torch.Tensor, peak: float) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each sample (B,), in dB: 10 log10(peak^2 / mse).

    `peak` is that of the `SampleRange` of full precision, the same for all samples.
    """
    return decibels(peak**2 / mse_B)


def sqnr_db(mse_B: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-quantization-noise ratio of each sample (B,), in dB: 10 log10(mean(reference^2) / mse).

    A reference of zeros counts with a mean square of 1.
    """
    energy_B = reference.flatten(1).square().mean(1)
    return decibels(energy_B.where(energy_B > 0, 1.0) / mse_B)


def mean_squared_error(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample (B, ...) to its reference, (B,), at least `LEAST_MSE`."""
    return (samples - reference).flatten(1).square().mean(1).clamp_min(LEAST_MSE)


def cosine_similarity(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cosine of the angle between each sample (B, ...) and its reference, (B,), in float64.

    It is x.y / (|x| |y|) over all values of a sample. If x or y is zero, it is 1 if both are, else 0.
    """
    x, y = samples.flatten(1).double(), reference.flatten(1).double()
    norms = x.square().sum(1).sqrt() * y.square().sum(1).sqrt()
    cosine: torch.Tensor = (x * y).sum(1) / norms.where(norms > 0, 1.0)
    return cosine.where(norms > 0, (x == y).all(1).double())


def largest_error(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute difference of a value of each sample (B, ...) to its reference, (B,)."""
    return (samples - reference).flatten(1).abs().amax(1)


def standard_error(value_B: torch.Tensor) -> float | None:
    """Return the standard error of the mean of B values, in their unit; None for one value."""
    return float(value_B.std() / len(value_B) ** 0.5) if len(value_B) > 1 else None


def rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |y - y_ref| / |y_ref|; infinite if the shapes differ."""
    y, reference = y.detach(), reference.detach()
    if y.shape != reference.shape:
        return math.inf
    return float((y - reference).norm() / reference.norm().clamp_min(1e-12))
