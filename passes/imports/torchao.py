"""Read what torchao writes to safetensors: tensors in parts, and metadata that says which parts make a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from intaglio.passes.imports.imported import ImportedInput, NotCarried, shown
from intaglio.passes.imports.saved_weights import SavedWeights, Weight, by_token, check_symmetric, checked, static
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, parse_json, printable

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.formats.layer import Layer

NAMES = "tensor_names"
"""Metadata key of the list of tensors, whole or in parts. Each tensor has facts under its own name."""


def read_torchao(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> SavedWeights:
    """Read weights of torchao. Raises RecipeError for metadata of another tool."""
    weights, problems = {}, []
    held: set[str] = set()
    try:
        for name in dict.fromkeys(_said(metadata, NAMES)):
            facts = _said(metadata, name)
            if facts["_type"] == "Tensor":
                continue
            module, _, parameter = name.rpartition(".")
            names = {part: f"{module}._{parameter}_{part}" for part in facts["_tensor_data_names"]}
            held.update(names.values())
            if parameter != "weight":
                problems.append(f"{printable(name)[:120]}: is quantized, but only weights can be imported")
                continue
            if name in tensors:
                problems.append(f"{printable(name)[:120]}: is stored twice, whole and in parts")
            parts = {part: tensors[key] for part, key in names.items()}
            weights[module] = partial(_weight, facts["_type"], facts["_data"], parts)
    except DAMAGE as error:
        said = printable(f"{type(error).__name__}: {str(error)[:200]}")
        raise RecipeError(f"its metadata is not torchao's, or tensors are missing: {said}") from error
    rest = {key: value for key, value in tensors.items() if key not in held}
    return SavedWeights("torchao", weights, rest, tuple(problems))


def _said(metadata: Mapping[str, str], name: str) -> Any:
    """Return the content of the JSON text that the metadata has under a name."""
    return parse_json(metadata[name], source=f"its metadata of {printable(name)[:120]}")


def _weight(kind: object, facts: Mapping[str, Any], parts: Mapping[str, torch.Tensor], layer: Layer) -> Weight:
    try:
        match kind:
            case "Int8Tensor":
                bits, entering = 8, _entering(facts.get("act_quant_kwargs"), parts)
            case "IntxUnpackedToInt8Tensor":
                bits, entering = int(facts["target_dtype"]["_data"].removeprefix("int")), None
                if facts["activation_quantization"] is not None:
                    raise NotCarried(
                        "inputs by token with zero points: only symmetric codes, without zero points, can be imported"
                    )
            case _:
                kinds = "only Int8Tensor and IntxUnpackedToInt8Tensor hold plain symmetric codes"
                raise NotCarried(f"a {printable(kind)[:60] if isinstance(kind, str) else shown(kind)}: {kinds}")
        rows, block = facts["block_size"]
        codes, scale = parts["qdata"], parts["scale"]
        if not 1 <= bits <= 8:
            raise NotCarried(f"codes of {shown(bits)} bits")
        if type(block) is not int or rows != (layer.n if scale.numel() == 1 and layer.n > 1 else 1):
            raise NotCarried(f"blocks {shown(facts['block_size'])} with scales {tuple(scale.shape)}")
    except DAMAGE as error:
        raise NotCarried(f"facts that torchao does not write: {printable(repr(error))[:200]}") from error
    if "act_pre_scale" in parts:
        raise NotCarried("act_pre_scale: factors on the input of a layer cannot be imported")
    check_symmetric(parts.get("zero_point"), scale, "weights")
    return checked(layer, bits, codes, scale, block, entering)


def _entering(kwargs: Mapping[str, Any] | None, parts: Mapping[str, torch.Tensor]) -> ImportedInput | None:
    if kwargs is None:
        return None
    facts = kwargs["_data"]
    granularity, mapping = facts["granularity"]["_type"], facts["mapping_type"]["_data"]
    if mapping != "SYMMETRIC":
        raise NotCarried(f"inputs mapped {printable(mapping)[:60]}: only SYMMETRIC codes can be imported")
    if facts.get("reduce_range"):
        raise NotCarried("inputs of 7 bits (reduce_range): only of 4 or 8")
    check_symmetric(parts.get("act_quant_zero_point"), parts.get("act_quant_scale"), "inputs")
    match granularity, "act_quant_scale" in parts:
        case "PerRow", False:
            return by_token(8)
        case "PerTensor", True:
            return static(8, parts["act_quant_scale"])
    how = "static" if "act_quant_scale" in parts else "dynamic"
    raise NotCarried(f"{how} inputs {printable(granularity)[:60]}: only dynamic ones PerRow, and static ones PerTensor")
