"""Style LoRAs: found beside a recipe, and fused into a denoiser's weights before anything is measured.

Shapes: r rank, N out, K in; of a convolution, K is the input channels with the kernel behind them.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import MissingExtra, RecipeError, StepFailed

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = ("", "transformer.", "unet.")
"""What diffusers writes before the names of a denoiser's modules."""
TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?\.")
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)")
ADAPTER = "lora"
TOLERANCE = 1e-5
"""Of the magnitudes that are added: r roundings in float32."""


@dataclass(frozen=True)
class Update:
    """W + strength * B A; a magnitude (DoRA) scales each row of the sum to that norm."""

    a_rK: torch.Tensor
    b_Nr: torch.Tensor
    magnitude_N: torch.Tensor | None
    strength: float


def find_lora(given: str, base: Path) -> Path:
    """The safetensors file that a recipe in `base` names. Raises RecipeError when it has nothing for a denoiser."""
    from safetensors import SafetensorError, safe_open

    path = (base / given).resolve()
    if not path.exists():
        raise RecipeError(f"model.loras: no {given} beside the recipe")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        names = f" ({', '.join(file.name for file in files)})" if files else ""
        raise RecipeError(f"model.loras: {given} holds {len(files)} safetensors files{names}: name one file")
    try:
        with safe_open(files[0], framework="np") as file:
            keys = sorted(file.keys())
    except SafetensorError as e:
        raise RecipeError(f"model.loras: {given} is not a safetensors file, and no other kind is read: {e}") from e
    others = [key for key in keys if TEXT_ENCODER.match(key)]
    if len(others) == len(keys):
        raise RecipeError(f"model.loras: none of {len(keys)} keys in {given} is of a denoiser: {_some(keys)}")
    if others:
        logging.getLogger(__name__).warning(
            "%s: %d of %d keys are of text encoders, which are not compiled: %s",
            given,
            len(others),
            len(keys),
            _some(others),
        )
    return files[0]


def fuse_lora_(module: nn.Module, file: Path, scale: float, label: str) -> None:
    """Each weight W that the file names becomes W + scale * alpha / r * B A. Modules keep their names and types.

    alpha is r unless the file says otherwise, as in diffusers. Raises RecipeError for what does not fit, and
    StepFailed where a weight is not what it should be.
    """
    try:
        import peft  # noqa: F401  # what fuses
    except ImportError as e:
        raise MissingExtra("lora", "fusing model.loras") from e
    updates = _updates(module, file, scale, label)
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    alike: dict[tuple[int, float, bool], dict[str, Update]] = defaultdict(dict)
    for name, update in updates.items():
        alike[len(update.a_rK), update.strength, update.magnitude_N is not None][name] = update
    changed = sum(_fuse_alike_(module, group, label) for group in alike.values())
    if not changed:
        raise RecipeError(f"{label}: changes none of {len(updates)} weights: its scale or all its products are zero")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[name])  # peft froze them


def _updates(module: nn.Module, file: Path, scale: float, label: str) -> Mapping[str, Update]:
    """What the file does, by module."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        keys = [key for key in opened.keys() if not TEXT_ENCODER.match(key)]  # noqa: SIM118  # no dict
        # UNets may be spelt `to_q.lora.down`
        tensors = convert_unet_state_dict_to_peft({key: opened.get_tensor(key).float() for key in keys})
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    layers = _layers(module)
    prefix = max(PREFIXES, key=lambda each: len(_fitting(tensors, each, layers)))
    fitting = _fitting(tensors, prefix, layers)
    if unfit := sorted(tensors.keys() - fitting.keys()):
        there = f"its layers are {_some(layers)}" if layers else "it has no layer that takes a LoRA"
        raise RecipeError(
            f"{label}: {len(unfit)} of {len(tensors)} keys fit no layer of the {type(module).__name__}: {_some(unfit)};"
            f" {there}: load the file with diffusers into the model that it was trained for, and write it with"
            " save_lora_adapter"
        )
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, (name, part) in sorted(fitting.items()):
        parts[name][part] = tensors[key]
    if problems := [f"{label}: {p}" for name, found in parts.items() if (p := _misfit(name, found, layers[name]))]:
        raise RecipeError(*problems)
    settings = {key.removeprefix(prefix): value for key, value in metadata.items()}
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init != "gaussian":
        raise RecipeError(f"{label}: was trained beside weights that {init!r} changed: convert it to a plain LoRA")
    return {
        name: Update(
            found["A.weight"],
            found["B.weight"],
            found.get("magnitude_vector"),
            scale * _strength(settings, name, len(found["A.weight"])),
        )
        for name, found in parts.items()
    }


def _layers(module: nn.Module) -> Mapping[str, nn.Module]:
    """Linear layers and convolutions, grouped ones aside, whose updates peft does not merge."""
    from torch import nn

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    found = {name: each for name, each in module.named_modules() if isinstance(each, kinds)}
    return {name: each for name, each in found.items() if getattr(each, "groups", 1) == 1}


def _fitting(keys: Iterable[str], prefix: str, layers: Mapping[str, nn.Module]) -> Mapping[str, tuple[str, str]]:
    """Module and part by key, of the keys that name a layer behind the prefix."""
    found = {key: KEY.fullmatch(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}
    return {key: (m["module"], m["part"]) for key, m in found.items() if m is not None and m["module"] in layers}


def _misfit(name: str, found: Mapping[str, torch.Tensor], layer: nn.Module) -> str | None:
    """What is wrong with the tensors of one layer."""
    a, b, magnitude = found.get("A.weight"), found.get("B.weight"), found.get("magnitude_vector")
    if a is None or b is None:
        return f"{name} has no {'A' if a is None else 'B'}"
    shape = tuple(layer.get_parameter("weight").shape)
    rank = a.numel() // math.prod(shape[1:])
    if rank == 0 or a.shape != (rank, *shape[1:]) or b.shape != (shape[0], rank, *(1 for _ in shape[2:])):
        return f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {name}, whose weight is {shape}"
    if magnitude is not None and magnitude.numel() != shape[0]:
        return f"{magnitude.numel()} magnitudes do not fit {name}, whose weight is {shape}"
    return None


def _strength(settings: Mapping[str, Any], name: str, rank: int) -> float:  # JSON
    """alpha / r, or alpha / sqrt(r) where the adapter is scaled by its rank's root."""
    from peft.utils.other import get_pattern_key

    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, name), settings.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _fuse_alike_(module: nn.Module, updates: Mapping[str, Update], label: str) -> int:
    """Fuses updates of one rank, strength and kind; how many weights changed."""
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
    # empty at first: nothing is drawn from torch's global generator
    inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=True, state_dict=tensors)
    set_peft_model_state_dict(module, tensors, ADAPTER, low_cpu_mem_usage=True)
    changed = 0
    for name, update in updates.items():
        adapted: Any = module.get_submodule(name)  # a layer of peft
        layer = adapted.get_base_layer()
        before = layer.weight.detach().clone()
        adapted.merge()
        module.set_submodule(name, layer)
        _check(before, layer.weight.detach(), update, f"{label}: {name}")
        changed += not before.equal(layer.weight)
    del module.peft_config
    return changed


def _check(before: torch.Tensor, after: torch.Tensor, update: Update, place: str) -> None:
    """Raises RecipeError where a weight is not finite, StepFailed where it is not what the update makes of it."""
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
            f"{place}: peft's fused weight is {off_NK.max():.3g} off W + {update.strength:g} B A,"
            f" whose largest is {expected_NK.abs().max():.3g}"
        )


def _some(names: Iterable[str]) -> str:
    """Up to three of them."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
