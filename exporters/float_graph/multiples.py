"""Find what the sizes of a graph's dynamic axes must be multiples of, by calls of the graph.

Shapes: R rows of one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from intaglio.exporters.float_graph.lean_session import NO_WEIGHTS, Weights, lean_session
from intaglio.pipeline.artifacts.graph import as_array

if TYPE_CHECKING:
    from intaglio.exporters.float_graph.in_parts import Session
    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.model.types import Inputs


def find_multiples(graph: Graph, call: Inputs, weights: Weights = NO_WEIGHTS) -> dict[str, int]:
    """Return the numbers above 1 that divide every accepted size of the sample's dynamic axes, by name of the axis.

    `call` has one row at the usual sizes. Both exported sizes are multiples of such a number d, so the graph is called
    with d more than the usual size, from the smallest d on. An axis is left out if no such call succeeds: then another
    input has to change its size together with it. `weights` are those that the graph's files leave out.
    """
    name = graph.interface.sample
    shape = graph.inputs[name].shape if name in graph.inputs else ()
    found = {}
    with lean_session(graph.path, weights) as session:
        for place, axis in enumerate(shape):
            if isinstance(axis, str) and axis in graph.sizes:
                divisors = _divisors(math.gcd(*graph.sizes[axis]))
                found[axis] = next((d for d in divisors if _accepts(session, graph, call, place, d)), 1)
    return {axis: least for axis, least in found.items() if least > 1}


def _divisors(number: int) -> Iterator[int]:
    """Yield the divisors of a number, the smallest first."""
    return (d for d in range(1, number + 1) if number % d == 0)


def _accepts(session: Session, graph: Graph, call: Inputs, place: int, more: int) -> bool:
    """Return True if the graph takes samples with `more` entries along an axis, and returns as many more."""
    sample = graph.interface.sample
    axis, wanted = graph.inputs[sample].shape[place], [*call[sample].shape]
    wanted[place] += more
    given = {n: as_array(_longer(call[n], spec.shape, axis, wanted[place])) for n, spec in graph.inputs.items()}
    try:
        output, *_ = session.run(None, given)
    except Exception:  # the runtime raises its own errors for shapes that do not fit
        return False
    return len(output.shape) == len(wanted) and output.shape[place] == wanted[place]


def _longer(value: torch.Tensor, shape: Sequence[int | str], axis: int | str, size: int) -> torch.Tensor:
    """Return an input with this size of an axis, where it has the axis: its entries are repeated."""
    for place, name in enumerate(shape):
        if name == axis:
            value = value.index_select(place, torch.arange(size) % value.shape[place])
    return value.contiguous()
