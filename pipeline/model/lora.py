"""Find style LoRAs beside a recipe, and fuse them into a denoiser's weights before anything is measured.

Shapes: r rank, N out, K in; of a convolution, K is input channels times kernel size.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import MissingExtra, RecipeError, StepFailed
from intaglio.pipeline.files import open_safetensors, parse_json, printable
from intaglio.pipeline.model.lora_formats import LONGEST_NAME, canonical, converted, fitting, refuse_other_kinds
from intaglio.pipeline.model.model_files import boundary

if TYPE_CHECKING:
    import torch
    from torch import nn

TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?\.|lora_te\d?_")
FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""Types that are read, as torch and as safetensors name them."""
WHOLE = ("I8", "I16", "I32", "I64", "U8")
"""Types of whole numbers, as which trainers may write an alpha."""
PLAIN = re.compile(r"\^?[\w.]+")
"""Pattern of an alpha's key: the end of a layer's name, or, after ^, the whole name."""
ADAPTER = "lora"
TOLERANCE = 1e-5
"""Relative tolerance of the fused weight, for r roundings in float32."""


@dataclass(frozen=True)
class Update:
    """Update of a weight to W + strength * B A; a magnitude (DoRA) then scales each row to that norm."""

    a_rK: torch.Tensor
    b_Nr: torch.Tensor
    magnitude_N: torch.Tensor | None
    strength: float


def find_lora(given: str, base: Path) -> Path:
    """Return the LoRA file that a recipe in `base` names.

    Raises RecipeError if it has no keys for a denoiser, or if it is an adapter of another kind.
    """
    path = (base / given).resolve()
    if not path.exists():
        raise RecipeError(f"model.loras: no {given} beside the recipe")
    whole = path.is_dir()
    files = sorted(path.glob("*.safetensors")) if whole else [path]
    if len(files) != 1:
        names = f" ({_some(file.name for file in files)})" if files else ""
        raise RecipeError(f"model.loras: {given} holds {len(files)} safetensors files{names}: name one file")
    try:
        with open_safetensors(files[0], inside=boundary(path) if whole else None) as file:
            keys = sorted(file.keys())
    except RecipeError as e:
        raise RecipeError(f"model.loras: {e} (no other kind is read)") from e
    if not keys:
        raise RecipeError(f"model.loras: {given} holds no tensors: download it again")
    others = [key for key in keys if TEXT_ENCODER.match(key)]
    if len(others) == len(keys):
        raise RecipeError(f"model.loras: none of {len(keys)} keys in {given} belongs to a denoiser: {_some(keys)}")
    refuse_other_kinds([key for key in keys if not TEXT_ENCODER.match(key)], f"model.loras: {given}")
    if others:
        logging.getLogger(__name__).warning(
            "%s: %d of %d keys belong to text encoders, which are not compiled: %s",
            given,
            len(others),
            len(keys),
            _some(others),
        )
    return files[0]


def fuse_lora_(module: nn.Module, file: Path, scale: float, label: str) -> None:
    """Replace each weight W that the file names by W + scale * alpha / r * B A. Modules keep their names and types.

    alpha is r unless the file says otherwise, as in diffusers. Raises RecipeError if the file does not fit the
    module, and StepFailed if a fused weight is wrong.
    """
    try:
        import peft  # noqa: F401  # `_fuse_alike_` needs it
    except ImportError as e:
        raise MissingExtra("lora", "fusing model.loras") from e
    from intaglio.pipeline.stored_tensors import StoredTensor

    updates = _updates(module, file, scale, label)
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    alike: dict[tuple[int, float, bool], dict[str, Update]] = defaultdict(dict)
    in_files: dict[str, Update] = {}
    for name, update in updates.items():
        if isinstance(module.get_submodule(name).get_parameter("weight"), StoredTensor):
            in_files[name] = update
        else:
            alike[len(update.a_rK), update.strength, update.magnitude_N is not None][name] = update
    changed = sum(_fuse_alike_(module, group, label) for group in alike.values())
    if not _fuse_stored_(module, in_files, label) and not changed:
        raise RecipeError(f"{label}: changes none of {len(updates)} weights: its scale or all its products are zero")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])  # peft froze them


def _updates(module: nn.Module, file: Path, scale: float, label: str) -> Mapping[str, Update]:
    """Read the file's updates by module. No tensor is read before its shape is known to fit."""
    layers = _layers(module)
    with open_safetensors(file, framework="pt") as opened:
        names = [key for key in opened.keys() if not TEXT_ENCODER.match(key)]  # noqa: SIM118  # no dict
        refuse_other_kinds(names, label)
        keys, held = canonical(names, layers, label), opened
        prefix, fits = fitting(keys.keys(), layers)
        if unfit := sorted(keys.keys() - fits.keys()):
            made = None
            if not fits:  # the layout of another trainer
                made = converted({name: _float32(opened.get_tensor(name)) for name in names}, module, layers)
            if made is None:
                raise RecipeError(_unfit(unfit, len(keys), module, layers, label))
            keys, held = {key: key for key in made}, _Tensors(made)
            prefix, fits = fitting(keys.keys(), layers)
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        for key, (name, part) in sorted(fits.items()):
            parts[name][part] = keys[key]
        slices = {name: {part: held.get_slice(key) for part, key in found.items()} for name, found in parts.items()}
        if problems := [f"{label}: {p}" for name, found in slices.items() if (p := _misfit(name, found, layers[name]))]:
            raise RecipeError(*problems)
        settings = _settings(opened.metadata() or {}, prefix, label)
        plain = [name for name, found in parts.items() if "magnitude_vector" not in found]
        if settings.get("use_dora") is True and plain:
            raise RecipeError(
                f"{label}: is a DoRA by its metadata (use_dora), but has no magnitudes for {len(plain)} of {len(parts)}"
                f" layers: {_some(plain)}: the file is not whole: download it again"
            )
        return {
            name: _update({part: held.get_tensor(key) for part, key in found.items()}, scale, settings, name, label)
            for name, found in parts.items()
        }


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float tensor in float32, so that a conversion does not round in half precision; others unchanged."""
    return tensor.float() if str(tensor.dtype).removeprefix("torch.") in FLOATS else tensor


def _unfit(unfit: Sequence[str], count: int, module: nn.Module, layers: Collection[str], label: str) -> str:
    """Return the message for keys that name no layer of the module, with what to do."""
    there = f"its layers are {_some(layers)}" if layers else "it has no layer that takes a LoRA"
    return (
        f"{label}: {len(unfit)} of {count} keys fit no layer of the {type(module).__name__}: {_some(unfit)}; {there}:"
        " load the file with diffusers into the model that it was trained for, and write it with save_lora_adapter"
    )


@dataclass(frozen=True)
class _Tensors:
    """Tensors in memory, with the methods of an opened safetensors file."""

    tensors: Mapping[str, torch.Tensor]

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.tensors[name])


@dataclass(frozen=True)
class _Slice:
    tensor: torch.Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return FLOATS.get(str(self.tensor.dtype).removeprefix("torch."), str(self.tensor.dtype))


def _update(
    found: Mapping[str, torch.Tensor], scale: float, settings: Mapping[str, Any], name: str, label: str
) -> Update:
    tensors = {part: tensor.float() for part, tensor in found.items()}
    if wrong := [part for part, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise RecipeError(f"{label}: {name}: {', '.join(wrong)} has NaN or Inf: the file is damaged: download it again")
    a_rK = tensors["A.weight"]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else _alpha(settings, name, len(a_rK), label)
    strength = alpha / (math.sqrt(len(a_rK)) if settings.get("use_rslora") is True else len(a_rK)) * scale
    return Update(a_rK, tensors["B.weight"], tensors.get("magnitude_vector"), strength)


def _settings(metadata: Mapping[str, str], prefix: str, label: str) -> Mapping[str, Any]:  # parsed JSON
    """Read the adapter's configuration from the file's metadata. Raises RecipeError for unsupported settings."""
    written = parse_json(metadata.get("lora_adapter_metadata", "{}"), source=f"{label}: lora_adapter_metadata")
    if not isinstance(written, dict):
        raise RecipeError(f"{label}: lora_adapter_metadata is a {type(written).__name__}, not a JSON object")
    settings = {key.removeprefix(prefix): value for key, value in written.items()}
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init != "gaussian":
        raise RecipeError(
            f"{label}: init_lora_weights={_name(init)!r} also changes the base weights, which the file does not"
            " contain: convert it to a plain LoRA"
        )
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise RecipeError(f"{label}: alpha_pattern is a {type(alphas).__name__}, not a JSON object")
    if wrong := [key for key in alphas if not PLAIN.fullmatch(key)]:
        raise RecipeError(f"{label}: alpha_pattern has {_name(wrong[0])!r}, and only names of layers are read")
    return settings | {"alpha_pattern": alphas}


def _layers(module: nn.Module) -> Mapping[str, nn.Module]:
    """Return linear layers and convolutions, except grouped ones, whose updates peft cannot merge."""
    from torch import nn

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    found = {name: each for name, each in module.named_modules() if isinstance(each, kinds)}
    return {name: each for name, each in found.items() if getattr(each, "groups", 1) == 1}


def _misfit(name: str, found: Mapping[str, Any], layer: nn.Module) -> str | None:  # slices of safetensors
    """Describe the first problem with the shapes and types of one layer's tensors; None if there is none."""
    shapes = {part: tuple(each.get_shape()) for part, each in found.items()}
    a, b, magnitude = shapes.get("A.weight"), shapes.get("B.weight"), shapes.get("magnitude_vector")
    if a is None or b is None:
        return f"{name} has no {'A' if a is None else 'B'}"
    shape = tuple(layer.get_parameter("weight").shape)
    rank = a[0] if a else 0
    if rank == 0 or a != (rank, *shape[1:]) or b != (shape[0], rank, *(1 for _ in shape[2:])):
        return f"A {a} and B {b} do not fit {name}, whose weight is {shape}"
    if magnitude is not None and math.prod(magnitude) != shape[0]:
        return f"{math.prod(magnitude)} magnitudes do not fit {name}, whose weight is {shape}"
    if math.prod(shapes.get("alpha", ())) != 1:
        return f"{math.prod(shapes['alpha'])} alphas for {name}, which has one"
    kinds = sorted(
        {each.get_dtype() for part, each in found.items() if part != "alpha" or each.get_dtype() not in WHOLE}
        - set(FLOATS.values())
    )
    return (
        f"{name} has tensors of the type {', '.join(kinds)}: only {', '.join(FLOATS.values())} are read"
        if kinds
        else None
    )


def _alpha(settings: Mapping[str, Any], name: str, rank: int, label: str) -> float:
    """Return the layer's alpha: from a pattern that fits its name, else the general one, else the rank."""
    alphas: Mapping[str, Any] = settings["alpha_pattern"]
    words = name.split(".")
    ends = {f"^{name}", *(".".join(words[place:]) for place in range(len(words)))} & alphas.keys()
    first = next((key for key in alphas if key in ends), None) if ends else None
    alpha = settings.get("lora_alpha", rank) if first is None else alphas[first]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise RecipeError(f"{label}: the alpha of {name} is {_name(str(alpha))}, not a number")
    return float(alpha)


def _fuse_alike_(module: nn.Module, updates: Mapping[str, Update], label: str) -> int:
    """Fuse updates of one rank, strength and kind, and return the number of changed weights."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    first = next(iter(updates.values()))
    tensors: dict[str, torch.Tensor] = {}
    for name, update in updates.items():
        tensors |= {f"{name}.lora_A.weight": update.a_rK, f"{name}.lora_B.weight": update.b_Nr}
        if update.magnitude_N is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude_N
    rank = len(first.a_rK)
    config = LoraConfig(
        r=rank,
        lora_alpha=first.strength * rank,
        target_modules=list(updates),
        use_dora=first.magnitude_N is not None,
    )
    # adapters start empty, so that torch's global generator is not used
    inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=True, state_dict=tensors)
    set_peft_model_state_dict(module, tensors, ADAPTER, low_cpu_mem_usage=True)
    changed = 0
    for name, update in updates.items():
        adapted: Any = module.get_submodule(name)  # a layer of peft
        layer = adapted.get_base_layer()
        before = layer.weight.detach().clone()
        adapted.scaling[ADAPTER] = update.strength  # exactly: peft computed strength * rank / rank, which rounds
        adapted.merge()
        module.set_submodule(name, layer)
        _check(before, layer.weight.detach(), update, f"{label}: {name}")
        changed += not before.equal(layer.weight)
    del module.peft_config
    return changed


def _fuse_stored_(module: nn.Module, updates: Mapping[str, Update], label: str) -> bool:
    """Fuse updates into weights that stay in their files, at each reading. Returns True if a weight is changed."""
    import torch

    from intaglio.pipeline.stored_tensors import StoredTensor

    changed = False
    for name, update in updates.items():
        layer = module.get_submodule(name)
        before = layer.get_parameter("weight")
        after = StoredTensor(before.shape, before.dtype, partial(_fused, copy.copy(layer), before, name, update, label))
        layer.weight = after.as_parameter()
        changed = changed or not torch.equal(before, after)
    return changed


def _fused(layer: nn.Module, weight: torch.Tensor, name: str, update: Update, label: str) -> torch.Tensor:
    """Return the fused weight of a layer that has this weight."""
    from torch import nn

    whole = owner = nn.Module()
    path, _, last = name.rpartition(".")
    for part in filter(None, path.split(".")):
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    alone = copy.copy(layer)
    alone._parameters = {**layer._parameters, "weight": nn.Parameter(weight.detach().clone(), requires_grad=False)}
    owner.add_module(last, alone)
    _fuse_alike_(whole, {name: update}, label)
    return whole.get_submodule(name).get_parameter("weight").detach()


def _check(before: torch.Tensor, after: torch.Tensor, update: Update, place: str) -> None:
    """Raise RecipeError if a weight is not finite, StepFailed if it differs from W + strength * B A."""
    if not after.isfinite().all():
        raise RecipeError(f"{place}: the fused weight has NaN or Inf: the file's tensors do, or its scale is too large")
    w_NK, a_rK, b_Nr = (each.double().flatten(1) for each in (before, update.a_rK, update.b_Nr))
    expected_NK = w_NK + update.strength * b_Nr @ a_rK
    size_NK = w_NK.abs() + abs(update.strength) * b_Nr.abs() @ a_rK.abs()
    if update.magnitude_N is not None:
        gain_N1 = update.magnitude_N.double().reshape(-1, 1) / expected_NK.norm(dim=1, keepdim=True)
        expected_NK, size_NK = expected_NK * gain_N1, size_NK * gain_N1.abs()
    off_NK = (after.double().flatten(1) - expected_NK).abs()
    if (off_NK > TOLERANCE * size_NK).any():
        raise StepFailed(
            f"{place}: peft's fused weight differs by {off_NK.max():.3g} from W + {update.strength:g} B A,"
            f" whose largest value is {expected_NK.abs().max():.3g}"
        )


def _some(names: Iterable[str]) -> str:
    """List up to three names."""
    listed = [_name(name) for name in names]
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _name(text: str) -> str:
    """Write a name for a message: without control characters, and not too long."""
    return printable(text[:LONGEST_NAME]) + ("..." if len(text) > LONGEST_NAME else "")
