"""A quantizable layer, the schemes that exist, and why a layer cannot take one on a target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from intaglio.pipeline.errors import did_you_mean
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W8A8_STEP,
    W8A8_TOKEN,
    W8A16,
    IntInput,
    IntWeight,
    LayerScheme,
    w4a4_step,
    w4a4_token,
    w4a8_step,
    w4a8_token,
    w4a16,
    with_output,
    with_shift,
)

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target


USUAL_SCHEMES = ("float", "w8a8_token", "w8a8_step", "w4a16")
"""Those that are measured where a recipe names none."""


SCHEME_NAMES = (
    *USUAL_SCHEMES,
    "w8a16",
    "w4a8_token",
    "w4a8_step",
    "w4a4_token",
    "w4a4_step",
    "w8a8o8_step",
    "w4a8o8_step",
    "w4a4o8_step",
    "w8a8s_token",
    "w8a8s_step",
    "w4a8s_token",
    "w4a8s_step",
    "w4a4s_token",
    "w4a4s_step",
)


def _known_scheme(name: str) -> str:
    if name not in SCHEME_NAMES:
        raise ValueError(f"no scheme {name!r}{did_you_mean(name, SCHEME_NAMES)}")
    return name


SchemeName: TypeAlias = Annotated[
    str, AfterValidator(_known_scheme), WithJsonSchema({"type": "string", "enum": list(SCHEME_NAMES)})
]
"""Of an option of a pass."""


AxisSize: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]


class Layer(BaseModel):
    """A layer that can be quantized, by its module path. `shape` is that of its weight in torch.

    `padded`: a convolution that adds zeros around its input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op: Literal["linear", "conv"]
    shape: tuple[AxisSize, ...] = Field(min_length=2)
    bias: bool
    padded: bool = False

    @property
    def n(self) -> int:
        """Out features."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """In features."""
        return math.prod(self.shape[1:])

    def size_bytes(self, scheme: LayerScheme, float_bytes: int = 2) -> int:
        """Bytes of weight, scales and bias as stored; an integer weight has its scales and bias in float32.

        >>> layer = Layer(name="to_q", op="linear", shape=(256, 128), bias=True)
        >>> [layer.size_bytes(scheme) for scheme in (FLOAT, W8A8_TOKEN, w4a16(64))]
        [66048, 34816, 20480]
        """
        match scheme.weight:
            case IntWeight() as form:
                return math.ceil(self.n * self.k * form.bits_per_weight / 8) + 4 * self.n * (1 + self.bias)
            case _:
                return float_bytes * self.n * (self.k + self.bias)


def structural_schemes(
    layer: Layer, groups: tuple[int, ...] = (64, 32, 128), names: tuple[str, ...] = USUAL_SCHEMES
) -> tuple[LayerScheme, ...]:
    """Schemes of `names` that the layer's shape admits, float first, which is always there.

    The group size is the first of `groups` that divides K.
    """
    schemes = [FLOAT, W8A8_TOKEN, W8A8_STEP, W8A16]
    if group := next((g for g in groups if layer.k % g == 0 and layer.k != g), None):
        schemes += [w4a16(group), w4a8_token(group), w4a8_step(group), w4a4_token(group), w4a4_step(group)]
    if layer.op == "conv":
        schemes = [s for s in schemes if not s.name.endswith("_token")]
    integer = [s for s in schemes if isinstance(s.input, IntInput)]
    if layer.op == "conv":
        schemes += [with_output(s) for s in integer]
    if not layer.padded:
        schemes += [with_shift(s) for s in integer]
    return tuple(s for s in schemes if s.name in names or s == FLOAT)


def illegal(layer: Layer, scheme: LayerScheme, target: Target) -> str | None:
    """Why the target cannot execute this layer so, or None."""
    allowed = target.formats[layer.op]
    if scheme.name not in allowed:
        return f"{layer.name}: {target.name} runs {', '.join(allowed)} for a {layer.op}, not {scheme.name}"
    if layer.op == "conv" and scheme.name.endswith("_token"):
        return f"{layer.name}: a convolution has no tokens: use {scheme.name.removesuffix('_token')}_step"
    multiple = target.limits.conv_channels_multiple
    if layer.op == "conv" and isinstance(scheme.input, IntInput) and (layer.n % multiple or layer.shape[1] % multiple):
        channels = f"{layer.shape[1]} channels in and {layer.n} out"
        return f"{layer.name}: {channels}, but {target.name} takes multiples of {multiple} where it rounds the input"
    if isinstance(scheme.input, IntInput) and scheme.input.shifted and layer.padded:
        return f"{layer.name}: zeros around a shifted input do not shift: use {scheme.name.replace('s_', '_')}"
    if isinstance(scheme.weight, IntWeight) and (size := scheme.weight.group_size) is not None:
        if size not in target.group_sizes:
            return f"{layer.name}: group size {size}, but {target.name} takes {', '.join(map(str, target.group_sizes))}"
        if layer.k % size or layer.k == size:
            return f"{layer.name}: K = {layer.k} must be a multiple of the group size {size} and larger than it"
    return None
