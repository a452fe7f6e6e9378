"""What enters the layers of a denoiser while it is called."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.hooks import before_calls

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.denoiser import Denoise, Inputs


def layer_inputs(layers: Mapping[str, nn.Module], denoise: Denoise, call: Inputs) -> dict[str, torch.Tensor]:
    """By layer name; of a layer that is called more than once, the last. A layer that is not called is not there."""
    seen: dict[str, torch.Tensor] = {}
    with before_calls(layers, lambda name, args: seen.__setitem__(name, args[0])), torch.no_grad():
        denoise(call)
    return seen


def siblings(seen: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Names of layers that read the same tensor, together, in the order in which they are called."""
    same = SameInputs()
    for name, x in seen.items():
        same.note(name, x)
    return same.readers


class SameInputs:
    """Groups layers by the tensor that they read, as they are called. Keeps no tensor."""

    def __init__(self) -> None:
        self._readers: dict[int, tuple[weakref.ref[torch.Tensor], list[str]]] = {}
        self._groups: list[list[str]] = []

    def note(self, name: str, x: torch.Tensor) -> None:
        """The layer is called with x, which lives until it has been read by all that read it."""
        tensor, names = self._readers.get(id(x), (None, []))
        if tensor is None or tensor() is not x:  # else a new tensor has the id of one that is gone
            names = []
            self._readers[id(x)] = weakref.ref(x), names
            self._groups.append(names)
        if name not in names:
            names.append(name)

    @property
    def readers(self) -> list[tuple[str, ...]]:
        """Of every tensor, in the order of calls."""
        return [tuple(names) for names in self._groups]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Of two layers or more, in the order of calls."""
        return tuple(names for names in self.readers if len(names) > 1)
