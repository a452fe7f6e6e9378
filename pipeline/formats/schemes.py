"""Define schemes: a scheme is a weight format with an input format and an output format.

The name of a scheme is derived from its value, and no name is parsed: `known.py` finds a scheme by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from pydantic import InstanceOf, SerializeAsAny

from intaglio.pipeline.formats.inputs import (
    Float,
    IntInput,
    IntOutput,
    OutputFormat,
    PerStep,
    PerToken,
    RoundedInput,
    Static,
    Value,
)
from intaglio.pipeline.formats.weights import IntWeight, PerChannel, PerGroup, RoundedWeight, TwoLevel

__all__ = [
    "FEW_BITS",
    "FLOAT",
    "W7A8_STEP",
    "W7A8_TOKEN",
    "W8A8_STEP",
    "W8A8_TOKEN",
    "W8A16",
    "Float",
    "IntInput",
    "IntOutput",
    "IntWeight",
    "LayerScheme",
    "OutputFormat",
    "PerChannel",
    "PerGroup",
    "PerStep",
    "PerToken",
    "RoundedInput",
    "RoundedWeight",
    "Static",
    "TwoLevel",
    "int_schemes",
    "w4a4_step",
    "w4a4_token",
    "w4a8_step",
    "w4a8_token",
    "w4a16",
    "w8ga16",
    "with_output",
    "with_shift",
]


class LayerScheme(Value):
    """Formats of one layer: of its weight, of its input, and of its product before the bias.

    `StoredScheme` in `known.py` reads a scheme from JSON.
    """

    weight: SerializeAsAny[InstanceOf[Float] | InstanceOf[RoundedWeight]]
    input: SerializeAsAny[InstanceOf[Float] | InstanceOf[RoundedInput]]
    output: OutputFormat = Float()

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code; 16 in float."""
        return self.weight.bits

    @property
    def input_bits(self) -> int:
        """Bits of an input's code; 16 in float."""
        return self.input.bits

    @property
    def group_size(self) -> int | None:
        """Group size that was chosen; None for weights without groups, and for those whose format fixes the size."""
        return None if isinstance(self.weight, Float) or self.weight.fixed_group else self.weight.group_size

    @property
    def by_token(self) -> bool:
        """True where the input has a scale for each token."""
        return isinstance(self.input, RoundedInput) and isinstance(self.input.granularity, PerToken)

    @property
    def by_step(self) -> bool:
        """True where the input has a scale for each denoising step."""
        return isinstance(self.input, RoundedInput) and isinstance(self.input.granularity, PerStep)

    @property
    def static(self) -> bool:
        """True where the input has one scale for all calls."""
        return isinstance(self.input, RoundedInput) and isinstance(self.input.granularity, Static)

    @property
    def shifted(self) -> bool:
        """True if the middle of the input's range is subtracted before rounding."""
        return isinstance(self.input, RoundedInput) and self.input.shifted

    @property
    def label(self) -> str:
        """Name of weight format and input bits alone, such as w4a16; float if the weight is not rounded."""
        return self.weight.label if isinstance(self.weight, Float) else f"{self.weight.label}a{self.input_bits}"

    @property
    def name(self) -> str:
        """Short name of the scheme, as targets and tables use it. It leaves out the group size.

        Raises ValueError if the formats cannot be combined.

        >>> [each.name for each in (FLOAT, W8A8_TOKEN, w4a16(64), with_shift(W8A8_STEP), with_output(w4a8_step(64)))]
        ['float', 'w8a8_token', 'w4a16', 'w8a8s_step', 'w4a8o8_step']
        >>> with_shift(with_output(W8A8_STEP)).name
        'w8a8so8_step'
        """
        if problem := self._problem():
            raise ValueError(f"{problem}: {self}")
        match self.input:
            case Float():
                return self.label
            case RoundedInput() as form:
                output = "" if isinstance(self.output, Float) else f"o{self.output.bits}"
                return f"{self.weight.label}{form.label}{output}_{form.granularity.label}"
            case other:
                assert_never(other)

    def alike(self, other: LayerScheme) -> bool:
        """Return True if the schemes are equal or differ only in their group size."""
        return self.name == other.name

    def _problem(self) -> str | None:
        """Return why the formats cannot be combined, or None."""
        if not isinstance(self.output, Float) and not self.by_step:
            return "only a layer whose input has one scale for each step can have a rounded output"
        match self.weight:
            case Float():
                return None if isinstance(self.input, Float) else "a float weight with a quantized input is no scheme"
            case RoundedWeight() as weight:
                return weight.problem_with(self.input)
            case other:
                assert_never(other)


FLOAT = LayerScheme(weight=Float(), input=Float())
W8A8_TOKEN = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerToken()))
W8A8_STEP = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=IntInput(granularity=PerStep()))
W8A16 = LayerScheme(weight=IntWeight(bits=8, granularity=PerChannel()), input=Float())
W7A8_TOKEN = LayerScheme(weight=IntWeight(bits=7, granularity=PerChannel()), input=IntInput(granularity=PerToken()))
W7A8_STEP = LayerScheme(weight=IntWeight(bits=7, granularity=PerChannel()), input=IntInput(granularity=PerStep()))
FEW_BITS = 4
"""Largest number of bits of weights that lose visible quality when they are rounded to the nearest code.

For these weights, passes look for a better rounding."""


def with_output(scheme: LayerScheme) -> LayerScheme:
    """Return the scheme with an 8-bit output: its product reads and writes 8-bit codes."""
    return scheme.model_copy(update={"output": IntOutput()})


def with_shift(scheme: LayerScheme) -> LayerScheme:
    """Return the scheme with a shifted input, which uses all codes even if the range is not symmetric."""
    if not isinstance(scheme.input, IntInput):
        raise ValueError(f"a float input has no shift: {scheme}")
    return scheme.model_copy(update={"input": scheme.input.model_copy(update={"shifted": True})})


def w4a16(group: int) -> LayerScheme:
    """Return the scheme with a 4-bit weight, one scale for every `group` input features, and a float input."""
    return LayerScheme(weight=IntWeight(bits=4, granularity=PerGroup(size=group)), input=Float())


def w8ga16(group: int) -> LayerScheme:
    """Return the scheme with an 8-bit weight, one scale for every `group` input features, and a float input.

    Files of other tools have such weights (GGUF's Q8_0 with groups of 32).
    """
    return LayerScheme(weight=IntWeight(bits=8, granularity=PerGroup(size=group)), input=Float())


def w4a8_token(group: int) -> LayerScheme:
    """Return the scheme with a two-level 4-bit weight and an 8-bit input with one scale for each token."""
    return LayerScheme(weight=_two_level(group), input=IntInput(granularity=PerToken()))


def w4a8_step(group: int) -> LayerScheme:
    """Return the scheme with a two-level 4-bit weight and an 8-bit input with one scale for each step."""
    return LayerScheme(weight=_two_level(group), input=IntInput(granularity=PerStep()))


def w4a4_token(group: int) -> LayerScheme:
    """Return the scheme with a two-level 4-bit weight and a 4-bit input with one scale for each token."""
    return LayerScheme(weight=_two_level(group), input=IntInput(bits=4, granularity=PerToken()))


def w4a4_step(group: int) -> LayerScheme:
    """Return the scheme with a two-level 4-bit weight and a 4-bit input with one scale for each step."""
    return LayerScheme(weight=_two_level(group), input=IntInput(bits=4, granularity=PerStep()))


def _two_level(group: int) -> IntWeight:
    return IntWeight(bits=4, granularity=TwoLevel(size=group))


def int_schemes(group: int) -> Iterator[LayerScheme]:
    """Yield the schemes with weights of 8, 7 and 4 bits; groups have `group` input features."""
    four = (w4a8_token(group), w4a8_step(group), w4a4_token(group), w4a4_step(group))
    integer = (W8A8_TOKEN, W8A8_STEP, *four, W7A8_TOKEN, W7A8_STEP)
    yield from (W8A8_TOKEN, W8A8_STEP, W8A16, w4a16(group), *four, W7A8_TOKEN, W7A8_STEP, w8ga16(group))
    yield from (with_output(scheme) for scheme in integer if scheme.by_step)
    yield from (with_shift(scheme) for scheme in integer)
    yield from (with_shift(with_output(scheme)) for scheme in integer if scheme.by_step)
