"""Replace functions of torch that cannot be exported as they are called, such as for many rows, by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def padded(
    sequences: Sequence[torch.Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: Literal["left", "right"] = "right",
) -> torch.Tensor:
    """Return B sequences (T, ...) as one tensor (B, T, ...) or, without `batch_first`, (T, B, ...).

    Sequences that are shorter than the longest are padded, as `torch.nn.utils.rnn.pad_sequence` does it.
    """
    longest = max(each.shape[0] for each in sequences)

    def of_full_length(each: torch.Tensor) -> torch.Tensor:
        missing = longest - each.shape[0]
        if not missing:
            return each
        sides = [0, missing] if padding_side == "right" else [missing, 0]
        return functional.pad(each, [0, 0] * (each.dim() - 1) + sides, value=padding_value)

    return torch.stack([of_full_length(each) for each in sequences], dim=0 if batch_first else 1)


def distances(x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, compute_mode: str | None = None) -> torch.Tensor:
    """Return the distances (..., P, R) of points x1 (..., P, K) and x2 (..., R, K) in the p-norm, as `torch.cdist`."""
    apart = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p == 2:
        return (apart * apart).sum(-1).sqrt()
    if p in (0, float("inf")):
        return apart.amax(-1) if p else (apart != 0).to(apart.dtype).sum(-1)
    return apart.sum(-1) if p == 1 else apart.pow(p).sum(-1).pow(1 / p)


def by_int64(index: object) -> object:
    """Return an index whose integer tensors are int64, as ONNX asks for; torch takes int32 too."""
    if isinstance(index, torch.Tensor):
        return index.long() if index.dtype == torch.int32 else index
    return tuple(by_int64(each) for each in index) if isinstance(index, tuple) else index


def item(x: torch.Tensor, index: Any) -> torch.Tensor:
    """Return x[index], with integers of int64."""
    return x[by_int64(index)]  # type: ignore[index]  # any index that torch takes


def set_item(x: torch.Tensor, index: Any, value: Any) -> None:
    """Write x[index], with integers of int64."""
    x[by_int64(index)] = value  # type: ignore[index]  # any index that torch takes


SPELLED: Mapping[Any, Callable[..., torch.Tensor | None]] = {
    torch._C._nn.pad_sequence: padded,
    torch.cdist: distances,
    torch.Tensor.__getitem__: item,
    torch.Tensor.__setitem__: set_item,
}
"""Functions of torch, and what replaces them."""


class Spelled(TorchFunctionMode):
    """Call the functions of SPELLED in place of torch's own while this mode is active."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return SPELLED.get(func, func)(*args, **(kwargs or {}))
