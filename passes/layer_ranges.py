"""Record the layers of a model while it is called: their ranges, their rows, and the layers without effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from intaglio.passes.layer_inputs import SameInputs
from intaglio.pipeline.artifacts.workload import Unreached, Workload
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.dataflow import NEVER_CALLED, NO_EFFECT, WEIGHT_READ, follow
from intaglio.pipeline.model.layer_types import Conv
from intaglio.pipeline.numerics.step_tables import where_known
from intaglio.pipeline.simulation.layer import of_channels

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.model.types import Denoise

ENOUGH_ROWS = 16
"""Number of rows from which on the range of a call is used without extrapolation."""


@dataclass
class _Call:
    """One call of the model, by layer name: range of the input, outputs of convolutions without bias, and rows.

    `output` has the largest magnitude of each channel, (N,).
    """

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    output: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


class LayerRanges:
    """Ranges of the inputs and outputs of layers in each call of the model.

    If one call of the model calls a layer several times, the layer has one range over these calls.
    """

    def __init__(self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], processes: int = 1) -> None:
        """Start without calls.

        `processes` is the number of processes; each records as many rows as this one, and their ranges are joined
        later.
        """
        self._layers, self._modules, self._processes = layers, modules, processes
        self._now = _Call()
        self._calls: list[_Call] = []
        self._rows: dict[str, int] = {}
        self._readers = SameInputs()
        self._other_types: dict[str, torch.dtype] = {}

    def note(self, name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Record one call of a layer."""
        module, now, x = self._modules[name], self._now, args[0]
        if output.dtype != torch.float32:
            self._other_types[name] = output.dtype
        if not self._calls:
            self._readers.note(name, x)
        now.rows[name] = now.rows.get(name, 0) + output.numel() // self._layers[name].n
        low, high = expected_ends(x.detach(), self._processes)
        now.low[name] = min(now.low.get(name, low), low)
        now.high[name] = max(now.high.get(name, high), high)
        if isinstance(module, Conv):
            product = output.detach()
            if module.bias is not None:
                product = product - of_channels(module, module.bias.detach())
            amax_N = output_amax(product.abs(), module, self._processes)
            now.output[name] = torch.maximum(now.output.get(name, amax_N), amax_N)

    def check_float32(self) -> None:
        """Raise RecipeError if layers computed in another type than float32: a graph cannot."""
        if not self._other_types:
            return
        name, dtype = next(iter(self._other_types.items()))
        raise RecipeError(
            f"{len(self._other_types)} of {len(self._layers)} layers, the first is {name}, compute in"
            f" {str(dtype).removeprefix('torch.')}, and a graph is made from layers in float32: remove torch.autocast"
            " and casts of inputs and weights from the model's forward"
        )

    def end_of_call(self) -> None:
        """End the current call of the model; later notes belong to its next call."""
        self._calls.append(self._now)
        self._rows = {**self._now.rows, **self._rows}
        self._now = _Call()

    @property
    def origin(self) -> str:
        """Words that name the first layer to read NaN or Inf in the current call."""
        for name, low in self._now.low.items():
            if not (math.isfinite(low) and math.isfinite(self._now.high[name])):
                return f"{name} is the first layer to read them"
        return "no layer reads them"

    def table(self, of: Literal["low", "high"], choose: Callable[[list[float]], float]) -> dict[str, torch.Tensor]:
        """Return one value for each call, (T,), by layer name.

        `choose` gives the value of calls that do not reach the layer, from those of the other calls.
        """
        found: list[dict[str, float]] = [getattr(call, of) for call in self._calls]
        names = sorted({name for each in found for name in each})
        return {name: where_known([each.get(name) for each in found], choose) for name in names}

    def outputs(self) -> dict[str, torch.Tensor]:
        """Return the range of each channel of each convolution's output without its bias, (T, N), by name.

        Calls that do not reach the layer have the largest of the other calls.
        """
        found = {}
        for name in sorted({name for call in self._calls for name in call.output}):
            largest = torch.stack([call.output[name] for call in self._calls if name in call.output]).amax(0)
            found[name] = torch.stack([call.output.get(name, largest) for call in self._calls])
        return found

    def workload(self, samples: int, unreached: tuple[Unreached, ...]) -> Workload:
        """Return the workload, with the rows per sample of each layer in the first call that reaches it."""
        absent = {layer.name for layer, _ in unreached}
        rows = {name: self._rows[name] / samples for name in sorted(self._rows) if name not in absent}
        groups = (tuple(n for n in names if n not in absent) for names in self._readers.groups)
        return Workload(rows, tuple(names for names in groups if len(names) > 1), unreached)


def expected_ends(x: torch.Tensor, processes: int = 1) -> tuple[float, float]:
    """Return the smallest and largest value that ENOUGH_ROWS rows would have, estimated from R rows of each process.

    `x`: (R, ...).

    On average, the largest of n rows exceeds the maximum of one row by sqrt(6) / pi * ln(n) standard deviations of the
    rows' maxima (Gumbel distribution). The range of fewer rows is too small, and would clip later inputs. A single row
    is not extrapolated.
    """
    lows, highs = x.reshape(len(x), -1).aminmax(dim=1)
    return -_expected_largest(-lows, processes).item(), _expected_largest(highs, processes).item()


def _expected_largest(largest_R: torch.Tensor, processes: int) -> torch.Tensor:
    """Return the largest value of ENOUGH_ROWS rows, (...), estimated from that of each row, (R, ...)."""
    rows = len(largest_R) * processes
    if len(largest_R) == 1 or rows >= ENOUGH_ROWS:
        return largest_R.amax(0)
    beyond = math.sqrt(6) / math.pi * math.log(ENOUGH_ROWS / rows)
    return largest_R.amax(0) + beyond * largest_R.std(0)


def output_amax(magnitude: torch.Tensor, layer: Conv, processes: int = 1) -> torch.Tensor:
    """Return the largest magnitude of each channel that ENOUGH_ROWS rows would have, (N,).

    `magnitude` is that of a convolution's output without its bias, (R, N, ...), or (N, ...) of one row. A smaller
    range with clipped values often has a smaller squared error here, but further samples have larger values, and they
    lose more by clipping than all samples gain by finer codes.
    """
    batched = magnitude if magnitude.dim() == layer.weight.dim() else magnitude[None]
    return _expected_largest(batched.flatten(2).amax(2), processes)


def unreached_layers(
    module: nn.Module, denoise: Denoise, trajectory: Trajectory, layers: Mapping[str, Layer], rows: Sequence[int]
) -> tuple[Unreached, ...]:
    """Find the layers that no recorded call reaches, that have no effect, or whose weight other code reads; say why.

    The first call is followed on these rows; later calls are followed only while some layer seems to have no effect.
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
