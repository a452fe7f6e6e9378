"""Keep a rounded weight between calls."""

from __future__ import annotations

from collections.abc import Callable

import torch


class WeightCache:
    """Keeps a layer's rounded weight while no gradient is needed.

    With few tokens, rounding a weight takes longer than its product. Call `clear` after a part of the weight changed.
    Where `keeps` is False, a rounded weight is made each time: one of them is in memory, not those of all layers.
    """

    def __init__(self) -> None:
        self.keeps = True
        self._kept: torch.Tensor | None = None

    def get(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the kept weight, or make one, which is kept if gradients are off."""
        if self._kept is not None:
            return self._kept
        made = make()
        if self.keeps and not torch.is_grad_enabled():
            self._kept = made
        return made

    def keep(self, weight: torch.Tensor) -> None:
        """Keep this weight, which `get` returns from now on."""
        self._kept = weight

    def clear(self) -> None:
        """Forget the weight."""
        self._kept = None
