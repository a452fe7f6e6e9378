"""Define weight formats: each has its label, its codes, the fit of its scales, its rounding and its stored bytes.

The arithmetic is in `numerics`, imported inside the functions that use it: this module imports nothing heavy.
Shapes: N output features, K input features, G scales in each row (1, or K // group size).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, assert_never

from pydantic import Field, model_validator

from intaglio.pipeline.formats.inputs import Float, IntInput, RoundedInput, Value

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from intaglio.pipeline.numerics.rounding import Grid


class RoundedWeight(Value, ABC):
    """Weight that is stored as integer codes q in [low, high] with scales: w ~= scale * q.

    In a format of floating-point numbers, the code q stands for the q-th number from zero: w ~= scale * number(q).
    Each subclass is a format. A format is known once a scheme in `known.py` uses it.
    Shapes: w and q (N, K), scales (N, G) with G = 1 or K // group_size.
    """

    compute_capability: ClassVar[str | None] = None
    """Lowest CUDA compute capability of the GPUs that multiply such weights; None: any."""
    fixed_group: ClassVar[bool] = False
    """True if the format fixes the group size, so that neither layer nor target chooses it."""
    linear_only: ClassVar[bool] = False
    """True if convolutions cannot have such weights."""

    kind: str
    bits: int

    @property
    @abstractmethod
    def low(self) -> int:
        """Smallest code."""

    @property
    @abstractmethod
    def high(self) -> int:
        """Largest code."""

    @property
    def group_size(self) -> int | None:
        """Number of neighbouring input features that share a scale; None if a channel has one scale."""
        return None

    @property
    def label(self) -> str:
        """The weight's part of a scheme's name, such as w8."""
        return f"w{self.bits}"

    @property
    def bits_per_weight(self) -> float:
        """Bits of each weight as `pack` stores it, with its share of the group scale, without the channel scale."""
        return float(self.bits)

    @property
    def scales(self) -> str:
        """Shapes of the weight and its scales, in one line."""
        return _first_line(PerChannel)

    @property
    def grid(self) -> Grid:
        """The codes, and which weights share a scale, as the functions of `numerics.rounding` take them."""
        from intaglio.pipeline.numerics.rounding import Grid

        return Grid(self.low, self.high, self.group_size)

    def scale_bytes(self, n: int) -> int:
        """Return the bytes of the scales that `bits_per_weight` leaves out: one in float32 for each channel."""
        return 4 * n

    def problem_with(self, form: Float | RoundedInput) -> str | None:
        """Return why this weight cannot be multiplied with such an input, or None."""
        return None

    @abstractmethod
    def fit(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales (N, G) and None; for two levels, the scales (N, 1) and the group integers (N, G)."""

    def code_scale(self, scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> torch.Tensor:
        """Return the value of a code of 1, (N, G), from the scales and groups of `fit`; differentiable in both."""
        from intaglio.pipeline.numerics import rounding

        return rounding.product_scale(scale_NG, group_NG)

    def stored_groups(self, group_NG: torch.Tensor) -> torch.Tensor:
        """Return the groups of `fit` as files store them, int8 (N, G)."""
        from intaglio.pipeline.numerics import rounding

        return rounding.group_integers(group_NG)

    def quantize(self, w_NK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
        """Return the codes, int8 (N, K)."""
        from intaglio.pipeline.numerics import rounding

        return rounding.quantize(w_NK, scale_NG, self.grid)

    def dequantize(self, q_NK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
        """Return the weight that the codes stand for, float32 (N, K)."""
        from intaglio.pipeline.numerics import rounding

        return rounding.dequantize(q_NK, scale_NG, self.grid)

    def fake_quantize(self, w_NK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
        """Return the rounded weight (N, K), equal to `dequantize` of its codes; differentiable in weight and scales."""
        from intaglio.pipeline.numerics import rounding

        return rounding.fake_quantize(w_NK, scale_NG, self.grid)

    def pack(self, q_NK: torch.Tensor) -> torch.Tensor:
        """Return the codes as files store them: one byte each, unless a format says otherwise."""
        return q_NK.contiguous()

    def elements(self, q_NK: torch.Tensor) -> NDArray[np.generic]:
        """Return the codes as graphs have them, (N, K), in NumPy's type of the format's numbers."""
        codes: NDArray[np.generic] = q_NK.numpy()
        return codes

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes, int8 of this shape, that `pack` stored. Raises ValueError if the sizes differ."""
        if tuple(stored.shape) != shape:
            raise ValueError(f"{list(stored.shape)} codes are stored for a weight of shape {list(shape)}")
        return stored


class PerChannel(Value):
    """One scale for each output channel, w: (N, K) -> scale: (N, 1)."""

    kind: Literal["per_channel"] = "per_channel"


class PerGroup(Value):
    """One scale for each group of input features, w: (N, K), axis=1 -> scale: (N, K // size)."""

    kind: Literal["per_group"] = "per_group"
    size: int = Field(ge=16, description="neighbouring input features that share a scale")


class TwoLevel(Value):
    """Two levels of scales, w: (N, K), axis=1 -> integer scale: (N, K // size), and scale: (N, 1).

    A 4-bit code times its group's integer is the 8-bit code that the product multiplies: w ~= scale * (group * q)
    (progressive group quantization: QServe, Lin et al. 2024, section 4.1).
    """

    kind: Literal["two_level"] = "two_level"
    size: int = Field(ge=16, description="neighbouring input features that share an integer scale")


class IntWeight(RoundedWeight):
    """Symmetric integer weight, w ~= scale * q.

    Codes of 7 bits take a byte each, as those of 8 bits do. They are for CPUs that add two products of codes in 16
    bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
    """

    kind: Literal["int"] = "int"
    bits: Literal[4, 7, 8]
    granularity: Annotated[PerChannel | PerGroup | TwoLevel, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _scales_suit_the_bits(self) -> Self:
        if self.bits != 4 and isinstance(self.granularity, TwoLevel):
            raise ValueError(f"two levels are for 4-bit codes, not {self.bits}")
        if self.bits == 7 and not isinstance(self.granularity, PerChannel):
            raise ValueError("7-bit codes have one scale for each output channel")
        return self

    @property
    def label(self) -> str:
        """The weight's part of a scheme's name: w4, w7, w8, and w8g for 8-bit codes with a scale for each group."""
        return f"w{self.bits}g" if self.bits == 8 and isinstance(self.granularity, PerGroup) else f"w{self.bits}"

    @property
    def low(self) -> int:
        """Smallest code. At 7 and 8 bits every code has a negative: -64 and -128 are left out."""
        return _CODES[self.bits][0]

    @property
    def high(self) -> int:
        """Largest code."""
        return _CODES[self.bits][1]

    @property
    def bits_per_weight(self) -> float:
        """Bits of each weight as `pack` stores it, with its share of the group scale (float32; int8 in two levels).

        >>> [IntWeight(bits=4, granularity=each(size=64)).bits_per_weight for each in (PerGroup, TwoLevel)]
        [4.5, 4.125]
        """
        match self.granularity:
            case PerChannel():
                return 8.0 if self.bits == 7 else float(self.bits)
            case PerGroup(size=size):
                return self.bits + 32 / size
            case TwoLevel(size=size):
                return self.bits + 8 / size
            case other:
                assert_never(other)

    @property
    def scales(self) -> str:
        """Shapes of the weight and its scales, in one line."""
        return _first_line(type(self.granularity))

    @property
    def group_size(self) -> int | None:
        """Number of neighbouring input features that share a scale; None if a channel has one scale."""
        return None if isinstance(self.granularity, PerChannel) else self.granularity.size

    def problem_with(self, form: Float | RoundedInput) -> str | None:
        """Return why this weight cannot be multiplied with such an input, or None.

        An integer product needs one scale for each channel, so a 4-bit weight needs two levels for it, and an 8-bit
        weight must have no groups.
        """
        match form:
            case Float():
                if self.bits == 7:
                    return "7-bit weights are for products with a quantized input"
                two_level = isinstance(self.granularity, TwoLevel)
                return "two levels are for products with a quantized input" if two_level else None
            case IntInput():
                if self.bits == 8 and isinstance(self.granularity, PerGroup):
                    return "8-bit weights in groups are for products with a float input"
                apart = self.bits == 4 and not isinstance(self.granularity, TwoLevel)
                return "4-bit weights multiply a quantized input in two levels only" if apart else None
            case RoundedInput():
                return "integer weights multiply float or integer inputs only"
            case other:
                assert_never(other)

    def fit(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales: from the largest magnitude at 8 bits, with the least squared error at 4 and 7 bits."""
        from intaglio.pipeline.numerics import rounding

        match self.granularity:
            case TwoLevel():
                return rounding.fit_two_level(w_NK, self.grid)
            case PerChannel() | PerGroup():
                fit = rounding.fit_largest if self.bits == 8 else rounding.fit_clipped
                return fit(w_NK, self.grid), None
            case other:
                assert_never(other)

    def pack(self, q_NK: torch.Tensor) -> torch.Tensor:
        """Return 4-bit codes in pairs, two in each byte, and 8-bit codes unchanged."""
        import torch

        from intaglio.pipeline.numerics.packing import pack_int4

        return torch.from_numpy(pack_int4(q_NK.numpy())) if self.bits == 4 else super().pack(q_NK)

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes, int8 of this shape. Raises ValueError if the bytes hold another number of codes."""
        import torch

        from intaglio.pipeline.numerics.packing import unpack_int4

        return torch.from_numpy(unpack_int4(stored.numpy(), shape)) if self.bits == 4 else super().unpack(stored, shape)


_CODES: Mapping[int, tuple[int, int]] = {8: (-127, 127), 7: (-63, 63), 4: (-8, 7)}
"""Smallest and largest code, by bits."""


def _first_line(documented: type) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
