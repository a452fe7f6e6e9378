"""Take over FP8 and NVFP4 numbers of a layer from the quantizers of Model Optimizer, exactly or not at all.

A file has either float weights, which Model Optimizer rounds in each call, or weights that `mtq.compress` packed.

Shapes: N out features, K in features, G blocks of 16 in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.passes.imports.imported import NotCarried, as_float32, dtype_name, shown
from intaglio.passes.imports.saved_quantizers import (
    ZERO_AMAX,
    Quantizer,
    amax_of,
    channel_amax,
    form_of,
    is_by_token,
    is_static,
    refuse_input,
    static_amax,
)
from intaglio.pipeline.formats.fp8 import Fp8Input, Fp8Weight
from intaglio.pipeline.formats.layer import Layer, admitted_schemes
from intaglio.pipeline.formats.layer_tables import NO_TABLES, LayerTables
from intaglio.pipeline.formats.nvfp4 import Nvfp4Input, Nvfp4Weight
from intaglio.pipeline.formats.schemes import Float, LayerScheme, PerToken, RoundedInput, Static

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

SCALE_BITS = (4, 3)
"""Exponent and mantissa bits of block scales, E4M3, as Model Optimizer writes them."""


def float_layer(
    layer: Layer, w: torch.Tensor | None, weight: Quantizer, entering: Quantizer | None, rank: int
) -> QuantizedLayerData:
    """Return the numbers of a layer whose weight quantizer has a floating-point format, and how its input is rounded.

    `w` is the weight in the file, `rank` the number of axes of the input. Raises NotCarried for a layer that has no
    exact form here.
    """
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

    packed = weight.facts.get("_fake_quant") is False
    form: Fp8Weight | Nvfp4Weight
    match weight.how.bits:
        case (4, 3):
            form = Fp8Weight()
        case (2, 1):
            form = Nvfp4Weight()
        case bits:
            raise NotCarried(f"weight in {form_of(bits)}: of the floating-point formats only FP8 (E4M3) and NVFP4")
    rounded, tables = (Float(), NO_TABLES) if entering is None else _input(layer, entering, rank)
    if problem := form.problem_with(rounded):
        raise NotCarried(problem)
    scheme = LayerScheme(weight=form, input=rounded)
    if scheme not in admitted_schemes(layer):
        raise NotCarried(f"{scheme.name} for a {layer.op} of shape {layer.shape}, which no target here executes")
    shape = (layer.n, layer.k // 2) if packed and form.bits == 4 else layer.shape
    if w is None or tuple(w.shape) != shape:
        held = "no weight" if w is None else f"a weight {tuple(w.shape)}"
        raise NotCarried(f"the file has {held}, where {shape} is expected")
    if isinstance(form, Fp8Weight):
        codes, scale_NG = _packed_fp8(layer, w, weight) if packed else _fp8(layer, as_float32("a weight", w), weight)
        return QuantizedLayerData(scheme, codes, scale_NG, tables=tables)
    _check_blocks("weight", weight)
    codes, scale, group_NG = (
        _packed_nvfp4(layer, w, weight) if packed else _nvfp4(layer, as_float32("a weight", w), weight)
    )
    return QuantizedLayerData(scheme, codes, scale, group_NG, tables)


def _fp8(layer: Layer, w: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (N, K) int8 and scales (N, 1) as Model Optimizer's simulation has them: E4M3(w * (448 / amax))."""
    import torch

    from intaglio.pipeline.numerics import minifloat
    from intaglio.pipeline.numerics.rounding import SCALE_EPS

    if quantizer.how.dynamic or quantizer.how.blocks:
        raise NotCarried("FP8 weights with scales for blocks, or that are found when it is called: only for channels")
    amax_N1, w_NK = channel_amax(layer, quantizer, amax_of("weight", quantizer)), w.reshape(layer.n, layer.k)
    inverse_N1 = torch.where(amax_N1 <= ZERO_AMAX, 0.0, minifloat.E4M3.largest / amax_N1)
    if ((inverse_N1 == 0) & (w_NK.abs().amax(-1, keepdim=True) > ZERO_AMAX)).any():
        raise NotCarried("weight scales of 0 for weights that are not 0")
    codes = minifloat.E4M3.encode(minifloat.E4M3.nearest(w_NK * inverse_N1))
    return codes, (amax_N1 / minifloat.E4M3.largest).clamp_min(SCALE_EPS).contiguous()


def _packed_fp8(layer: Layer, w: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (N, K) int8 and scales (N, 1) that a file of packed weights holds."""
    import torch

    if w.dtype != torch.float8_e4m3fn or quantizer.how.blocks:
        raise NotCarried(f"packed FP8 weights in {dtype_name(w)}, blocks {shown(quantizer.how.blocks)}: only E4M3")
    scale_N1 = channel_amax(layer, quantizer, as_float32("packed scales", _buffer(quantizer, "_scale")))
    if not (scale_N1 > 0).all():
        raise NotCarried("packed weight scales that are not above 0")
    try:
        return Fp8Weight().unpack(w.reshape(layer.n, layer.k), (layer.n, layer.k)), scale_N1.contiguous()
    except ValueError as error:
        raise NotCarried(f"packed weights: {error}") from error


def _nvfp4(layer: Layer, w: torch.Tensor, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (N, K) int8, the tensor's scale (1, 1) and block scales (N, G) in E4M3, as Model Optimizer packs w.

    The tensor's scale is amax / 2688. The scale of a block is E4M3(m / (6 * scale)), where m is the block's largest
    magnitude; it is 1 for a block of zeros, and not less than 2^-9.
    """
    import torch

    from intaglio.pipeline.numerics import minifloat

    amax = amax_of("weight", quantizer)
    if amax.numel() != 1 or amax.item() <= ZERO_AMAX:
        raise NotCarried(f"NVFP4 weight scales {tuple(amax.shape)}: only one, above 0")
    scale = amax.reshape(1, 1) / (minifloat.E2M1.largest * minifloat.E4M3.largest)
    w_NGB = w.reshape(layer.n, -1, minifloat.BLOCK)
    group_NG = w_NGB.abs().amax(-1) / (minifloat.E2M1.largest * scale)
    group_NG = torch.where(group_NG == 0, 1.0, group_NG).clamp_min(minifloat.E4M3.smallest)
    group_NG = minifloat.E4M3.nearest(group_NG)
    numbers = minifloat.E2M1.nearest(w_NGB / (group_NG * scale).unsqueeze(-1))
    codes = minifloat.E2M1.encode(numbers).reshape(layer.n, layer.k)
    return codes, scale, group_NG.to(torch.float8_e4m3fn)


def _packed_nvfp4(
    layer: Layer, w: torch.Tensor, quantizer: Quantizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (N, K) int8, the tensor's scale (1, 1) and block scales (N, G) that a file of packed weights holds.

    A negative zero becomes zero.
    """
    import torch

    from intaglio.pipeline.numerics.minifloat import BLOCK

    scale, group_NG = as_float32("packed scales", _buffer(quantizer, "_double_scale")), _buffer(quantizer, "_scale")
    blocks = (layer.n, layer.k // BLOCK)
    if w.dtype != torch.uint8 or group_NG.dtype != torch.float8_e4m3fn or tuple(group_NG.shape) != blocks:
        raise NotCarried(
            f"packed NVFP4 weights in {dtype_name(w)} with block scales {tuple(group_NG.shape)} in"
            f" {dtype_name(group_NG)}: uint8 and {blocks} in float8_e4m3fn are expected"
        )
    if scale.numel() != 1 or not scale.item() > 0 or not (group_NG.float() > 0).all():
        raise NotCarried("packed weight scales that are not above 0")
    return Nvfp4Weight().unpack(w.flatten(), (layer.n, layer.k)), scale.reshape(1, 1), group_NG.contiguous()


def _buffer(quantizer: Quantizer, name: str) -> torch.Tensor:
    """Return a buffer of packed weights. Raises NotCarried if the file has none."""
    value = quantizer.tensors.get(name)
    if value is None:
        raise NotCarried(f"packed weights without {name}")
    return value


def _check_blocks(what: str, quantizer: Quantizer) -> None:
    """Raise NotCarried unless blocks of 16 in features have scales in E4M3 that the tensor itself determines."""
    from intaglio.pipeline.numerics.minifloat import BLOCK

    how = quantizer.how
    blocks = dict(how.blocks or {})
    size = blocks.pop(-1, None)
    if how.dynamic or size != BLOCK or blocks != {"type": "dynamic", "scale_bits": SCALE_BITS}:
        raise NotCarried(
            f"{what} in E2M1 with blocks {shown(how.blocks)}: only NVFP4, dynamic blocks of 16 along the last axis with"
            " scales in E4M3"
        )


def _input(layer: Layer, quantizer: Quantizer, rank: int) -> tuple[RoundedInput, LayerTables]:
    """Return how an input is rounded. Raises NotCarried for formats and scales that are not here."""
    match quantizer.how.bits:
        case (4, 3) if is_by_token(quantizer, rank) and layer.op == "linear":
            return Fp8Input(granularity=PerToken()), NO_TABLES
        case (4, 3) if is_static(quantizer):
            return Fp8Input(granularity=Static()), LayerTables(static_amax(quantizer).reshape(()))
        case (4, 3):
            raise refuse_input(layer, quantizer)
        case (2, 1):
            _check_blocks("input", quantizer)
            return Nvfp4Input(granularity=Static()), LayerTables(static_amax(quantizer).reshape(()))
        case bits:
            raise NotCarried(f"input in {form_of(bits)} beside a floating-point weight: only FP8 (E4M3) and NVFP4")
