"""Formats as values: what a weight and an input are rounded to. No numerics here, and no heavy import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Float(_Value):
    """Not quantized."""

    kind: Literal["float"] = "float"


class PerChannel(_Value):
    """w: (N, K) -> scale: (N, 1)"""

    kind: Literal["per_channel"] = "per_channel"


class PerGroup(_Value):
    """w: (N, K), axis=1 -> scale: (N, K // size)"""

    kind: Literal["per_group"] = "per_group"
    size: int = Field(ge=16, description="neighbouring input features that share a scale")


class PerToken(_Value):
    """x: (..., K) -> scale: (..., 1), measured when it runs"""

    kind: Literal["per_token"] = "per_token"


class PerStep(_Value):
    """x: (...) -> scale: (), from a table with one entry a denoising step"""

    kind: Literal["per_step"] = "per_step"


class IntWeight(_Value):
    """Symmetric integer weight, w ~= scale * q."""

    kind: Literal["int"] = "int"
    bits: Literal[4, 8]
    granularity: Annotated[PerChannel | PerGroup, Field(discriminator="kind")]

    @property
    def low(self) -> int:
        """Smallest code. 8 bit leaves -128 out, so that a code and its negative are both there."""
        return -127 if self.bits == 8 else -8

    @property
    def high(self) -> int:
        """Largest code."""
        return 127 if self.bits == 8 else 7

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, group scales (float32) included; a channel's one scale is counted with the layer."""
        match self.granularity:
            case PerChannel():
                return float(self.bits)
            case PerGroup(size=size):
                return self.bits + 32 / size


class IntInput(_Value):
    """Symmetric 8-bit input, x ~= scale * q with q in [-128, 127]."""

    kind: Literal["int"] = "int"
    bits: Literal[8] = 8
    granularity: Annotated[PerToken | PerStep, Field(discriminator="kind")]


WeightFormat = Annotated[Float | IntWeight, Field(discriminator="kind")]
InputFormat = Annotated[Float | IntInput, Field(discriminator="kind")]


class LayerScheme(_Value):
    """How one layer computes: the format of its weight and of its input."""

    weight: WeightFormat
    input: InputFormat

    @property
    def name(self) -> str:
        """The scheme's short name, as targets and tables use it."""
        match self.weight, self.input:
            case Float(), Float():
                return "float"
            case IntWeight(bits=bits), Float():
                return f"w{bits}a16"
            case IntWeight(bits=bits), IntInput(granularity=PerToken()):
                return f"w{bits}a8_token"
            case IntWeight(bits=bits), IntInput(granularity=PerStep()):
                return f"w{bits}a8_step"
            case other:
                raise ValueError(f"a float weight with a quantized input is no scheme: {other}")


FLOAT = LayerScheme(weight=Float(), input=Float())
W8A8_TOKEN = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerToken()))
W8A8_STEP = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerStep()))


def w4a16(group: int) -> LayerScheme:
    """Weight-only 4 bit with one scale for every `group` input features."""
    return LayerScheme(weight=IntWeight(bits=4, granularity=PerGroup(size=group)), input=Float())
