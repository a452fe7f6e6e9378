"""Formats as values: what a weight and an input are rounded to. No numerics here, and no heavy import."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class TwoLevel(_Value):
    """w: (N, K), axis=1 -> integer scale: (N, K // size), and scale: (N, 1)

    A 4-bit code times its group's integer is the 8-bit code that a product takes: w ~= scale * (group * q)
    (progressive group quantization: QServe, Lin et al. 2024, section 4.1).
    """

    kind: Literal["two_level"] = "two_level"
    size: int = Field(ge=16, description="neighbouring input features that share an integer scale")


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
    granularity: Annotated[PerChannel | PerGroup | TwoLevel, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _two_levels_have_4_bits(self) -> Self:
        if self.bits != 4 and isinstance(self.granularity, TwoLevel):
            raise ValueError(f"two levels are for 4-bit codes, not {self.bits}")
        return self

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
        """Stored bits a weight, scales of groups (float32; of two levels int8) included; a channel's one is not.

        >>> [IntWeight(bits=4, granularity=each(size=64)).bits_per_weight for each in (PerGroup, TwoLevel)]
        [4.5, 4.125]
        """
        match self.granularity:
            case PerChannel():
                return float(self.bits)
            case PerGroup(size=size):
                return self.bits + 32 / size
            case TwoLevel(size=size):
                return self.bits + 8 / size

    @property
    def group_size(self) -> int | None:
        """Neighbouring input features that share a scale; None where all of a channel do."""
        return None if isinstance(self.granularity, PerChannel) else self.granularity.size


class IntInput(_Value):
    """Symmetric input, x ~= scale * q with q in [-128, 127] or [-8, 7]; 4-bit codes multiply as 8-bit ones do."""

    kind: Literal["int"] = "int"
    bits: Literal[4, 8] = 8
    granularity: Annotated[PerToken | PerStep, Field(discriminator="kind")]
    shifted: bool = Field(
        False, description="the middle of the range is taken off before rounding and put back behind the product"
    )


class IntOutput(_Value):
    """Symmetric 8-bit product, without its bias, y ~= scale * q with q in [-128, 127]; one scale a denoising step."""

    kind: Literal["int"] = "int"


WeightFormat = Annotated[Float | IntWeight, Field(discriminator="kind")]
InputFormat = Annotated[Float | IntInput, Field(discriminator="kind")]
OutputFormat = Annotated[Float | IntOutput, Field(discriminator="kind")]


class LayerScheme(_Value):
    """How one layer computes: the format of its weight, of its input, and of the product without its bias."""

    weight: WeightFormat
    input: InputFormat
    output: OutputFormat = Float()

    @property
    def weight_bits(self) -> int:
        """16 in float."""
        return self.weight.bits if isinstance(self.weight, IntWeight) else 16

    @property
    def input_bits(self) -> int:
        """16 in float."""
        return self.input.bits if isinstance(self.input, IntInput) else 16

    @property
    def name(self) -> str:
        """The scheme's short name, as targets and tables use it.

        >>> [each.name for each in (FLOAT, W8A8_TOKEN, w4a16(64), with_output(w4a8_step(64)), with_shift(W8A8_STEP))]
        ['float', 'w8a8_token', 'w4a16', 'w4a8o8_step', 'w8a8s_step']
        """
        rounded = "o8" if isinstance(self.output, IntOutput) else ""
        if rounded and not (isinstance(self.input, IntInput) and isinstance(self.input.granularity, PerStep)):
            raise ValueError(f"an output is rounded only behind an input with a scale a step: {self}")
        shifted = "s" if isinstance(self.input, IntInput) and self.input.shifted else ""
        if rounded and shifted:
            raise ValueError(f"an output is rounded only behind an input that is not shifted: {self}")
        match self.weight, self.input:
            case Float(), Float():
                return "float"
            case IntWeight(granularity=TwoLevel()), Float():
                raise ValueError(f"two levels are for products with a quantized input: {self}")
            case IntWeight(bits=bits), Float():
                return f"w{bits}a16"
            case IntWeight(bits=4, granularity=PerChannel() | PerGroup()), IntInput():
                raise ValueError(f"4-bit weights multiply a quantized input in two levels only: {self}")
            case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=PerToken()):
                return f"w{bits}a{input_bits}{shifted}_token"
            case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=PerStep()):
                return f"w{bits}a{input_bits}{shifted}{rounded}_step"
            case other:
                raise ValueError(f"a float weight with a quantized input is no scheme: {other}")


FLOAT = LayerScheme(weight=Float(), input=Float())
W8A8_TOKEN = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerToken()))
W8A8_STEP = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerStep()))
W8A16 = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=Float())


def with_output(scheme: LayerScheme) -> LayerScheme:
    """The scheme with an 8-bit output: its product takes and gives 8-bit codes."""
    return scheme.model_copy(update={"output": IntOutput()})


def with_shift(scheme: LayerScheme) -> LayerScheme:
    """The scheme with a shifted input: all codes are used where the range is not symmetric."""
    if not isinstance(scheme.input, IntInput):
        raise ValueError(f"a float input has no shift: {scheme}")
    return scheme.model_copy(update={"input": scheme.input.model_copy(update={"shifted": True})})


def w4a16(group: int) -> LayerScheme:
    """Weight-only 4 bit with one scale for every `group` input features."""
    return LayerScheme(weight=IntWeight(bits=4, granularity=PerGroup(size=group)), input=Float())


def w4a8_token(group: int) -> LayerScheme:
    """4-bit weight in two levels, input with a scale a token: a product of 8-bit codes."""
    return LayerScheme(weight=_two_level(group), input=IntInput(granularity=PerToken()))


def w4a8_step(group: int) -> LayerScheme:
    """4-bit weight in two levels, input with a scale a denoising step: a product of 8-bit codes."""
    return LayerScheme(weight=_two_level(group), input=IntInput(granularity=PerStep()))


def w4a4_token(group: int) -> LayerScheme:
    """4-bit weight in two levels, 4-bit input with a scale a token: a product of 8-bit codes."""
    return LayerScheme(weight=_two_level(group), input=IntInput(bits=4, granularity=PerToken()))


def w4a4_step(group: int) -> LayerScheme:
    """4-bit weight in two levels, 4-bit input with a scale a denoising step: a product of 8-bit codes."""
    return LayerScheme(weight=_two_level(group), input=IntInput(bits=4, granularity=PerStep()))


def _two_level(group: int) -> IntWeight:
    return IntWeight(bits=4, granularity=TwoLevel(size=group))
