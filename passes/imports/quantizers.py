"""Take over codes and scales of a layer from the quantizers of NVIDIA's Model Optimizer, exactly or not at all.

Shapes: N out features, K in features, G scales per row, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from intaglio.passes.imports.float_quantizers import float_layer
from intaglio.passes.imports.imported import (
    ImportedInput,
    NotCarried,
    StaysFloat,
    as_float32,
    check_called,
    layer_data,
    shown,
)
from intaglio.passes.imports.saved_quantizers import (
    ZERO_AMAX,
    Quantizer,
    SavedQuantizers,
    amax_of,
    channel_amax,
    check_rounds,
    form_of,
    is_by_token,
    is_static,
    positive,
    refuse_input,
    static_amax,
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
    from intaglio.pipeline.numerics.low_rank import Branch

FACTORS = ("_svdquant_lora_a", "_svdquant_lora_b")
"""Buffers of a weight quantizer with the low-rank part that SVDQuant computes in float: (R, K) and (N, R)."""


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
        branch = _branch(layer, saved.quantizers.get(f"{layer.name}.weight_quantizer"))
        if weight is None:
            name = f"{layer.name}.weight_quantizer"
            _check_float(entering, balance, branch)
            raise StaysFloat("its weight quantizer is off" if name in saved.quantizers else "it has no quantizer")
        check_called(layer, trajectory)
        w, rank = saved.tensors.get(f"{layer.name}.weight"), ranks.get(layer.name, 0)
        for part, quantizer in (("weight", weight), ("input", entering)):
            if quantizer is not None:
                check_rounds(part, quantizer)
        if isinstance(weight.how.bits, tuple):
            data = float_layer(layer, w, weight, entering, rank)
        else:
            if w is None or tuple(w.shape) != layer.shape:
                held = "no weight" if w is None else f"a weight {tuple(w.shape)}"
                raise NotCarried(f"the file has {held}, but the model has one of {layer.shape}")
            bits, codes, scale_NG = _codes(layer, as_float32("a weight", w), weight)
            data = layer_data(layer, bits, codes, scale_NG, None if entering is None else _input(layer, entering, rank))
        return replace(data, balance=balance, branch=branch)

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

    if entering is None or (applied := entering.facts.get("_enable_pre_quant_scale", True)) is False:
        return None
    if applied is not True:
        raise NotCarried(f"_enable_pre_quant_scale is {shown(applied)}: True or False is expected")
    scale = entering.tensors.get("_pre_quant_scale")
    if scale is None:
        return None
    if layer.op != "linear" or scale.numel() != layer.k:
        raise NotCarried(f"a pre_quant_scale {tuple(scale.shape)} in front of a {layer.op} of {layer.k} in features")
    try:
        return Balance(as_float32("a pre_quant_scale", scale).flatten())
    except ValueError as error:
        raise NotCarried(f"its pre_quant_scale: {error}") from error


def _branch(layer: Layer, weight: Quantizer | None) -> Branch | None:
    """Return the low-rank part of SVDQuant, its factors rounded to float16, in which graphs compute it."""
    from intaglio.pipeline.numerics.low_rank import Branch

    down, up = (None if weight is None else weight.tensors.get(name) for name in FACTORS)
    if down is None and up is None:
        return None
    shapes = [None if factor is None else tuple(factor.shape) for factor in (down, up)]
    rank = 0 if down is None or down.dim() == 0 else len(down)
    if down is None or up is None or layer.op != "linear" or shapes != [(rank, layer.k), (layer.n, rank)]:
        raise NotCarried(f"factors {shapes[0]} and {shapes[1]} of SVDQuant for a {layer.op} of shape {layer.shape}")
    halves = [as_float32("a factor of SVDQuant", factor).half().float().contiguous() for factor in (down, up)]
    if not all(factor.isfinite().all() for factor in halves):
        raise NotCarried("a factor of SVDQuant beyond the range of float16")
    return Branch(*halves)


def _check_float(entering: Quantizer | None, balance: Balance | None, branch: Branch | None) -> None:
    """Raise NotCarried if a layer with a float weight differs from that of the model."""
    if entering is not None:
        raise NotCarried("a rounded input in front of a float weight: save before fold_weight, or round neither")
    if balance is not None:
        raise NotCarried("a pre_quant_scale in front of a float weight")
    if branch is not None:
        raise NotCarried("factors of SVDQuant beside a float weight")


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
    if w.any() and not codes.any():
        raise NotCarried(
            f"weight scales up to {float(amax_NG.max()):.3g} for weights up to {float(w.abs().max()):.3g}: all of them"
            " are rounded to 0"
        )
    return bits, codes.reshape(layer.n, layer.k), (amax_NG / high).clamp_min(SCALE_EPS)


def _weight_amax(layer: Layer, quantizer: Quantizer) -> torch.Tensor:
    """Return the largest magnitudes (N, G) that the codes reach. Raises NotCarried if they are not the layer's."""
    amax, blocks = amax_of("weight", quantizer), _blocks(quantizer.how.blocks)
    if not blocks:
        return channel_amax(layer, quantizer, amax)
    count = layer.k // _block_size(layer, blocks)
    if amax.numel() != layer.n * count:
        raise NotCarried(f"weight scales {tuple(amax.shape)} along axis {quantizer.how.axis} in blocks {blocks}")
    return positive(amax).reshape(layer.n, count)


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
    bits = _bits("input", quantizer)
    if quantizer.how.narrow:
        raise NotCarried(
            "an input with narrow_range, which leaves out the smallest code (-128 in 8 bits): only inputs that have"
            " this code can be imported"
        )
    match bits:
        case 4 | 8 if is_by_token(quantizer, rank) and layer.op == "linear":
            return ImportedInput(IntInput(bits=bits, granularity=PerToken()))
        case 4 | 8 if is_static(quantizer):
            return ImportedInput(IntInput(bits=bits, granularity=PerStep()), LayerTables(static_amax(quantizer)))
    raise refuse_input(layer, quantizer)


def _bits(what: str, quantizer: Quantizer) -> int:
    """Return 4 or 8. Raises NotCarried for any other number format."""
    bits = quantizer.how.bits
    if not isinstance(bits, int) or bits not in (4, 8):
        beside = " beside an integer weight" if what == "input" else ""
        raise NotCarried(f"{what} in {form_of(bits)}{beside}: only integers of 4 or 8 bits")
    return bits


def _blocks(written: Mapping[int | str, object] | None) -> dict[int, object]:
    """Return sizes by axis. Raises NotCarried for scales that are rounded, or found when the quantizer is called."""
    written = written or {}
    if extra := {key: v for key, v in written.items() if not isinstance(key, int) and (key, v) != ("type", "static")}:
        raise NotCarried(f"weight blocks with {shown(extra)}")
    return {key: size for key, size in written.items() if isinstance(key, int) and size is not None}
