"""Define a quantizable layer, the schemes that its shape admits, and why a target cannot execute a scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, assert_never

from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.formats.inputs import Float, PerStep
from intaglio.pipeline.formats.known import USUAL_SCHEMES, known_schemes
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme
from intaglio.pipeline.formats.weights import RoundedWeight

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target

GROUPS = (64, 32, 128)
"""Group sizes of weights, the preferred first."""


AxisSize: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]


class Layer(BaseModel):
    """Layer that can be quantized. `name` is its module path, `shape` the shape of its weight in torch.

    `padded`: True for a convolution that pads its input with zeros. `groups` is that of a convolution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op: Literal["linear", "conv"]
    shape: tuple[AxisSize, ...] = Field(min_length=2)
    bias: bool
    padded: bool = False
    groups: int = Field(1, ge=1)

    @property
    def channels(self) -> int:
        """Number of channels of the input; of a linear layer, number of its features."""
        return self.shape[1] * self.groups

    @property
    def n(self) -> int:
        """Number of output features, N."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Number of input features of one output, K."""
        return math.prod(self.shape[1:])

    def size_bytes(self, scheme: LayerScheme, float_bytes: int = 2) -> int:
        """Return bytes of weight, scales and bias as stored; an integer weight has its scales and bias in float32.

        >>> layer = Layer(name="to_q", op="linear", shape=(256, 128), bias=True)
        >>> [layer.size_bytes(known_schemes(64)[name]) for name in ("float", "w8a8_token", "w4a16")]
        [66048, 34816, 20480]
        """
        match scheme.weight:
            case RoundedWeight() as form:
                weight_bytes = math.ceil(self.n * self.k * form.bits_per_weight / 8) + form.scale_bytes(self.n)
                return weight_bytes + 4 * self.n * self.bias
            case Float():
                return float_bytes * self.n * (self.k + self.bias)
            case other:
                assert_never(other)


def admitted_schemes(layer: Layer, groups: Sequence[int] = GROUPS) -> tuple[LayerScheme, ...]:
    """Return all schemes that the layer's shape admits. The first is float, which every shape admits.

    The group size is the first of `groups` that divides K and is not K itself. Without one, grouped schemes are left
    out.
    """
    group = next((g for g in groups if layer.k % g == 0 and layer.k != g), None)
    schemes = (known_schemes() if group is None else known_schemes(group)).values()
    return tuple(s for s in schemes if s.group_size in (None, group) and _misfit(layer, s) is None)


def structural_schemes(
    layer: Layer, groups: Sequence[int] = GROUPS, names: Sequence[str] = USUAL_SCHEMES
) -> tuple[LayerScheme, ...]:
    """Return float, and the schemes of `names` that the layer's shape admits."""
    return tuple(s for s in admitted_schemes(layer, groups) if s.name in names or s == FLOAT)


def illegal(layer: Layer, scheme: LayerScheme, target: Target) -> str | None:
    """Return why the target cannot execute the layer in this scheme, or None."""
    allowed = target.formats[layer.op]
    if scheme.name not in allowed:
        lack = target.lacks(scheme.weight)
        why = f": {lack}" if lack else ""
        return f"{layer.name}: {target.name} runs {', '.join(allowed)} for {layer.op} layers, not {scheme.name}{why}"
    if problem := _misfit(layer, scheme):
        return f"{layer.name}: {problem}"
    multiple = target.limits.conv_channels_multiple
    if _rounds_convolution(layer, scheme) and (layer.n % multiple or layer.shape[1] % multiple):
        each = f" in each of {layer.groups} groups" if layer.groups > 1 else ""
        channels = f"{layer.n} channels out, {layer.shape[1]} in{each}"
        return f"{layer.name}: {channels}, but {target.name} takes multiples of {multiple} where it rounds the input"
    size = scheme.group_size
    if size is not None and size not in target.group_sizes:
        return f"{layer.name}: group size {size}, but {target.name} takes {', '.join(map(str, target.group_sizes))}"
    return None


def unfit(layer: Layer, scheme: LayerScheme, target: Target) -> str | None:
    """Return why a plan should not give the layer this scheme: it is illegal, or slower than float. None if it may."""
    least = target.conv_group_channels
    if _rounds_convolution(layer, scheme) and layer.groups > 1 and layer.shape[1] < least:
        groups = f"{layer.groups} groups have {layer.shape[1]} input channels each"
        return f"{layer.name}: {groups}, and with fewer than {least}, {target.name} is faster if it rounds no inputs"
    return illegal(layer, scheme, target)


def _rounds_convolution(layer: Layer, scheme: LayerScheme) -> bool:
    """Return True for a convolution whose input is rounded."""
    return layer.op == "conv" and not isinstance(scheme.input, Float)


def _misfit(layer: Layer, scheme: LayerScheme) -> str | None:
    """Return why no layer of this shape can have the scheme on any target, or None."""
    if layer.op == "conv" and scheme.by_token:
        by_step = scheme.input.model_copy(update={"granularity": PerStep()})
        return f"a convolution has no tokens: use {scheme.model_copy(update={'input': by_step}).name}"
    if layer.op == "conv" and not isinstance(scheme.weight, Float) and scheme.weight.linear_only:
        return f"a convolution has no {scheme.weight.kind} weight"
    if layer.op == "linear" and not isinstance(scheme.output, Float):
        return "only the output of a convolution is rounded"
    size = scheme.weight.group_size
    if size is not None and (layer.k % size or layer.k == size):
        return f"K = {layer.k} must be a multiple of the group size {size} and larger than it"
    return None
