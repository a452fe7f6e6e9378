"""Define the content of files of quantized weights, for every library.

Shapes: N out features, K in features, G scales per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from intaglio.passes.imports.imported import ImportedInput, NotCarried, as_float32, dtype_name, shown
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import IntInput, PerStep, PerToken

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.numerics.basis import Balance


@dataclass(frozen=True)
class Weight:
    """Codes (N, K) int8 of one layer, scales (N, G) float32, and how its input is rounded, None if it is not.

    The codes are in the basis of `balance`, if there is one.
    """

    bits: int
    codes: torch.Tensor
    scale_NG: torch.Tensor
    entering: ImportedInput | None
    balance: Balance | None = None


@dataclass(frozen=True)
class SavedWeights:
    """Content of one library's files: `weights` by module, read on call, which may raise NotCarried; `rest`, unchanged.

    `problems` are those of the files as a whole; `remarks` are for the log.
    """

    origin: str
    weights: Mapping[str, Callable[[Layer], Weight]]
    rest: Mapping[str, torch.Tensor]
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def checked(
    layer: Layer, bits: int, codes: torch.Tensor, scale: torch.Tensor, block: int | None, entering: ImportedInput | None
) -> Weight:
    """Return codes and scales; the scales have the shape (N, 1) or (N, G).

    `block`: input features that share a scale, as the file says; None where it does not. Raises NotCarried for types,
    shapes, blocks and codes that are not the layer's, and for scales that are not above zero or whose products with
    codes are not finite.
    """
    import torch

    if codes.dtype != torch.int8:
        raise NotCarried(f"codes in {dtype_name(codes)}: only int8")
    if tuple(codes.shape) != (layer.n, layer.k):
        raise NotCarried(f"codes {tuple(codes.shape)} for a weight {layer.shape}")
    shape = tuple(scale.shape)
    count = 1 if scale.numel() == 1 else shape[-1] if shape else 0
    if scale.numel() != 1 and (len(shape) != 2 or shape[0] != layer.n or not count or layer.k % count):
        raise NotCarried(f"scales {shape} for a weight {layer.shape}: one, or the same number for each row")
    if block is not None and block * count != layer.k:
        raise NotCarried(f"scales {shape} for a weight {layer.shape}, but blocks of {shown(block)}")
    scale_NG = as_float32("scales", scale).reshape(-1, count).expand(layer.n, count)
    if not (scale_NG > 0).all():
        raise NotCarried("scales that are not above zero")
    _check_products(scale_NG, 2 ** (bits - 1), "scales")
    low, high = int(codes.amin()), int(codes.amax())
    if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
        raise NotCarried(f"codes from {low} to {high}, which are not of {bits} bits")
    return Weight(bits, codes, scale_NG, entering)


def check_symmetric(zero_point: torch.Tensor | None, scale: torch.Tensor | None, what: str) -> None:
    """Raise NotCarried if a zero point is not zero, or if the number of zero points differs from that of scales."""
    if zero_point is None:
        return
    counts = {1} | ({scale.numel()} if scale is not None else set())
    if zero_point.numel() not in counts or zero_point.is_complex():
        raise NotCarried(
            f"zero points {tuple(zero_point.shape)} of its {what} in {dtype_name(zero_point)}:"
            " one for each scale is expected"
        )
    if zero_point.float().count_nonzero():  # NaN counts as nonzero
        raise NotCarried(f"{what} with zero points: only symmetric codes, without zero points, can be imported")


def by_token(bits: int) -> ImportedInput:
    """Return an input scaled by each token's max|x| / ((2^b - 1) / 2), which is 127.5 for 8 bits."""
    import torch

    width = _width(bits)
    factor = _high(width) / ((2**bits - 1) / 2)
    return ImportedInput(IntInput(bits=width, granularity=PerToken()), LayerTables(factor_T=torch.tensor([factor])))


def static(bits: int, scale: torch.Tensor | None) -> ImportedInput:
    """Return an input with one scale at every step."""
    if scale is None or scale.numel() != 1:
        raise NotCarried(f"static input scales {None if scale is None else tuple(scale.shape)}: only one")
    width, found = _width(bits), as_float32("an input scale", scale).reshape(1)
    if found.item() <= 0:
        raise NotCarried(f"an input scale of {found.item():g}: it has to be above zero")
    _check_products(found, _high(width), "an input scale")
    return ImportedInput(IntInput(bits=width, granularity=PerStep()), LayerTables(found * _high(width)))


def _check_products(scale: torch.Tensor, code: int, what: str) -> None:
    """Raise NotCarried if a scale times the largest code is beyond the range of float32."""
    if not (scale * code).isfinite().all():
        raise NotCarried(f"{what} of {float(scale.max()):g}: {code} times it is more than float32 holds")


def _width(bits: int) -> Literal[4, 8]:
    match bits:
        case 4 | 8:
            return bits
    raise NotCarried(f"inputs of {shown(bits)} bits: only of 4 or 8")


def _high(bits: int) -> int:
    from intaglio.pipeline.numerics.rounding import INPUT_HIGH

    return INPUT_HIGH[bits]
