"""Hold the quantizers of a denoiser that NVIDIA's Model Optimizer quantized, and check that they only round.

Shapes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intaglio.passes.imports.imported import NotCarried, as_float32, shown
from intaglio.pipeline.formats.layer import Layer

if TYPE_CHECKING:
    import torch

ZERO_AMAX = 2.0**-24
"""Largest magnitude at which Model Optimizer still rounds everything to zero."""
USUAL: Mapping[str, object] = {
    "_if_quant": True,
    "_if_calib": False,
    "_fake_quant": True,
    "_unsigned": False,
    "_bias": None,
    "_use_constant_amax": False,
    "backend": None,
}
"""Attributes of a quantizer that stand for plain symmetric rounding."""


class _Facts(BaseModel):
    """Attributes of a TensorQuantizer that say how it rounds, under Model Optimizer's names."""

    model_config = ConfigDict(strict=True, frozen=True)

    bits: int | tuple[int, int] = Field(alias="_num_bits")
    axis: int | tuple[int, ...] | None = Field(None, alias="_axis")
    blocks: dict[int | str, object] | None = Field(None, alias="_block_sizes")
    dynamic: bool = Field(False, alias="_dynamic")
    narrow: bool = Field(False, alias="_narrow_range")


@dataclass(frozen=True)
class Quantizer:
    """TensorQuantizer: its attributes and its buffers."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def on(self) -> bool:
        """True if it rounds. Anything but `True` under `_disabled` leaves it on, and fails later."""
        return self.facts.get("_disabled", False) is not True

    @property
    def dynamic(self) -> bool:
        """True if it computes its scales at run time."""
        return self.facts.get("_dynamic") is True

    @cached_property
    def how(self) -> _Facts:
        """Attributes that say how it rounds. Raises NotCarried for types other than Model Optimizer's."""
        try:
            return _Facts.model_validate(dict(self.facts))
        except ValidationError as error:
            names = dict.fromkeys(str(each["loc"][0]) for each in error.errors(include_input=False, include_url=False))
            said = ", ".join(f"{name} is {shown(self.facts.get(name))}" for name in names)
            raise NotCarried(f"attributes that Model Optimizer does not write: {said}") from error


@dataclass(frozen=True)
class SavedQuantizers:
    """Denoiser that Model Optimizer quantized: its tensors and all its quantizers, by name."""

    tensors: Mapping[str, torch.Tensor]
    quantizers: Mapping[str, Quantizer]
    version: str


def grouped(
    tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Mapping[str, Any]], version: str
) -> SavedQuantizers:
    """Give each quantizer its attributes, `facts`, and its own tensors; all other tensors are the denoiser's."""
    buffers: dict[str, dict[str, torch.Tensor]] = {name: {} for name in facts}
    rest = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if name in facts:
            buffers[name][part] = value.detach()
        else:
            rest[key] = value.detach()
    return SavedQuantizers(rest, {name: Quantizer(each, buffers[name]) for name, each in facts.items()}, version)


def check_rounds(what: str, quantizer: Quantizer) -> None:
    """Raise NotCarried for a quantizer that does more than round.

    A weight in a floating-point format may be packed, which Model Optimizer says by `_fake_quant`: False.
    """
    if quantizer.facts.get("is_sequential_quantizer"):
        raise NotCarried(f"several quantizers in a row for its {what}")
    may_be_packed = what == "weight" and isinstance(quantizer.facts.get("_num_bits"), tuple)
    facts = {n: value for n, value in quantizer.facts.items() if not (may_be_packed and n == "_fake_quant")}
    if other := [name for name, usual in USUAL.items() if name in facts and facts[name] is not usual]:
        said = ", ".join(f"{name.removeprefix('_')} is {shown(facts[name])}" for name in other)
        raise NotCarried(f"the quantizer of its {what} does more than round: {said}")


def form_of(bits: int | tuple[int, int]) -> str:
    """Return the name of a number format.

    >>> form_of((4, 3)), form_of(6)
    ('E4M3', '6 bits')
    """
    return f"E{shown(bits[0])}M{shown(bits[1])}" if isinstance(bits, tuple) else f"{shown(bits)} bits"


def is_by_token(quantizer: Quantizer, rank: int) -> bool:
    """Return True for an input, of `rank` axes, whose scales are measured for each token when it is called."""
    how = quantizer.how
    blocks = {key: size for key, size in (how.blocks or {}).items() if key != "type"}
    return how.dynamic and (how.axis == tuple(range(rank - 1)) or blocks == {-1: None})


def is_static(quantizer: Quantizer) -> bool:
    """Return True for an input with one scale for all calls."""
    return not quantizer.how.dynamic and quantizer.how.axis is None and not quantizer.how.blocks


def refuse_input(layer: Layer, quantizer: Quantizer) -> NotCarried:
    """Return the error for an input with scales that no format here has."""
    how = quantizer.how
    return NotCarried(
        f"{'dynamic' if how.dynamic else 'static'} input scales along axis {shown(how.axis)}, blocks"
        f" {shown(how.blocks)}, of a {layer.op}: only one static scale, or for linear layers a dynamic one for each"
        " token"
    )


def amax_of(what: str, quantizer: Quantizer) -> torch.Tensor:
    """Return the largest magnitudes that a quantizer keeps, float32. Raises NotCarried if it was never calibrated."""
    amax = quantizer.tensors.get("_amax")
    if amax is None:
        raise NotCarried(f"no scales of its {what}: the quantizer was never calibrated")
    return as_float32(f"{what} scales", amax, ": the quantizer was never calibrated, or they are damaged")


def channel_amax(layer: Layer, quantizer: Quantizer, amax: torch.Tensor) -> torch.Tensor:
    """Return one number for each output channel, (N, 1). Raises NotCarried for scales of other shapes, or below 0."""
    axis = quantizer.how.axis
    if axis is None:
        fits = amax.numel() == 1
    else:
        fits = axis in (0, (0,)) and amax.numel() == layer.n and (amax.dim() == 0 or len(amax) == layer.n)
    if not fits:
        raise NotCarried(f"weight scales {tuple(amax.shape)} along axis {axis}")
    return positive(amax).reshape(-1, 1).expand(layer.n, 1)


def positive(amax: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitudes of a weight. Raises NotCarried if one is below 0."""
    if (amax < 0).any():
        raise NotCarried("weight scales below 0")
    return amax


def static_amax(quantizer: Quantizer) -> torch.Tensor:
    """Return the largest magnitude of the input, (1,). Raises NotCarried for other than one number above 0."""
    from intaglio.pipeline.numerics.rounding import TOKEN_EPS

    amax = amax_of("input", quantizer)
    if amax.numel() != 1:
        raise NotCarried(f"input scales {tuple(amax.shape)}: only one")
    if amax.item() <= 0:
        raise NotCarried(f"an input scale of {amax.item():g}: it was calibrated on nothing but zeros, or is damaged")
    return amax.reshape(1).clamp_min(TOKEN_EPS)
