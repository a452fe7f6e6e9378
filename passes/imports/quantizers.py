"""Take over codes and scales of a layer from the quantizers of NVIDIA's Model Optimizer, exactly or not at all.

Shapes: N out features, K in features, G scales per row, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intaglio.passes.imports.imported import (
    ImportedInput,
    NotCarried,
    StaysFloat,
    as_float32,
    check_called,
    layer_data,
    shown,
)
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import IntInput, PerStep, PerToken

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.numerics.basis import Balance

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


def taker(
    saved: SavedQuantizers,
    on: Mapping[str, Quantizer],
    layers: Iterable[Layer],
    model: DenoiserModel,
    trajectory: Trajectory,
) -> Callable[[Layer], QuantizedLayerData]:
    """Return the function that makes the data of one layer from the quantizers in `on`, those that are enabled.

    The function raises StaysFloat for a layer without a weight quantizer, and NotCarried for a layer that cannot be
    imported exactly.
    """
    dynamic = [n.name for n in layers if (q := on.get(f"{n.name}.input_quantizer")) and q.dynamic]
    ranks = _ranks(model, trajectory, dynamic) if dynamic else {}

    def take(layer: Layer) -> QuantizedLayerData:
        weight, entering = (on.get(f"{layer.name}.{part}_quantizer") for part in ("weight", "input"))
        balance = _balance(layer, saved.quantizers.get(f"{layer.name}.input_quantizer"))
        if weight is None:
            name = f"{layer.name}.weight_quantizer"
            _check_float(entering, balance)
            raise StaysFloat("its weight quantizer is off" if name in saved.quantizers else "it has no quantizer")
        check_called(layer, trajectory)
        w = saved.tensors.get(f"{layer.name}.weight")
        if w is None or tuple(w.shape) != layer.shape:
            held = "no weight" if w is None else f"a weight {tuple(w.shape)}"
            raise NotCarried(f"the file has {held}, but the model has one of {layer.shape}")
        bits, codes, scale_NG = _codes(layer, as_float32("a weight", w), weight)
        rounded = None if entering is None else _input(layer, entering, ranks.get(layer.name, 0))
        return layer_data(layer, bits, codes, scale_NG, rounded, balance)

    return take


def _ranks(model: DenoiserModel, trajectory: Trajectory, names: Collection[str]) -> dict[str, int]:
    """Return the number of axes of each of these layers' inputs."""
    import torch

    from intaglio.pipeline.model.calls import denoise_with
    from intaglio.pipeline.model.hooks import before_calls

    found: dict[str, int] = {}
    modules = {name: model.module.get_submodule(name) for name in names}
    with before_calls(modules, lambda name, args: found.update({name: args[0].dim()})), torch.no_grad():
        denoise_with(model.module, model)(trajectory.call(0, slice(1)))
    return found


def _balance(layer: Layer, entering: Quantizer | None) -> Balance | None:
    """Return the factors on the input, which apply even if its quantizer is off."""
    from intaglio.pipeline.numerics.basis import Balance

    if entering is None or not entering.facts.get("_enable_pre_quant_scale", True):
        return None
    scale = entering.tensors.get("_pre_quant_scale")
    if scale is None:
        return None
    if layer.op != "linear" or scale.numel() != layer.k:
        raise NotCarried(f"a pre_quant_scale {tuple(scale.shape)} in front of a {layer.op} of {layer.k} in features")
    try:
        return Balance(as_float32("a pre_quant_scale", scale).flatten())
    except ValueError as error:
        raise NotCarried(f"its pre_quant_scale: {error}") from error


def _check_float(entering: Quantizer | None, balance: Balance | None) -> None:
    """Raise NotCarried if a layer with a float weight differs from that of the model."""
    if entering is not None:
        raise NotCarried("a rounded input in front of a float weight: save before fold_weight, or round neither")
    if balance is not None:
        raise NotCarried("a pre_quant_scale in front of a float weight")


def _codes(layer: Layer, w: torch.Tensor, quantizer: Quantizer) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return bits, codes (N, K) int8 and scales (N, G) as Model Optimizer has them.

    It computes q = clip(round(w * (high / amax))).
    """
    import torch

    from intaglio.pipeline.numerics.rounding import SCALE_EPS

    bits, how = _bits("weight", quantizer), quantizer.how
    if how.dynamic:
        raise NotCarried("weight scales that are found when it is called (dynamic)")
    amax_NG = _weight_amax(layer, quantizer)
    high = 2 ** (bits - 1) - 1
    low = -high if how.narrow else -high - 1
    inverse_NG = torch.where(amax_NG <= ZERO_AMAX, 0.0, high / amax_NG)
    w_NGS = w.reshape(layer.n, amax_NG.shape[1], -1)
    if ((inverse_NG == 0) & (w_NGS.abs().amax(-1) > ZERO_AMAX)).any():
        raise NotCarried("weight scales of 0 for weights that are not 0")
    codes = torch.clamp((w_NGS * inverse_NG.unsqueeze(-1)).round(), low, high).to(torch.int8)
    return bits, codes.reshape(layer.n, layer.k), (amax_NG / high).clamp_min(SCALE_EPS)


def _weight_amax(layer: Layer, quantizer: Quantizer) -> torch.Tensor:
    """Return the largest magnitudes (N, G) that the codes reach. Raises NotCarried if they are not the layer's."""
    amax, axis, blocks = _amax("weight", quantizer), quantizer.how.axis, _blocks(quantizer.how)
    count = 1
    if blocks:
        count = layer.k // _block_size(layer, blocks)
        fits = amax.numel() == layer.n * count
    elif axis is None:
        fits = amax.numel() == 1
    else:
        fits = axis in (0, (0,)) and amax.numel() == layer.n and (amax.dim() == 0 or len(amax) == layer.n)
    if not fits:
        raise NotCarried(f"weight scales {tuple(amax.shape)} along axis {axis}" + f" in blocks {blocks}" * bool(blocks))
    if (amax < 0).any():
        raise NotCarried("weight scales below 0")
    return amax.reshape(-1, count).expand(layer.n, count)


def _block_size(layer: Layer, blocks: Mapping[int, object]) -> int:
    """Return the size of blocks that split the input features evenly. Raises NotCarried for other blocks."""
    rank = len(layer.shape)
    (axis, size), *others = blocks.items()
    if type(size) is not int or size < 1:
        raise NotCarried(f"blocks of {shown(size)} weights: a whole number above 0 is needed")
    if others or axis not in (1, 1 - rank) or layer.op != "linear":
        raise NotCarried(
            f"blocks {shown(dict(blocks))} of a weight {layer.shape}: only of a linear layer, along its input"
        )
    if layer.k % size:
        raise NotCarried(f"blocks of {shown(size)} weights do not divide the {layer.k} input features of the layer")
    return size


def _input(layer: Layer, quantizer: Quantizer, rank: int) -> ImportedInput:
    """Return how an input is rounded. Raises NotCarried unless it has one static scale or one for each token."""
    bits, how = _bits("input", quantizer), quantizer.how
    if how.narrow:
        raise NotCarried(
            "an input with narrow_range, which leaves out the smallest code (-128 in 8 bits): only inputs that have"
            " this code can be imported"
        )
    blocks = {key: size for key, size in (how.blocks or {}).items() if key != "type"}
    by_token = how.axis == tuple(range(rank - 1)) or blocks == {-1: None}
    match bits:
        case 4 | 8 if how.dynamic and by_token and layer.op == "linear":
            return ImportedInput(IntInput(bits=bits, granularity=PerToken()))
        case 4 | 8 if not how.dynamic and how.axis is None and not how.blocks:
            return ImportedInput(IntInput(bits=bits, granularity=PerStep()), LayerTables(_static_amax(quantizer)))
    raise NotCarried(
        f"{'dynamic' if how.dynamic else 'static'} input scales along axis {shown(how.axis)}, blocks"
        f" {shown(how.blocks)}, of a {layer.op}: only one static scale, or for linear layers a dynamic one for each"
        " token"
    )


def _bits(what: str, quantizer: Quantizer) -> int:
    """Return 4 or 8. Raises NotCarried for any other number format, and for quantizers that do more than round."""
    if quantizer.facts.get("is_sequential_quantizer"):
        raise NotCarried(f"several quantizers in a row for its {what}")
    bits = quantizer.how.bits
    if bits not in (4, 8):
        form = f"E{shown(bits[0])}M{shown(bits[1])}" if isinstance(bits, tuple) else f"{shown(bits)} bits"
        raise NotCarried(f"{what} in {form}: only integers of 4 or 8 bits")
    facts = quantizer.facts
    if other := [name for name, usual in USUAL.items() if name in facts and facts[name] is not usual]:
        said = ", ".join(f"{name.removeprefix('_')} is {shown(facts[name])}" for name in other)
        raise NotCarried(f"the quantizer of its {what} does more than round: {said}")
    assert isinstance(bits, int)  # 4 or 8
    return bits


def _blocks(how: _Facts) -> dict[int, object]:
    """Return sizes by axis. Raises NotCarried for scales that are rounded, or found when the quantizer is called."""
    written = how.blocks or {}
    if extra := {key: v for key, v in written.items() if not isinstance(key, int) and (key, v) != ("type", "static")}:
        raise NotCarried(f"weight blocks with {shown(extra)}")
    return {key: size for key, size in written.items() if isinstance(key, int) and size is not None}


def _amax(what: str, quantizer: Quantizer) -> torch.Tensor:
    amax = quantizer.tensors.get("_amax")
    if amax is None:
        raise NotCarried(f"no scales of its {what}: the quantizer was never calibrated")
    return as_float32(f"{what} scales", amax, ": the quantizer was never calibrated, or they are damaged")


def _static_amax(quantizer: Quantizer) -> torch.Tensor:
    """Return the largest magnitude of the input, (1,). Raises NotCarried for other than one number above 0."""
    from intaglio.pipeline.numerics.rounding import TOKEN_EPS

    amax = _amax("input", quantizer)
    if amax.numel() != 1:
        raise NotCarried(f"input scales {tuple(amax.shape)}: only one")
    if amax.item() <= 0:
        raise NotCarried(f"an input scale of {amax.item():g}: it was calibrated on nothing but zeros, or is damaged")
    return amax.reshape(1).clamp_min(TOKEN_EPS)
