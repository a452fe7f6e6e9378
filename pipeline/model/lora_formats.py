"""Convert the names in LoRA files to those of the model's layers, and refuse other kinds of adapters by name."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, printable

if TYPE_CHECKING:
    import torch
    from torch import nn

LONGEST_NAME = 120
"""Largest number of characters of a name that a message prints."""
PREFIXES = ("", "transformer.", "unet.", "diffusion_model.")
"""Prefixes that diffusers and ComfyUI write before the names of a denoiser's modules."""
KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector|alpha)")
KOHYA = re.compile(
    r"(lora_unet|lora_transformer|lycoris)_(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)"
)
"""Names that kohya's trainer gives to layers, with underscores for dots."""
KOHYA_PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
OTHER_KINDS = {
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"lora_mid(\.weight)?": "LoCon with a core tensor (Tucker or CP)",
    r"(oft|boft)_\w+(\.weight)?": "OFT",
    r"on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"diff(_b)?|w_norm|b_norm": "full differences of weights",
}
"""Ends of names that belong to adapters of other kinds."""
UP = re.compile(r"[._]lora([._]up|_B)(\.default)?(\.weight)?$")
"""End of the name of the matrix B, whose rows are the layer's out features."""
PART = re.compile(r"(\.alpha|\.dora_scale|[._]lora[._]\w+(\.\w+)*)$")
"""End of the name of any tensor of one layer."""
LARGE = re.compile(r"\d{5}")
"""Number in a name that is too large: a loader would count up to it, block by block."""
ALPHA = re.compile(r"(\.lora_A\.weight)?\.alpha")


def refuse_other_kinds(keys: Sequence[str], label: str) -> None:
    """Raise RecipeError if keys belong to adapters whose update is no product of two matrices."""
    found: Counter[str] = Counter()
    ends: dict[str, str] = {}
    for key in keys:
        for pattern, kind in OTHER_KINDS.items():
            if (end := re.search(rf"\.({pattern})$", key)) is not None:
                found[kind] += 1
                ends.setdefault(kind, end[1])
    if found:
        kind, count = found.most_common(1)[0]
        raise RecipeError(
            f"{label}: {count} of {len(keys)} keys belong to {kind} ({ends[kind]}), and only LoRA is fused here: merge"
            " the adapter into the model with the tool that trained it, such as LyCORIS, write the model with"
            " save_pretrained, and name that folder as model.path"
        )


def canonical(keys: Sequence[str], layers: Collection[str], label: str) -> Mapping[str, str]:
    """Return the keys of the file under the names that peft uses.

    Raises RecipeError, which begins with `label`, if two keys become the same name.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    flat = {name.replace(".", "_"): name for name in layers}
    named: dict[str, str] = {}
    for key in keys:
        kohya = KOHYA.fullmatch(key)
        known = kohya is not None and kohya["module"] in flat
        name = f"{flat[kohya['module']]}.{KOHYA_PARTS[kohya['part']]}" if kohya is not None and known else key
        for each in convert_unet_state_dict_to_peft({name: key}):  # UNets may be spelt `to_q.lora.down`
            if each in named:
                raise RecipeError(
                    f"{label}: {printable(named[each])[:LONGEST_NAME]} and {printable(key)[:LONGEST_NAME]} are the same"
                    " weight under two names: remove one of them"
                )
            named[each] = key
    return named


def fitting(keys: Collection[str], layers: Collection[str]) -> tuple[str, Mapping[str, tuple[str, str]]]:
    """Return the prefix with which most keys name a layer, and the layer and the part of each key that does."""
    every = {prefix: _fitting(keys, prefix, layers) for prefix in PREFIXES}
    best = max(PREFIXES, key=lambda prefix: len(every[prefix]))
    return best, every[best]


def _fitting(keys: Collection[str], prefix: str, layers: Collection[str]) -> Mapping[str, tuple[str, str]]:
    found = {key: KEY.fullmatch(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}
    return {
        key: (m["module"], m["part"].removeprefix("lora_"))
        for key, m in found.items()
        if m is not None and m["module"] in layers
    }


def converted(
    tensors: Mapping[str, torch.Tensor], module: nn.Module, layers: Collection[str]
) -> dict[str, torch.Tensor] | None:
    """Return the tensors as a LoRA loader of diffusers converts them, if all its names fit the layers; else None.

    The loaders know the layouts of other trainers, such as kohya's for SDXL and Flux.
    """
    if any(LARGE.search(key) for key in tensors):
        return None
    for state in _conversions(tensors, module):
        if state and len(fitting(state.keys(), layers)[1]) == len(state) and _is_complete(tensors, state):
            return state
    return None


def _is_complete(given: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor]) -> bool:
    """Return True if no layer is lost: loaders leave out layers that they do not know, with no more than a warning.

    A fused layer becomes several layers, whose out features have the same sum.
    """
    rows = [sum(len(v) for key, v in tensors.items() if UP.search(key)) for tensors in (given, made)]
    layers = {UP.sub("", key) for key in given if UP.search(key)}
    others = [key for key in given if PART.sub("", key) not in layers]
    return rows[0] == rows[1] and not others and any("dora" in k for k in given) == any("magnitude" in k for k in made)


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers from printing names of tensors: the file may be from an untrusted source."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _conversions(tensors: Mapping[str, torch.Tensor], module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors as each LoRA loader of diffusers converts them, with each layer's alpha as a tensor."""
    import torch
    from diffusers.loaders import lora_pipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    loaders: list[Any] = [
        kind for kind in vars(lora_pipeline).values() if inspect.isclass(kind) and "lora_state_dict" in vars(kind)
    ]
    for loader in loaders:
        try:
            with quiet_diffusers():
                made: Any = loader.lora_state_dict(
                    dict(tensors), unet_config=getattr(module, "config", None), return_alphas=True
                )
        except (*DAMAGE, AssertionError, NameError, RuntimeError):  # the loader is for another layout
            continue
        state, alphas = (made[0], made[1] or {}) if isinstance(made, tuple) else (made, {})
        values = {
            ALPHA.sub(".alpha", key): torch.as_tensor(v) for key, v in convert_unet_state_dict_to_peft(alphas).items()
        }
        yield convert_unet_state_dict_to_peft(state) | values
