"""Define formats of a layer's input and output: float, or codes with a scale per token, per step or for all calls.

The arithmetic is in `numerics`, imported inside the functions that use it: this module imports nothing heavy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Value(BaseModel):
    """Frozen value that is compared by its fields and rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Float(Value):
    """Floating point: not quantized."""

    bits: ClassVar[int] = 16
    label: ClassVar[str] = "float"
    group_size: ClassVar[None] = None
    kind: Literal["float"] = "float"


class PerToken(Value):
    """One scale for each token, x: (..., K) -> scale: (..., 1), measured at run time."""

    label: ClassVar[str] = "token"
    kind: Literal["per_token"] = "per_token"


class PerStep(Value):
    """One scale for each denoising step, x: (...) -> scale: (), from a table."""

    label: ClassVar[str] = "step"
    kind: Literal["per_step"] = "per_step"


class Static(Value):
    """One scale for all calls, x: (...) -> scale: ()."""

    label: ClassVar[str] = "static"
    kind: Literal["static"] = "static"


Multiplied: TypeAlias = Literal["int8", "fp8", "fp4"]
"""Type of the operands of a product of codes."""


class RoundedInput(Value, ABC):
    """Input that is divided by its largest magnitude and rounded to codes: x ~= scale * number * magnitude.

    Each subclass is a format. A format is known once a scheme in `known.py` uses it. The scale is a constant, as
    runtimes multiply codes only then; NVFP4 multiplies it by scales of blocks.
    """

    multiplied: ClassVar[Multiplied] = "int8"
    headroom: ClassVar[float] = 1.0
    """Factor on the calibrated range. It is above 1 where a larger range costs no accuracy, so that nothing is clipped.

    The range of such an input is not trained either."""

    kind: str
    bits: int
    granularity: PerToken | PerStep | Static
    shifted: bool = False

    @property
    @abstractmethod
    def label(self) -> str:
        """The input's part of a scheme's name, such as a8; empty if its weight allows one kind of codes only."""

    @property
    def bits_stored(self) -> float:
        """Bits of a number in memory."""
        return 8.0

    @abstractmethod
    def round(self, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Round x / magnitude, (...), to the numbers that its codes stand for, as floats, and return their scale too.

        The scale is one number, or has the shape of the input. The gradient passes straight through the rounding.
        """

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes of these numbers, int8: neighbouring numbers have neighbouring codes."""
        import torch

        return numbers.to(torch.int8)


class IntInput(RoundedInput):
    """Input as integer codes, x ~= scale * q with q in [-128, 127] or [-8, 7].

    If `shifted`, the middle of the input's range is added: x ~= scale * q + middle. 4-bit codes are multiplied as 8-bit
    codes.
    """

    kind: Literal["int"] = "int"
    bits: Literal[4, 8] = 8
    granularity: Annotated[PerToken | PerStep, Field(discriminator="kind")]
    shifted: bool = Field(
        False,
        description="the middle of the range is subtracted before rounding, and its effect is added after the product",
    )

    @property
    def label(self) -> str:
        """The input's part of a scheme's name, such as a8, or a8s where it is shifted."""
        return f"a{self.bits}{'s' if self.shifted else ''}"

    def round(self, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the codes, as floats, and their scale, 1/127 or 1/7."""
        from intaglio.pipeline.numerics import rounding

        return rounding.input_codes(unit, self.bits), rounding.input_scale(self.bits)


class IntOutput(Value):
    """Product before the bias as 8-bit codes, y ~= scale * q, q in [-128, 127]; one scale for each denoising step."""

    bits: ClassVar[int] = 8
    kind: Literal["int"] = "int"


OutputFormat: TypeAlias = Annotated[Float | IntOutput, Field(discriminator="kind")]
