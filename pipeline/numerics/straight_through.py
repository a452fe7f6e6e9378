"""Round half to even with a gradient of 1, for trained scales and weights."""

from __future__ import annotations

import torch


class _RoundStraightThrough(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Round half to even with a straight-through gradient (Bengio et al. 2013)."""
    rounded: torch.Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return rounded
