"""Round to the nearest floating-point number of 8 or 4 bits, ties to even; larger values become the largest number.

The code of a number is its place among all numbers of the format: 0 is zero, 1 the smallest positive number, and -1 its
negative. So codes are integers in [-high, high], as in integer formats. A negative zero becomes zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from intaglio.pipeline.numerics.straight_through import round_ste

_EXPONENT_BITS = 0x7F800000
"""Bits of a float32 that hold its exponent: with all other bits 0, it is the largest power of two up to |x|."""


@dataclass(frozen=True)
class MiniFloat:
    """Floating-point format of few bits, up to `largest`.

    Numbers below 2^`exponent` are evenly spaced; larger numbers have `mantissa` bits after their first bit.
    """

    mantissa: int
    exponent: int
    largest: float

    @cached_property
    def high(self) -> int:
        """Code of the largest number.

        >>> E4M3.high, E2M1.high
        (126, 7)
        """
        return int(self.encode(torch.tensor([self.largest])))

    @property
    def smallest(self) -> float:
        """Smallest positive number."""
        return 2.0 ** (self.exponent - self.mantissa)

    @property
    def unit(self) -> float:
        """float32(1 / largest): the scale of values that were divided by their largest magnitude."""
        return float(torch.tensor(1 / self.largest))

    @cached_property
    def numbers(self) -> torch.Tensor:
        """The numbers from zero to the largest, float32 (high + 1,).

        >>> E2M1.numbers.tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        codes = torch.arange(self.high + 1)
        above = ((codes >> self.mantissa) - 1).clamp_min(0)
        return (codes - (above << self.mantissa)) * torch.exp2((above + self.exponent - self.mantissa).double()).float()

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the numbers nearest to x, float32. The gradient is 1 inside the range and 0 outside.

        >>> E2M1.nearest(torch.tensor([0.25, 0.26, -2.5, 5.0, 100.0])).tolist()
        [0.0, 0.5, -2.0, 4.0, 6.0]
        """
        inside = torch.clamp(x.float(), -self.largest, self.largest)
        step = self._step(inside)
        return round_ste(inside / step) * step

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes, int8, of numbers of the format.

        >>> E4M3.encode(torch.tensor([0.0, -(2.0**-9), 1.0, 448.0])).tolist()
        [0, -1, 56, 126]
        """
        step = self._step(numbers)
        above = torch.log2(step).round().to(torch.int32) + self.mantissa - self.exponent
        magnitude = (above << self.mantissa) + (numbers.abs() / step).to(torch.int32)
        return (magnitude * numbers.sign().to(torch.int32)).to(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers of these codes, float32."""
        places = codes.to(torch.int32)
        return self.numbers[places.abs()] * places.sign()

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        """Return the distance between neighbouring numbers around x, a power of two."""
        power = (x.detach().contiguous().view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        return power.clamp_min(2.0**self.exponent) * 2.0**-self.mantissa


E4M3 = MiniFloat(mantissa=3, exponent=-6, largest=448.0)
"""FP8 as ONNX's FLOAT8E4M3FN: without infinities, up to 448, evenly spaced by 2^-9 below 2^-6."""
E2M1 = MiniFloat(mantissa=1, exponent=0, largest=6.0)
"""FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
BLOCK = 16
"""Input features that share a block scale in NVFP4."""
BLOCK_UNIT = float(torch.tensor(1 / (E2M1.largest * E4M3.largest)))
"""float32(1 / 2688): the scale of the block scales of an input that was divided by its largest magnitude."""


def round_blocks(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x in [-1, 1] to E2M1 numbers, and return the scale of each too: both (..., K), for K a multiple of 16.

    The scale is that of its block: E4M3(m / (6 * BLOCK_UNIT)) * BLOCK_UNIT, where m is the block's largest magnitude. A
    block whose scale is rounded to zero becomes zero. The gradient passes through the numbers, not through the scales.

    >>> numbers, scale = round_blocks(torch.tensor([[1.0, 0.5, -0.25] + 13 * [0.0]]))
    >>> numbers[0, :3].tolist(), [round(v, 4) for v in (numbers * scale)[0, :3].tolist()]
    ([6.0, 3.0, -1.5], [1.0, 0.5, -0.25])
    """
    blocks = unit.reshape(*unit.shape[:-1], -1, BLOCK)
    one = torch.tensor(BLOCK_UNIT)
    scale = E4M3.nearest(blocks.detach().abs().amax(-1, keepdim=True) / (one * E2M1.largest)) * one
    numbers = E2M1.nearest(blocks / torch.where(scale == 0, torch.inf, scale))
    return numbers.flatten(-2), scale.expand_as(blocks).flatten(-2)
