"""Notes the layers of a model while it is called: their ranges, the work they are given, and which take no part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from intaglio.passes._layer_inputs import SameInputs
from intaglio.pipeline.dataflow import NEVER_CALLED, NO_EFFECT, WEIGHT_READ, follow
from intaglio.pipeline.quant.step_table import where_known
from intaglio.pipeline.workload import Unreached, Workload

if TYPE_CHECKING:
    from intaglio.pipeline.denoiser import Denoise
    from intaglio.pipeline.plan import Layer
    from intaglio.pipeline.trajectory import Trajectory

ENOUGH_ROWS = 16
"""Rows of a call whose range is taken as it is."""


@dataclass
class _Call:
    """One call of the model, by layer name: ends of the input, largest output without bias of a convolution, rows."""

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


class LayerRanges:
    """What enters and leaves layers in each call of the model. All calls of a layer in one of them count together."""

    def __init__(self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]) -> None:
        self._layers, self._modules = layers, modules
        self._now = _Call()
        self._calls: list[_Call] = []
        self._rows: dict[str, int] = {}
        self._readers = SameInputs()

    def note(self, name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """One call of a layer."""
        module, now, x = self._modules[name], self._now, args[0]
        if not self._calls:
            self._readers.note(name, x)
        now.rows[name] = now.rows.get(name, 0) + output.numel() // self._layers[name].n
        low, high = expected_ends(x.detach())
        now.low[name] = min(now.low.get(name, low), low)
        now.high[name] = max(now.high.get(name, high), high)
        if isinstance(module, nn.Conv2d):
            product = output.detach()
            if module.bias is not None:
                product = product - module.bias.detach().reshape(-1, 1, 1)
            now.output[name] = max(now.output.get(name, 0.0), expected_ends(product.abs())[1])

    def end_of_call(self) -> None:
        """The model has returned: what follows is its next call."""
        self._calls.append(self._now)
        self._rows = {**self._now.rows, **self._rows}
        self._now = _Call()

    @property
    def origin(self) -> str:
        """The layer that reads NaN or Inf first in the call that is not over yet."""
        for name, low in self._now.low.items():
            if not (math.isfinite(low) and math.isfinite(self._now.high[name])):
                return f"{name} is the first layer to read them"
        return "no layer reads them"

    def table(
        self, of: Literal["low", "high", "output"], choose: Callable[[list[float]], float]
    ) -> dict[str, torch.Tensor]:
        """One entry for each call, (T,), by layer name; `choose` picks it where the call has none of the layer."""
        found: list[dict[str, float]] = [getattr(call, of) for call in self._calls]
        names = sorted({name for each in found for name in each})
        return {name: where_known([each.get(name) for each in found], choose) for name in names}

    def workload(self, samples: int, unreached: tuple[Unreached, ...]) -> Workload:
        """Rows for one of the `samples`, of each layer in the first call that it has a part in."""
        absent = {layer.name for layer, _ in unreached}
        rows = {name: self._rows[name] / samples for name in sorted(self._rows) if name not in absent}
        groups = (tuple(n for n in names if n not in absent) for names in self._readers.groups)
        return Workload(rows, tuple(names for names in groups if len(names) > 1), unreached)


def expected_ends(x: torch.Tensor) -> tuple[float, float]:
    """Return the ends of the range that `x` (R, ...) would have if it had ENOUGH_ROWS rows.

    The largest of n values of a row lies, in the mean, sqrt(6) / pi * ln(n) standard deviations beyond that of one:
    the extreme value of Gumbel's distribution. Fewer rows show too small a range, which would clip what comes later.
    """
    lows, highs = x.reshape(len(x), -1).aminmax(dim=1)
    if not 1 < len(x) < ENOUGH_ROWS:
        return lows.amin().item(), highs.amax().item()
    beyond = math.sqrt(6) / math.pi * math.log(ENOUGH_ROWS / len(x))
    return (lows.amin() - beyond * lows.std()).item(), (highs.amax() + beyond * highs.std()).item()


def unreached_layers(
    module: nn.Module, denoise: Denoise, trajectory: Trajectory, layers: Mapping[str, Layer], rows: Sequence[int]
) -> tuple[Unreached, ...]:
    """Find the layers that have no part in recorded calls, and say why.

    The first call is followed with these rows of it; later ones as long as some layer seems to have no effect.
    """
    called, needed, read = set(trajectory.low), set[str](), set[str]()
    for step in range(len(trajectory.timesteps)):
        uses = follow(module, layers, partial(denoise, trajectory.call(step, rows)))
        needed |= uses.needed
        read |= uses.read
        if called <= needed:
            break
    reasons = {
        name: WEIGHT_READ if name in read else NO_EFFECT if name in called else NEVER_CALLED
        for name in layers
        if name in read or name not in called & needed
    }
    return tuple(Unreached(layers[name], reason) for name, reason in reasons.items())
