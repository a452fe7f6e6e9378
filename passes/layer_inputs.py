"""Record the inputs of a denoiser's layers, and find the layers that read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.hooks import Copies, PerTensor, before_calls

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.types import Denoise, Inputs


def layer_inputs(layers: Mapping[str, nn.Module], denoise: Denoise, call: Inputs) -> dict[str, list[torch.Tensor]]:
    """Return the inputs of each layer in one call of the denoiser, by layer name, in the order of first calls.

    Layers that are not called are missing from the result. Layers that read one tensor have one copy of it, which the
    denoiser does not change.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    copies = Copies()

    def note(name: str, args: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(name, []).append(copies.of(args[0]))

    with before_calls(layers, note), torch.no_grad():
        denoise(call)
    return seen


def siblings(seen: Mapping[str, Sequence[torch.Tensor]]) -> list[tuple[str, ...]]:
    """Group the names of layers that read the same tensor, in the order of their first calls."""
    same = SameInputs()
    for name, inputs in seen.items():
        for x in inputs:
            same.note(name, x)
    return same.readers


class SameInputs:
    """Groups layers by the tensors that they read, while they are called. Keeps no tensor.

    A layer that is called several times shares a group with every layer that reads one of its inputs.
    """

    def __init__(self) -> None:
        self._reader: PerTensor[str] = PerTensor()  # a layer that read the tensor
        self._of: dict[str, int] = {}  # group of a layer
        self._count = 0

    def note(self, name: str, x: torch.Tensor) -> None:
        """Record that the layer is called with x, which must stay alive until its last reader is called."""
        reader = self._reader.get(x)
        if reader is None:
            group, self._count = self._count, self._count + 1
        else:
            group = self._of[reader]
        own = self._of.setdefault(name, group)
        if own != group:
            merged, gone = min(own, group), max(own, group)
            self._of = {n: merged if g == gone else g for n, g in self._of.items()}
        self._reader.set(x, name)

    @property
    def readers(self) -> list[tuple[str, ...]]:
        """All groups, in the order of their first calls."""
        groups: dict[int, list[str]] = {}
        for name, group in self._of.items():
            groups.setdefault(group, []).append(name)
        return [tuple(names) for names in groups.values()]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of two layers or more."""
        return tuple(names for names in self.readers if len(names) > 1)
