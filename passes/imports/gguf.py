"""Read GGUF weights exactly: Q4_0 as 4-bit codes and Q8_0 as 8-bit codes, both in blocks of 32.

Weights of Q8_0 can also be rounded again, for targets that need one scale for each output channel.

Shapes: N out features, K in features, G = K / 32 scales in each row.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.passes.imports.gguf_file import BLOCKS, GgufTensor, read_gguf_file
from intaglio.passes.imports.imported import NotCarried, as_float32, some
from intaglio.passes.imports.names import WEIGHT, Stored, denoiser_only, in_names_of
from intaglio.passes.imports.saved_weights import SavedWeights, Weight, checked
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.schemes import W8A16, RoundedWeight

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.formats.layer import Layer

SUFFIX = ".gguf"
BLOCK = 32
AGAIN = "Q8_0"
"""Type whose weights can be rounded again."""
BITS = {"Q4_0": 4, "Q8_0": 8}
"""Bits of a code, by type."""
NO_SCALE = 2.0**-14
"""Scale of a block of zeros: the smallest normal number of float16."""


def read_gguf(file: Path, module: nn.Module, requantize: bool) -> SavedWeights:
    """Read weights of a GGUF file. Raises RecipeError for types that are not read, and for names of other models.

    `requantize`: round weights of Q8_0 again, to one scale for each output channel.
    """
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    weights: dict[str, Stored] = {}
    rest: dict[str, torch.Tensor] = {}
    other: dict[str, list[str]] = defaultdict(list)
    for name, tensor in denoiser_only(read_gguf_file(file)).items():
        if tensor.content is None:
            other[f"{tensor.kind}: only {', '.join(BLOCKS)} are read: save the weights as Q4_0 or Q8_0"].append(name)
        elif tensor.kind in dtypes:
            rest[name] = tensor.content.view(dtypes[tensor.kind]).reshape(tensor.shape)
        elif len(tensor.shape) != 2 or not name.endswith(WEIGHT):
            other[f"{tensor.kind} in the shape {tensor.shape}: only weights of linear layers are read"].append(name)
        else:
            weights[name.removesuffix(WEIGHT)] = _stored(tensor)
    if other:
        raise RecipeError(*(f"{some(names)}: {reason}" for reason, names in other.items()))
    found, rest = in_names_of(module, weights, rest)
    again = [name for name, stored in found.items() if stored.facts == AGAIN]
    remarks = [f"codes of {len(again)} layers in {AGAIN} are rounded again, to one scale for each output channel"]
    return SavedWeights(
        "GGUF",
        {name: partial(_weight, stored, requantize) for name, stored in found.items()},
        rest,
        remarks=tuple(remarks) if again and requantize else (),
    )


def _stored(tensor: GgufTensor) -> Stored:
    assert tensor.content is not None  # its type is read
    return Stored({"blocks": tensor.content}, tensor.kind)


def _weight(stored: Stored, requantize: bool, layer: Layer) -> Weight:
    """Return a layer's codes and scales; with `requantize`, round weights of Q8_0 to one scale for each channel.

    Raises NotCarried for a weight of another shape, and for codes and scales that have no exact form.
    """
    kind, blocks = stored.facts, stored.rows["blocks"]
    if layer.k % BLOCK or tuple(blocks.shape) != (layer.n, layer.k // BLOCK * BLOCKS[kind][1]):
        values = blocks.shape[1] // BLOCKS[kind][1] * BLOCK
        raise NotCarried(f"a weight {(len(blocks), values)} in {kind}, but the model has one of {layer.shape}")
    blocks = blocks.reshape(layer.n, layer.k // BLOCK, -1)
    scale_NG = as_float32("scales", blocks[..., :2].contiguous().view(_half()).squeeze(-1))
    codes_NGS = _codes(kind, blocks[..., 2:])
    if kind != AGAIN or not requantize:
        return _in_blocks(BITS[kind], codes_NGS, scale_NG)
    form = W8A16.weight
    assert isinstance(form, RoundedWeight)
    w_NK = (codes_NGS * scale_NG.unsqueeze(-1)).flatten(1)
    scale_N1, _ = form.fit(w_NK)
    return checked(layer, 8, form.quantize(w_NK, scale_N1), scale_N1, None, None)


def _in_blocks(bits: int, codes_NGS: torch.Tensor, scale_NG: torch.Tensor) -> Weight:
    """Return codes and scales as they are; a block whose scale is 0 gets codes of 0 and the scale NO_SCALE.

    Scales may be negative: ggml gives the 4-bit code -8 to the weight of largest magnitude.
    """
    zero_NG = scale_NG == 0
    codes_NGS = codes_NGS.masked_fill(zero_NG.unsqueeze(-1), 0)
    return Weight(bits, codes_NGS.flatten(1), scale_NG.masked_fill(zero_NG, NO_SCALE), None)


def _half() -> torch.dtype:
    import torch

    return torch.float16


def _codes(kind: str, packed: torch.Tensor) -> torch.Tensor:
    """Return the codes (N, G, 32) int8.

    In Q4_0, the low halves of a block's bytes are its first 16 codes, the high halves the other 16, each plus 8.
    """
    import torch

    if kind == AGAIN:
        return packed.contiguous().view(torch.int8)
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8
