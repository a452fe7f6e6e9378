"""Reads what compressed-tensors and llm-compressor write: `quantization_config` in config.json, and its tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ValidationError

from intaglio.passes._imported import Entering, NotCarried
from intaglio.passes._saved_weights import SavedWeights, Weight, by_token, check_symmetric, checked, static
from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.plan import Layer

METHOD = "compressed-tensors"
PARTS = re.compile(
    r"weight_(packed|scale|shape|zero_point|g_idx|global_scale)|(input|output)_(scale|zero_point|global_scale)"
)


class _Args(BaseModel):
    """How a weight, an input or an output is rounded."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str = False

    @property
    def form(self) -> str:
        """As messages name it."""
        return f"{self.type}{self.num_bits} by {self.strategy}"


class _Group(BaseModel):
    targets: tuple[str, ...]
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: _Args | None = None


class _Config(BaseModel):
    quant_method: Literal["compressed-tensors"]
    config_groups: Mapping[str, _Group]
    version: str = ""
    kv_cache_scheme: Mapping[str, object] | None = None
    transform_config: Mapping[str, object] | None = None


def read_compressed_tensors(
    tensors: Mapping[str, torch.Tensor], written: Mapping[str, object], module: nn.Module
) -> SavedWeights:
    """`written`: the `quantization_config`; `module`: the model, of which targets name modules and classes."""
    try:
        config = _Config.model_validate(written)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise RecipeError(f"config.json: its quantization_config is none of {METHOD}: {'; '.join(wrong)}") from error
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if PARTS.fullmatch(part):
            parts[name][part] = value
    for name, found in parts.items():
        if f"{name}.weight" in tensors:
            found["weight"] = tensors[f"{name}.weight"]
    held = {f"{name}.{part}" for name, found in parts.items() for part in found}
    problems = []
    if config.transform_config:
        problems.append("transform_config: its rotations are not carried over")
    if config.kv_cache_scheme:
        problems.append("kv_cache_scheme: attention stays in float here")
    return SavedWeights(
        f"{METHOD} {config.version}",
        {name: partial(_weight, found, config, module) for name, found in parts.items()},
        {key: value for key, value in tensors.items() if key not in held},
        tuple(problems),
    )


def _weight(parts: Mapping[str, torch.Tensor], config: _Config, module: nn.Module, layer: Layer) -> Weight:
    group = _group_of(layer.name, module.get_submodule(layer.name), config.config_groups.values())
    args = None if group is None else group.weights
    if group is None or args is None:
        raise NotCarried("it has scales, and no group of config_groups rounds its weight")
    if group.output_activations is not None:
        raise NotCarried(f"outputs in {group.output_activations.form}: outputs stay in float here")
    if args.type != "int" or args.num_bits not in (4, 8):
        raise NotCarried(f"weights in {args.form}: only integers of 4 or 8 bits")
    if args.strategy not in ("tensor", "channel", "group"):
        raise NotCarried(f"weights in {args.form}: only with scales by tensor, channel or group")
    if "weight_g_idx" in parts:
        raise NotCarried("weight_g_idx: groups of input features in another order (actorder) are no neighbours")
    if not args.symmetric:
        raise NotCarried(f"weights in {args.form} with zero points: here a code of 0 is 0 (symmetric)")
    check_symmetric(parts.get("weight_zero_point"), "weights")
    if "weight_packed" in parts:
        codes = _unpacked(parts["weight_packed"], args.num_bits, layer.k)
    elif "weight" in parts and parts["weight"].dtype.itemsize == 1 and not parts["weight"].dtype.is_floating_point:
        codes = parts["weight"]
    else:
        raise NotCarried("its weight is not compressed: save it behind ModelCompressor.compress_model")
    scale = parts.get("weight_scale")
    if scale is None:
        raise NotCarried("no weight_scale")
    return checked(layer, args.num_bits, codes, scale, _entering(group.input_activations, parts))


def _entering(args: _Args | None, parts: Mapping[str, torch.Tensor]) -> Entering | None:
    """Inputs by token round as engines for these files do it, whatever the axes in front."""
    if args is None:
        return None
    if args.type != "int":
        raise NotCarried(f"inputs in {args.form}: only integers of 4 or 8 bits")
    if not args.symmetric:
        raise NotCarried(f"inputs in {args.form} with zero points: here a code of 0 is 0 (symmetric)")
    check_symmetric(parts.get("input_zero_point"), "inputs")
    match args.dynamic, args.strategy:
        case True, "token":
            return by_token(args.num_bits)
        case False, "tensor":
            return static(args.num_bits, parts.get("input_scale"))
    how = "dynamic" if args.dynamic else "static"
    raise NotCarried(f"{how} inputs in {args.form}: only dynamic ones by token, and static ones by tensor")


def _group_of(name: str, layer: nn.Module, groups: Iterable[_Group]) -> _Group | None:
    """The one that aims best: at the name, by a pattern of names, or at the class."""
    classes = {each.__name__ for each in type(layer).__mro__}

    def aims(target: str) -> int:
        if target == name:
            return 3
        if target.startswith("re:"):
            return 2 if re.match(target.removeprefix("re:"), name) else 0
        return 1 if target in classes else 0

    best, found = max(((max(map(aims, g.targets), default=0), g) for g in groups), key=lambda each: each[0])
    return found if best else None


def _unpacked(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """int32 (N, K * bits / 32) -> codes (N, K): in a word the first is lowest, each more by half of the range."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8).flatten(1)[:, :k].contiguous()
