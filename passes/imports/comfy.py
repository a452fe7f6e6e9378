"""Read ComfyUI's INT8 weights: codes, one scale for each row and, with ConvRot, a rotation of the input in blocks.

Shapes: N out features, K in features, B block size of the rotation, a power of four.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from intaglio.passes.imports.imported import ImportedInput, NotCarried, dtype_name, shown, some
from intaglio.passes.imports.names import Stored, denoiser_only, in_names_of
from intaglio.passes.imports.saved_weights import SavedWeights, Weight, checked
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import damaged_places, parse_json, printable
from intaglio.pipeline.formats.schemes import IntInput, PerToken

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.numerics.basis import Balance

MARK = ".comfy_quant"
"""End of the name of the tensor whose bytes are a JSON text that describes a layer's format."""
METADATA = "_quantization_metadata"
"""Metadata key that older files have instead: its value is one JSON text with the formats of all layers."""
FORMAT = "int8_tensorwise"
MOST_JSON = 64 << 10
"""Largest number of bytes of one layer's JSON text."""


class _Form(BaseModel):
    """Format of one layer, as ComfyUI writes it. All other keys are ignored: they say how the file was made."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    format: str
    convrot: bool = False
    convrot_groupsize: int = 256
    full_precision_matrix_mult: bool = False


class _Metadata(BaseModel):
    model_config = ConfigDict(strict=True)

    layers: dict[str, _Form]


def is_comfy(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Return True if the file describes the formats of its layers as ComfyUI does."""
    return METADATA in metadata or any(name.endswith(MARK) for name in tensors)


def read_comfy(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], module: nn.Module) -> SavedWeights:
    """Read weights that ComfyUI saved. Raises RecipeError for formats that are not read, and names of other models."""
    marks = _marks(metadata)
    twice = sorted(marks.keys() & tensors.keys())
    if other := [name for name in twice if _form(name, marks[name]) != _form(name, tensors[name])]:
        raise RecipeError(f"{some(other)}: describes another format than {METADATA} does: save the file again")
    tensors = denoiser_only({**tensors, **marks})
    forms = {name.removesuffix(MARK): _form(name, value) for name, value in tensors.items() if name.endswith(MARK)}
    weights, problems, held = {}, defaultdict(list), {f"{name}{MARK}" for name in forms}
    for name, form in forms.items():
        parts = {part: f"{name}.{part}" for part in ("weight", "weight_scale", "input_scale")}
        held |= set(parts.values())
        try:
            weights[name] = _stored(form, {part: tensors[key] for part, key in parts.items() if key in tensors})
        except NotCarried as reason:
            problems[str(reason)].append(name)
    if problems:
        raise RecipeError(*(f"{some(names)}: {reason}" for reason, names in problems.items()))
    found, rest = in_names_of(module, weights, {name: value for name, value in tensors.items() if name not in held})
    return SavedWeights("ComfyUI", {name: partial(_weight, stored) for name, stored in found.items()}, rest)


def _marks(metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the formats that the file's metadata holds, as the tensors that newer files have in their place."""
    import torch

    if METADATA not in metadata:
        return {}
    try:
        written = _Metadata.model_validate(parse_json(metadata[METADATA], source=METADATA))
    except ValidationError as error:
        raise RecipeError(f"{METADATA}: {damaged_places(error)}") from error
    texts = {f"{name}{MARK}": form.model_dump_json().encode() for name, form in written.layers.items()}
    return {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in texts.items()}


def _form(name: str, text: torch.Tensor) -> _Form:
    """Return the format that the bytes of a tensor describe. Raises RecipeError if they do not describe one."""
    import torch

    where = printable(name)[:120]
    if text.dtype != torch.uint8 or not 0 < text.numel() <= MOST_JSON:
        raise RecipeError(
            f"{where}: {text.numel()} values in {dtype_name(text)}, but 1 to {MOST_JSON} bytes of JSON are expected"
        )
    written = parse_json(bytes(text.flatten().tolist()).decode(errors="replace"), source=where)
    try:
        return _Form.model_validate(written)
    except ValidationError as error:
        raise RecipeError(f"{where}: {damaged_places(error)}") from error


def _stored(form: _Form, parts: Mapping[str, torch.Tensor]) -> Stored:
    """Return the rows of one weight. Raises NotCarried for formats other than INT8, and missing or unexpected parts."""
    import torch

    if form.format != FORMAT:
        raise NotCarried(
            f"weights in {printable(form.format)[:40]}: only {FORMAT} is read, whose codes are integers with one scale"
            " for each row"
        )
    codes, scale = parts.get("weight"), parts.get("weight_scale")
    if codes is None or scale is None:
        raise NotCarried(f"no {'weight' if codes is None else 'weight_scale'}")
    if "input_scale" in parts:
        raise NotCarried(f"an input_scale, which {FORMAT} does not have: it rounds inputs with a scale for each token")
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
        raise NotCarried(f"a weight {tuple(codes.shape)} in {dtype_name(codes)}: codes have to be (N, K) in int8")
    if scale.numel() not in (1, len(codes)):
        raise NotCarried(
            f"weight_scale {tuple(scale.shape)} for a weight {tuple(codes.shape)}: one scale, or one for each row, is"
            " expected"
        )
    scale_N1 = scale.reshape(-1, 1).expand(len(codes), 1)
    rotated = form.convrot_groupsize if form.convrot else 1
    return Stored({"codes": codes, "scale": scale_N1}, (rotated, form.full_precision_matrix_mult))


def _weight(stored: Stored, layer: Layer) -> Weight:
    """Return a layer's codes and scales in the basis of its rotation. Raises NotCarried if they do not fit."""
    (rotated, in_float), codes = stored.facts, stored.rows["codes"]
    entering = None if in_float else ImportedInput(IntInput(bits=8, granularity=PerToken()))
    if rotated == 1:
        return checked(layer, 8, codes, stored.rows["scale"], None, entering)
    if not _is_power_of_four(rotated) or layer.k % rotated:
        raise NotCarried(
            f"convrot_groupsize {shown(rotated)} for a weight {layer.shape}: it has to be a power of four that divides"
            f" the {layer.k} input features"
        )
    if tuple(codes.shape) == (layer.n, layer.k):
        codes = _in_basis(codes, rotated)
    weight = checked(layer, 8, codes, stored.rows["scale"], None, entering)
    return replace(weight, balance=balance_of(layer.k, rotated))


def _is_power_of_four(number: int) -> bool:
    return number >= 4 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


def balance_of(k: int, block: int) -> Balance:
    """Return the basis that ConvRot rotates into, up to the order and the signs of its channels.

    ConvRot multiplies blocks by the regular Hadamard matrix R / sqrt(B), where R is the Kronecker power of a matrix of
    four rows. R = D S Q, with Sylvester's matrix S, signs D on the diagonal, and Q a permutation with signs. Q is moved
    into the codes, so x R = (x D) S Q needs only x D S.
    """
    import torch

    from intaglio.pipeline.numerics.basis import Balance

    return Balance((_signs(block) / block**0.5).repeat(k // block).to(torch.float32), block)


def _in_basis(codes: torch.Tensor, block: int) -> torch.Tensor:
    """Return ConvRot's codes (N, K) in the basis of `balance_of`: W Q^T changes only their order and signs."""
    order, sign = _order(block)
    if int(codes.amin()) < -127:
        raise NotCarried("codes of -128, which have no negative in int8: the rotation changes signs of codes")
    return (codes.reshape(len(codes), -1, block)[..., order] * sign).reshape(codes.shape)


def _signs(block: int) -> torch.Tensor:
    """Return D, the signs before Sylvester's matrix, (B,)."""
    import torch

    signs = torch.ones(1)
    while len(signs) < block:
        signs = torch.kron(signs, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    return signs


@cache
def _order(block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each row of Q, the column of its only entry that is not zero, (B,), and its sign, (B,) int8."""
    import torch

    from intaglio.pipeline.numerics.basis import hadamard

    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    regular = torch.ones(1, 1)
    while len(regular) < block:
        regular = torch.kron(regular, four)
    q = hadamard(block) @ (_signs(block)[:, None] * regular) / block
    return q.abs().argmax(1), q.sum(1).to(torch.int8)
