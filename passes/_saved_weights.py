"""What files of quantized weights hold, whatever library wrote them.

Shapes: N out features, K in features, G scales a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from intaglio.passes._imported import Entering, NotCarried
from intaglio.pipeline.quant.spec import IntInput, PerStep, PerToken

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.plan import Layer


@dataclass(frozen=True)
class Weight:
    """One layer's codes (N, K) int8, scales (N, G) float32, and how its input is rounded, None where it is not."""

    bits: int
    codes: torch.Tensor
    scale_NG: torch.Tensor
    entering: Entering | None


@dataclass(frozen=True)
class SavedWeights:
    """What one library wrote: `weights` by module, read when called, which raises NotCarried; `rest` are other tensors.

    `problems` are those of the whole.
    """

    origin: str
    weights: Mapping[str, Callable[[Layer], Weight]]
    rest: Mapping[str, torch.Tensor]
    problems: tuple[str, ...] = ()


def checked(layer: Layer, bits: int, codes: torch.Tensor, scale: torch.Tensor, entering: Entering | None) -> Weight:
    """Scales of one number, (N, 1) or (N, G). Raises NotCarried for shapes that are not the layer's, and odd scales."""
    if tuple(codes.shape) != (layer.n, layer.k):
        raise NotCarried(f"codes {tuple(codes.shape)} for a weight {layer.shape}")
    scale = scale.float()
    scale_NG = scale.reshape(1, 1).expand(layer.n, 1) if scale.numel() == 1 else scale
    if scale_NG.dim() != 2 or len(scale_NG) != layer.n or layer.k % scale_NG.shape[1]:
        raise NotCarried(
            f"scales {tuple(scale.shape)} for a weight {layer.shape}: one, or the same number for each row"
        )
    if not (scale_NG.isfinite() & (scale_NG > 0)).all():
        raise NotCarried("scales that are not finite, or not above zero")
    return Weight(bits, codes, scale_NG, entering)


def check_symmetric(zero_point: torch.Tensor | None, what: str) -> None:
    """Raises NotCarried where a zero point is another than zero."""
    if zero_point is not None and zero_point.count_nonzero():
        raise NotCarried(f"{what} with zero points: here a code of 0 is 0 (symmetric)")


def by_token(bits: int) -> Entering:
    """An input that each token's max|x| / 127.5 scales: of b bits (2^b - 1) / 2."""
    import torch

    width = _width(bits)
    factor = _high(width) / ((2**bits - 1) / 2)
    return Entering(IntInput(bits=width, granularity=PerToken()), factor_T=torch.tensor([factor]))


def static(bits: int, scale: torch.Tensor | None) -> Entering:
    """An input with one scale at every step."""
    if scale is None or scale.numel() != 1:
        raise NotCarried(f"static input scales {None if scale is None else tuple(scale.shape)}: only one")
    width = _width(bits)
    return Entering(IntInput(bits=width, granularity=PerStep()), scale.float().reshape(1) * _high(width))


def _width(bits: int) -> Literal[4, 8]:
    match bits:
        case 4 | 8:
            return bits
    raise NotCarried(f"inputs of {bits} bits: only of 4 or 8")


def _high(bits: int) -> int:
    from intaglio.pipeline.quant.affine import INPUT_HIGH

    return INPUT_HIGH[bits]
