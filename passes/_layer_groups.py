"""Which layers a metric ranks together, found from what their inputs depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.hooks import before_calls

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.denoiser import Denoise, Inputs

Seen = Mapping[str, tuple[object, ...]]


def layer_groups(
    module: nn.Module, denoise: Denoise, calls: Mapping[str, Inputs], layers: Sequence[str]
) -> dict[str, str]:
    """The group of every layer: `content`, or else `visual`.

    Content is what reads conditions alone, such as the keys and values of cross-attention: its input is another in the
    call with other `conditions`, and the same, bit for bit, in the call with other `noise`. Both differ from the call
    `plain` in nothing else.
    """
    seen = {what: _seen(module, partial(denoise, inputs), layers) for what, inputs in calls.items()}

    def moves(layer: str, what: str) -> bool:
        return what in seen and seen[what][layer] != seen["plain"][layer]

    return {name: "content" if moves(name, "conditions") and not moves(name, "noise") else "visual" for name in layers}


def _seen(module: nn.Module, call: partial[torch.Tensor], layers: Sequence[str]) -> Seen:
    """What tells one input of a layer from another, by layer: its shape and two moments of every call."""
    found: dict[str, tuple[object, ...]] = dict.fromkeys(layers, ())

    def note(name: str, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().double()
        place = torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device)
        found[name] += (x.shape, float(x.sum()), float(x.flatten() @ place))

    with before_calls({name: module.get_submodule(name) for name in layers}, note), torch.no_grad():
        call()
    return found
