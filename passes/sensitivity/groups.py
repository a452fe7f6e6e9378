"""Find the layers that a metric ranks together, from their inputs and from what these depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from intaglio.pipeline.model.hooks import before_calls

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.types import Denoise, Inputs


class Seen(NamedTuple):
    """Features that distinguish the inputs of a layer: shape and two moments."""

    shape: tuple[int, ...]
    total: float
    slope: float


def layer_groups(
    module: nn.Module,
    denoise: Denoise,
    calls: Mapping[str, Inputs],
    layers: Sequence[str],
    frames: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Return the group of each layer: `content`, `temporal`, or else `visual`.

    Content layers read conditions alone, such as the keys and values of cross-attention: their input changes in the
    call with other `conditions`, and is equal, bit for bit, in the call with other `noise`. Apart from the
    conditions or the noise, both calls have the inputs of the call `plain`. Temporal layers read tokens along the
    frames of one position (see `_along_frames`). `frames` is the pair (rows of the call, frames of a row); None if
    samples have no frames.
    """
    seen = {what: _seen(module, partial(denoise, inputs), layers) for what, inputs in calls.items()}

    def group(layer: str) -> str:
        moves = {what for what, found in seen.items() if found[layer] != seen["plain"][layer]}
        if "conditions" in moves and "noise" not in moves:
            return "content"
        inputs = seen["plain"][layer]
        return "temporal" if frames and inputs and all(_along_frames(x.shape, *frames) for x in inputs) else "visual"

    return {name: group(name) for name in layers}


def _along_frames(shape: tuple[int, ...], rows: int, frames: int) -> bool:
    """Return True if the input is (rows * positions, frames, K): a sequence of frames for each of several positions.

    With as many positions as frames, each sequence could also hold the positions of one frame: then return False.
    """
    if len(shape) != 3 or shape[1] != frames or frames == 1:
        return False
    positions, rest = divmod(shape[0], rows)
    return rest == 0 and positions not in (1, frames)


def _seen(module: nn.Module, call: partial[torch.Tensor], layers: Sequence[str]) -> dict[str, tuple[Seen, ...]]:
    """Return the features of every input in a call, by layer."""
    found: dict[str, tuple[Seen, ...]] = dict.fromkeys(layers, ())

    def note(name: str, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().double()
        place = torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device)
        found[name] += (Seen(tuple(x.shape), float(x.sum()), float(x.flatten() @ place)),)

    with before_calls({name: module.get_submodule(name) for name in layers}, note), torch.no_grad():
        call()
    return found
