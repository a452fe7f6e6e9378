"""Take over a denoiser that NVIDIA's Model Optimizer quantized: its integers and scales, exactly or not at all.

Shapes: N out features, K in features, G scales a row, C input channels.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from intaglio.passes._imported import (
    Entering,
    ImportPass,
    NotCarried,
    check_called,
    layer_data,
    problems_of,
    some,
    take_layers,
)
from intaglio.pipeline.artifact import Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.keys import MODEL, TRAJECTORY
from intaglio.pipeline.plan import Layer
from intaglio.pipeline.quant.spec import IntInput, PerStep, PerToken

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.checkpoint import Factory
    from intaglio.pipeline.quant.balance import Balance
    from intaglio.pipeline.quantized import QuantizedLayerData
    from intaglio.pipeline.trajectory import Trajectory

ZERO_AMAX = 2.0**-24
"""A largest magnitude up to which Model Optimizer rounds everything to zero."""
USUAL = {
    "_if_quant": True,
    "_if_calib": False,
    "_fake_quant": True,
    "_unsigned": False,
    "_bias": None,
    "_use_constant_amax": False,
    "backend": None,
}
"""Attributes of a quantizer that mean plain symmetric rounding."""


class ImportModelopt(ImportPass):
    """The model's plan and integers are those of a file that `modelopt.torch.opt.save(denoiser, path)` wrote.

    Codes are equal to the bit, scales to a rounding of float32; an input with one scale has it at every timestep. The
    file is read without running anything from it. What has no exact form here is an error that names it, and so is a
    weight outside the quantized layers that is not the recipe's model's: the float graph is made from that.
    """

    name: ClassVar[str] = "import-modelopt"

    path: str = Field(description="a file of modelopt.torch.opt.save, beside the recipe")
    ignore: tuple[str, ...] = Field(
        (), description="quantizers that are left out, such as `*.norm*.input_quantizer`: more exact there than it was"
    )

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises RecipeError with everything that the file holds and that cannot be carried over."""
        from intaglio.pipeline.checkpoint import layer_table

        model, trajectory, saved = state[MODEL].open(), state[TRAJECTORY], _read(self._place)
        layers = layer_table(model.module)
        on = {name: q for name, q in saved.quantizers.items() if q.on and not self._ignores(name)}
        dynamic = [n.name for n in layers if (q := on.get(f"{n.name}.input_quantizer")) and q.facts.get("_dynamic")]
        ranks = _ranks(model, trajectory, dynamic) if dynamic else {}

        def take(layer: Layer) -> QuantizedLayerData | None:
            weight, entering = (on.get(f"{layer.name}.{part}_quantizer") for part in ("weight", "input"))
            balance = _balance(layer, saved.quantizers.get(f"{layer.name}.input_quantizer"))
            if weight is None:
                _check_float(entering, balance)
                return None
            check_called(layer, trajectory)
            w = saved.tensors.get(f"{layer.name}.weight")
            if w is None or tuple(w.shape) != layer.shape:
                raise NotCarried("the file has no weight of its shape")
            codes, scale_NG = _codes(layer, w, weight)
            rounded = None if entering is None else _input(layer, entering, ranks.get(layer.name, 0))
            return layer_data(layer, weight.facts["_num_bits"], codes, scale_NG, rounded, balance)

        taken, refused = take_layers(layers, take)
        problems = [*self._left_over(saved, layers), *problems_of(model.module, saved.tensors, taken, refused)]
        return self._outputs(f"Model Optimizer {saved.version}", layers, taken, problems, trajectory, ctx)

    def _ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def _left_over(self, saved: _Saved, layers: Iterable[Layer]) -> Iterator[str]:
        """What the file says of quantizers that no layer takes."""
        on = [name for name, q in saved.quantizers.items() if q.on]
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for name in on):
                yield f"ignore: {pattern!r} fits none of its {len(on)} quantizers that are on"
        own = {f"{layer.name}.{part}_quantizer" for layer in layers for part in ("weight", "input")}
        if others := [name for name in on if name not in own and not self._ignores(name)]:
            yield (
                f"{some(others)}: neither weight nor input of a linear layer or an ungrouped 2-D convolution, which is"
                " all that is rounded here: switch them off in Model Optimizer, or name them in `ignore`"
            )
        held = {name: {"_amax", "_pre_quant_scale"} if name.endswith(".input_quantizer") else {"_amax"} for name in own}
        for name, q in saved.quantizers.items():
            if unknown := sorted(q.tensors.keys() - held.get(name, {"_amax"})):
                yield f"{name}: {', '.join(unknown)} has no place here"
            if q.facts.get("_rotate", False) not in (False, None):
                yield f"{name}: its rotation is not carried over"


@dataclass(frozen=True)
class _Quantizer:
    """One TensorQuantizer: its attributes and its buffers."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def on(self) -> bool:
        return not self.facts.get("_disabled", False)


@dataclass(frozen=True)
class _Saved:
    """What `modelopt.torch.opt.save` wrote: the denoiser's tensors and all quantizers, by name."""

    tensors: Mapping[str, torch.Tensor]
    quantizers: Mapping[str, _Quantizer]
    version: str


def _read(file: Path) -> _Saved:
    """Raises RecipeError for what is no such file, or holds more than tensors and plain values."""
    import torch

    try:
        with torch.serialization.safe_globals([slice]):  # a plain value, of quantizers whose last block is cut
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state = saved["modelopt_state"]
        found = [mode["metadata"] for _, mode in state["modelopt_state_dict"] if "quantizer_state" in mode["metadata"]]
        facts: Mapping[str, Mapping[str, Any]] = found[-1]["quantizer_state"]
        tensors: Mapping[str, torch.Tensor] = saved["model_state_dict"]
        version = str(state["modelopt_version"])
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"{file.name}: cannot be read as tensors and plain values alone: {reason}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{file.name}: holds no quantized model: write it with modelopt.torch.opt.save(denoiser, path), behind"
            " modelopt.torch.quantization.quantize"
        ) from error
    buffers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if name in facts:
            buffers[name][part] = value
    rest = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in facts}
    return _Saved(rest, {name: _Quantizer(each, buffers[name]) for name, each in facts.items()}, version)


def _ranks(model: Factory, trajectory: Trajectory, names: Collection[str]) -> dict[str, int]:
    """How many axes the input of each of these layers has."""
    import torch

    from intaglio.pipeline.denoiser import denoise_with
    from intaglio.pipeline.hooks import before_calls

    found: dict[str, int] = {}
    modules = {name: model.module.get_submodule(name) for name in names}
    with before_calls(modules, lambda name, args: found.update({name: args[0].dim()})), torch.no_grad():
        denoise_with(model.module, model)(trajectory.call(0, slice(1)))
    return found


def _balance(layer: Layer, entering: _Quantizer | None) -> Balance | None:
    """What the input is multiplied by, also where its quantizer is off."""
    from intaglio.pipeline.quant.balance import Balance

    if entering is None or not entering.facts.get("_enable_pre_quant_scale", True):
        return None
    scale = entering.tensors.get("_pre_quant_scale")
    if scale is None:
        return None
    if layer.op != "linear" or scale.numel() != layer.k:
        raise NotCarried(f"a pre_quant_scale {tuple(scale.shape)} in front of a {layer.op} of {layer.k} in features")
    try:
        return Balance(scale.float().flatten())
    except ValueError as error:
        raise NotCarried(f"its pre_quant_scale: {error}") from error


def _check_float(entering: _Quantizer | None, balance: Balance | None) -> None:
    """Raises NotCarried where a layer with a float weight is not as the model has it."""
    if entering is not None:
        raise NotCarried("a rounded input in front of a float weight: save before fold_weight, or round neither")
    if balance is not None:
        raise NotCarried("a pre_quant_scale in front of a float weight")


def _codes(layer: Layer, w: torch.Tensor, quantizer: _Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) int8 as Model Optimizer rounds to them, q = clip(round(w * (high / amax))), and scales (N, G)."""
    import torch

    from intaglio.pipeline.quant.affine import SCALE_EPS

    bits = _bits("weight", quantizer)
    amax = _amax(quantizer).float()
    axis, blocks = quantizer.facts.get("_axis"), _blocks(quantizer)
    if blocks:
        amax_NG = _block_amax(layer, amax, blocks)
    elif amax.numel() == 1 and axis is None:
        amax_NG = amax.reshape(1, 1).expand(layer.n, 1)
    elif amax.numel() == layer.n and axis in (0, (0,)):
        amax_NG = amax.reshape(-1, 1)
    else:
        raise NotCarried(f"weight scales {tuple(amax.shape)} along axis {axis}")
    high = 2 ** (bits - 1) - 1
    low = -high if quantizer.facts.get("_narrow_range", False) else -high - 1
    inverse_NG = torch.where(amax_NG <= ZERO_AMAX, 0.0, high / amax_NG)
    w_NGS = w.float().reshape(layer.n, amax_NG.shape[1], -1)
    codes = torch.clamp((w_NGS * inverse_NG.unsqueeze(-1)).round(), low, high).to(torch.int8)
    return codes.reshape(layer.n, layer.k), (amax_NG / high).clamp_min(SCALE_EPS)


def _block_amax(layer: Layer, amax: torch.Tensor, blocks: Mapping[int, int]) -> torch.Tensor:
    """(N, G), where blocks are neighbouring input features and fill them: else raises NotCarried."""
    rank = len(layer.shape)
    (axis, size), *others = ((axis % rank, size) for axis, size in blocks.items())
    if others or axis != 1 or layer.op != "linear":
        raise NotCarried(f"blocks {dict(blocks)} of a weight {layer.shape}: only of a linear layer, along its input")
    if layer.k % size:
        raise NotCarried(f"blocks of {size} of {layer.k} in features: only those that fill them")
    return amax.reshape(layer.n, layer.k // size)


def _input(layer: Layer, quantizer: _Quantizer, rank: int) -> Entering:
    """Raises NotCarried for what is neither one static scale nor a dynamic one for each token."""
    bits = _bits("input", quantizer)
    if quantizer.facts.get("_narrow_range", False):
        raise NotCarried("an input with narrow_range: its smallest code would be another")
    axis, blocks = quantizer.facts.get("_axis"), quantizer.facts.get("_block_sizes") or {}
    dynamic = bool(quantizer.facts.get("_dynamic", False))
    by_token = axis == tuple(range(rank - 1)) or {k: v for k, v in blocks.items() if k != "type"} == {-1: None}
    match bits:
        case 4 | 8 if dynamic and by_token and layer.op == "linear":
            return Entering(IntInput(bits=bits, granularity=PerToken()))
        case 4 | 8 if not dynamic and axis is None and not blocks:
            return Entering(IntInput(bits=bits, granularity=PerStep()), _static_amax(quantizer))
    how = "dynamic" if dynamic else "static"
    raise NotCarried(
        f"{how} input scales along axis {axis}, blocks {blocks}, of a {layer.op}: only one static scale, or for linear"
        " layers a dynamic one for each token"
    )


def _bits(what: str, quantizer: _Quantizer) -> int:
    """Raises NotCarried for other numbers than integers of 4 or 8 bits, rounded as usual."""
    if quantizer.facts.get("is_sequential_quantizer"):
        raise NotCarried(f"several quantizers in a row for its {what}")
    bits: object = quantizer.facts.get("_num_bits")
    if bits not in (4, 8):
        shown = f"E{bits[0]}M{bits[1]}" if isinstance(bits, tuple) else f"{bits} bits"
        raise NotCarried(f"{what} in {shown}: only integers of 4 or 8 bits")
    if other := [n for n, usual in USUAL.items() if quantizer.facts.get(n, usual) != usual]:
        shown = ", ".join(f"{n.removeprefix('_')} is {quantizer.facts[n]}" for n in other)
        raise NotCarried(f"the quantizer of its {what} does more than round: {shown}")
    assert isinstance(bits, int)  # 4 or 8
    return bits


def _blocks(quantizer: _Quantizer) -> dict[int, int]:
    """Sizes by axis; raises NotCarried for scales that are rounded, or found when it runs."""
    written: Mapping[Any, Any] = quantizer.facts.get("_block_sizes") or {}
    if extra := {key: v for key, v in written.items() if not isinstance(key, int) and (key, v) != ("type", "static")}:
        raise NotCarried(f"weight blocks with {extra}")
    return {key: size for key, size in written.items() if isinstance(key, int) and size is not None}


def _amax(quantizer: _Quantizer) -> torch.Tensor:
    amax = quantizer.tensors.get("_amax")
    if amax is None or not amax.isfinite().all():
        raise NotCarried("a quantizer that was never calibrated")
    return amax


def _static_amax(quantizer: _Quantizer) -> torch.Tensor:
    """(1,)"""
    from intaglio.pipeline.quant.affine import TOKEN_EPS

    amax = _amax(quantizer)
    if amax.numel() != 1:
        raise NotCarried(f"input scales {tuple(amax.shape)}: only one")
    return amax.float().reshape(1).clamp_min(TOKEN_EPS)
