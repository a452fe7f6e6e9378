"""Define formats of a layer's input and output: float, or integer codes with a scale for each token or step."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


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


class IntInput(Value):
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


class IntOutput(Value):
    """Product before the bias as 8-bit codes, y ~= scale * q, q in [-128, 127]; one scale for each denoising step."""

    bits: ClassVar[int] = 8
    kind: Literal["int"] = "int"


InputFormat: TypeAlias = Annotated[Float | IntInput, Field(discriminator="kind")]
OutputFormat: TypeAlias = Annotated[Float | IntOutput, Field(discriminator="kind")]
