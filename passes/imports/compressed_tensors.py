"""Read what compressed-tensors and llm-compressor write: `quantization_config` in config.json, and its tensors."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from intaglio.passes.imports.imported import ImportedInput, NotCarried, dtype_name, shown
from intaglio.passes.imports.names import WEIGHT
from intaglio.passes.imports.saved_weights import SavedWeights, Weight, by_token, check_symmetric, checked, static
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.formats.layer import Layer

METHOD = "compressed-tensors"
PARTS = re.compile(
    r"weight_(packed|scale|shape|zero_point|g_idx|global_scale)|(input|output)_(scale|zero_point|global_scale)"
)
READ = {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
"""Parts of a weight that are read."""
FORMATS = ("int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense")
"""Layouts of the codes that are read."""
SECONDS = 1.0
"""CPU seconds for all patterns of names together: a hostile pattern can match forever."""
MOST_PATTERN = 1000
"""Largest number of characters in one pattern."""


class _Args(BaseModel):
    """Arguments that say how a weight, an input or an output is rounded."""

    model_config = ConfigDict(strict=True)

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False

    @property
    def form(self) -> str:
        """Name of the form in messages."""
        return f"{printable(self.type)[:20]}{shown(self.num_bits)} by {printable(self.strategy)[:20]}"


class _Group(BaseModel):
    model_config = ConfigDict(strict=True)

    targets: list[str]
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: _Args | None = None
    format: str | None = None


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)

    config_groups: dict[str, _Group]
    ignore: list[str] | None = None
    version: str = ""
    format: str | None = None
    sparsity_config: dict[str, object] | None = None
    kv_cache_scheme: dict[str, object] | None = None
    transform_config: dict[str, object] | None = None


def read_compressed_tensors(
    tensors: Mapping[str, torch.Tensor], written: Mapping[str, object], module: nn.Module
) -> SavedWeights:
    """Read weights of compressed-tensors.

    `written`: the `quantization_config`; `module`: the model whose modules and classes the targets name.
    """
    try:
        config = _Config.model_validate(written)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)[:3])
        said = printable("; ".join(wrong))[:300]
        raise RecipeError(f"config.json: its quantization_config is not one of {METHOD}: {said}") from error
    groups = _Groups(config.config_groups.values(), config.ignore or ())
    parts = _parts(tensors, groups, module)
    held = {f"{name}.{part}" for name, found in parts.items() for part in found}
    problems = []
    if config.transform_config:
        problems.append("transform_config: its rotations are not carried over")
    if config.kv_cache_scheme:
        problems.append("kv_cache_scheme: attention stays in float here")
    if (layout := (config.sparsity_config or {}).get("format", "dense")) != "dense":
        problems.append(f"sparsity_config: {shown(layout)} leaves out weights that are zero, which is not read")
    layouts = {config.format, *(group.format for group in config.config_groups.values())} - {None, *FORMATS}
    problems += [f"format: {shown(layout)} packs codes in another way" for layout in sorted(map(str, layouts))]
    return SavedWeights(
        f"{METHOD} {printable(config.version)[:20]}",
        {name: partial(_weight, found, groups, module) for name, found in parts.items()},
        {key: value for key, value in tensors.items() if key not in held},
        tuple(problems),
    )


def _parts(
    tensors: Mapping[str, torch.Tensor], groups: _Groups, module: nn.Module
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each quantized layer; of one that groups aim at and that has no scales, the weight alone.

    `_weight` refuses the latter.
    """
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if PARTS.fullmatch(part):
            parts[name][part] = value
    modules = dict(module.named_modules())
    weights = {key.removesuffix(WEIGHT): value for key, value in tensors.items() if key.endswith(WEIGHT)}
    for name, value in weights.items():
        alone = name not in parts and value.dim() > 1 and name in modules
        if name in parts or (alone and groups.aimed_at(name, modules[name]) is not None):
            parts[name]["weight"] = value
    return parts


def _weight(parts: Mapping[str, torch.Tensor], groups: _Groups, module: nn.Module, layer: Layer) -> Weight:
    group = groups.aimed_at(layer.name, module.get_submodule(layer.name))
    args = None if group is None else group.weights
    if group is None or args is None:
        raise NotCarried(
            "it has scales, and no group of config_groups rounds its weight, or `ignore` names it"
            if parts.keys() - {"weight"}
            else "config_groups rounds its input, but not its weight: only both, or the weight alone, can be imported"
        )
    if args.dynamic:
        raise NotCarried(f"weights in {args.form} whose scales are found when it is called (dynamic)")
    if group.output_activations is not None:
        raise NotCarried(f"outputs in {group.output_activations.form}: outputs stay in float here")
    if args.type != "int" or args.num_bits not in (4, 8):
        raise NotCarried(f"weights in {args.form}: only integers of 4 or 8 bits")
    if args.strategy not in ("tensor", "channel", "group"):
        raise NotCarried(f"weights in {args.form}: only with scales by tensor, channel or group")
    if "weight_g_idx" in parts:
        raise NotCarried(
            "weight_g_idx: with actorder the features of a group are not neighbours, which is not supported"
        )
    if not args.symmetric:
        raise NotCarried(
            f"weights in {args.form} with zero points: only symmetric codes, without zero points, can be imported"
        )
    scale = parts.get("weight_scale")
    if scale is None:
        raise NotCarried("config_groups rounds its weight, and the file has no weight_scale of it")
    check_symmetric(parts.get("weight_zero_point"), scale, "weights")
    entering = _entering(group.input_activations, parts)
    read = READ | ({"input_scale", "input_zero_point"} if group.input_activations is not None else set())
    if unread := sorted(parts.keys() - read):
        raise NotCarried(f"{', '.join(unread)}: intaglio does not use these tensors")
    block = layer.k if args.strategy != "group" else args.group_size
    return checked(layer, args.num_bits, _codes(parts, args.num_bits, layer), scale, block, entering)


def _codes(parts: Mapping[str, torch.Tensor], bits: int, layer: Layer) -> torch.Tensor:
    """Return codes (N, K). Raises NotCarried for a weight in float, and for shapes that are not the layer's."""
    import torch

    packed, plain, shape = parts.get("weight_packed"), parts.get("weight"), parts.get("weight_shape")
    if shape is not None:
        said = shape.tolist() if shape.numel() == 2 else None
        if shape.dtype not in (torch.int32, torch.int64) or said != [layer.n, layer.k]:
            raise NotCarried(f"weight_shape {said or dtype_name(shape)} for a weight {layer.shape}")
    if packed is not None and plain is not None:
        raise NotCarried("its weight is there twice, as weight and as weight_packed")
    if packed is not None:
        words = -(-layer.k * bits // 32)
        if packed.dtype != torch.int32 or tuple(packed.shape) != (layer.n, words):
            raise NotCarried(
                f"weight_packed {tuple(packed.shape)} in {dtype_name(packed)} for a weight {layer.shape}:"
                f" {bits}-bit codes take {(layer.n, words)} in int32"
            )
        return _unpacked(packed, bits, layer.k)
    if plain is None or dtype_name(plain).startswith(("float32", "float16", "bfloat16")):
        raise NotCarried("its weight is not compressed: save it after ModelCompressor.compress_model")
    return plain


def _entering(args: _Args | None, parts: Mapping[str, torch.Tensor]) -> ImportedInput | None:
    """Return how an input is rounded: a token's scale is max|x| / 127.5, as engines for these files compute it."""
    if args is None:
        return None
    if args.type != "int":
        raise NotCarried(f"inputs in {args.form}: only integers of 4 or 8 bits")
    if not args.symmetric:
        raise NotCarried(
            f"inputs in {args.form} with zero points: only symmetric codes, without zero points, can be imported"
        )
    scale = parts.get("input_scale")
    check_symmetric(parts.get("input_zero_point"), scale, "inputs")
    match args.dynamic, args.strategy:
        case True, "token" if scale is None:
            return by_token(args.num_bits)
        case False, "tensor":
            return static(args.num_bits, scale)
    how = f"dynamic ({printable(args.dynamic)[:20]})" if isinstance(args.dynamic, str) else "static"
    how = "dynamic" if args.dynamic is True else how
    raise NotCarried(f"{how} inputs in {args.form}: only dynamic ones by token, and static ones by tensor")


class _Groups:
    """Groups of layers, found by their targets: a name, a pattern of names, or a class. `ignore` has targets too."""

    def __init__(self, groups: Iterable[_Group], ignore: Collection[str] = ()) -> None:
        self.ignored = _Groups([_Group(targets=[*ignore])]) if ignore else None
        self.exact: dict[str, tuple[int, _Group]] = {}
        self.patterns: dict[str, _Group] = {}
        self.left = SECONDS
        for place, group in enumerate(groups):
            for target in group.targets:
                if target.startswith("re:"):
                    self.patterns.setdefault(target.removeprefix("re:"), group)
                else:
                    self.exact.setdefault(target, (place, group))

    def aimed_at(self, name: str, layer: nn.Module) -> _Group | None:
        """Return the group whose target fits a layer best: its name, then a pattern of it, then its class.

        Returns None for a layer that no group or that `ignore` aims at.
        """
        if self.ignored is not None and self.ignored.aimed_at(name, layer) is not None:
            return None
        if name in self.exact:
            return self.exact[name][1]
        for pattern, group in self.patterns.items():
            if self._matches(pattern, name):
                return group
        classes = [self.exact[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in self.exact]
        return min(classes, key=lambda found: found[0])[1] if classes else None

    def _matches(self, pattern: str, name: str) -> bool:
        """Return True if the name begins with the pattern. Raises RecipeError if it is no pattern or takes too long."""
        import regex

        where = f"config.json: the target {shown('re:' + pattern)}"
        # regex expands counted repeats: nested ones take unbounded memory
        if len(pattern) > MOST_PATTERN or pattern.count("{") > 1 or re.search(r"\{.*\d{3}", pattern):
            raise RecipeError(f"{where} is longer than {MOST_PATTERN} characters, or repeats more than is read")
        started = time.process_time()
        try:
            found = regex.match(pattern, name, timeout=max(self.left, 0.001))
        except (regex.error, RecursionError) as error:
            raise RecipeError(f"{where} is no pattern: {printable(error)[:200]}") from error
        except TimeoutError as error:
            raise RecipeError(f"{where} takes too long to be matched") from error
        self.left -= time.process_time() - started
        return found is not None


def _unpacked(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Unpack int32 (N, K * bits / 32) to codes (N, K); a word's lowest bits have its first code; each has an offset."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8).flatten(1)[:, :k].contiguous()
