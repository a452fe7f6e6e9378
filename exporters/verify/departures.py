"""Find where a deployed graph differs from its simulation: inside a layer, or between layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from onnx import TensorProto

from intaglio.exporters.float_graph.onnx_file import read_proto
from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.pipeline.artifacts.verification import Departure
from intaglio.pipeline.model.hooks import after_calls
from intaglio.pipeline.model.types import Denoise, Inputs, Values
from intaglio.pipeline.numerics.quality import rel_l2
from intaglio.pipeline.simulation.layer import channel_axis

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.simulation.layer import QuantizedLayer


class LayersInGraph:
    """Simulated layers that compute on values of a graph; channel scales may be folded into these values."""

    def __init__(self, graph: Graph, layers: Mapping[str, QuantizedLayer]) -> None:
        self.graph, self._layers = graph, layers

    def entering(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Convert a layer's input in the simulation to the scale of the graph."""
        return x * self._scale(self.graph.nodes[name][0], name, x)

    def leaving(self, name: str, y: torch.Tensor, value: str | None = None) -> torch.Tensor:
        """Convert a layer's output in the graph to the simulation's scale; `value` names the output of a later call."""
        return y / self._scale(value or self.graph.nodes[name][1], name, y)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[QuantizedLayer]:
        """Yield the layer, ready for the input that it has in the graph.

        If its channel scales are folded there, the layer does not multiply by them again.
        """
        layer = self._layers[name]
        balance = layer.balance
        if balance is not None and self.graph.is_folded(name):
            layer.balance = replace(balance, scale_C=torch.ones_like(balance.scale_C))
        try:
            yield layer
        finally:
            layer.balance = balance

    def _scale(self, value: str, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the channel scales that are folded into a value, an input or output of the layer of this name."""
        by = self.graph.scaled.get(value)
        axis = channel_axis(self._layers[name].layer)
        scale_C = torch.ones(x.shape[axis])
        if by is not None and (balance := self._layers[by.layer].balance) is not None:
            scale_C[by.start : by.start + len(balance.scale_C)] = balance.scale_C
        return scale_C.reshape(-1, *[1] * (-1 - axis))


def value_names(graph: Graph) -> tuple[str, ...]:
    """Return the names of each layer's inputs and outputs, and of the graph's outputs, for `find_departures`."""
    entries, outputs = _ends_of_layers(graph)
    ends = [end for name, calls in outputs.items() for end in (entries[name], *calls)]
    return tuple(dict.fromkeys([*ends, *graph.outputs]))


def _ends_of_layers(graph: Graph) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the value that each layer reads as its input, and the outputs of its calls.

    If a Cast to float32 precedes the layer, its output is the input. The value in front of it is in float16, but a
    runtime may compute it in float32, hand this to the Cast, and round it only for the callers that ask for the value.
    This rounding would move some inputs to neighbouring codes, which are far apart in 4 bits. Names of a call's nodes
    begin with `layer`, `layer@1` and so on.
    """
    casts: dict[str, str] = {}
    last: dict[str, dict[str, str]] = {}
    for node in read_proto(graph.path).graph.node:
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute):
            casts[node.input[0]] = node.output[0]
        layer = next((p.value for p in node.metadata_props if p.key == LAYER_KEY), "")
        if layer in graph.nodes and node.op_type != "Reshape":  # one before a later call has the first call's name
            last.setdefault(layer, {})[node.name.partition("/")[0]] = node.output[0]
    entries = {name: casts.get(x, x) for name, (x, _) in graph.nodes.items()}
    return entries, {name: list(calls.values()) for name, calls in last.items()}


def find_departures(
    layers: Mapping[str, QuantizedLayer], simulated: Denoise, graph: Graph, deployed: Values, call: Inputs
) -> tuple[dict[str, Departure], float]:
    """Return the errors of all layers in the order in which they run, and the error of the graph's output.

    After each layer, the simulation continues with the layer's output in the graph, so errors do not accumulate. The
    error of a layer's input then comes from the operators between this layer and the layers before it. The error of its
    output is measured against the simulated layer on its input in the graph. A layer with several calls is checked at
    its first call.
    """
    values, ends = deployed(call), LayersInGraph(graph, layers)
    entries, outputs = _ends_of_layers(graph)
    found: dict[str, Departure] = {}
    calls = dict.fromkeys(layers, 0)

    def take_over(name: str, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        layer, x = layers[name], args[0]
        left = [ends.leaving(name, values[output], output) for output in outputs[name]]
        if name not in found:
            entered, own = in_shape_of(x, values[entries[name]]), math.inf
            if entered.shape == x.shape:
                with ends.reading(name):
                    made = layer.forward(entered)
                own = rel_l2(in_shape_of(made, left[0]), made)
            found[name] = Departure(rel_l2(entered, ends.entering(name, x)), own)
        calls[name] += 1
        again = in_shape_of(y, left[min(calls[name], len(left)) - 1])  # the exporter merges equal calls into one
        return again.clone() if again.shape == y.shape else y  # the model may change it, and the next layer reads it

    there = {name: layer for name, layer in layers.items() if name in graph.nodes}
    with torch.no_grad(), after_calls(there, take_over):
        output = simulated(call)
    return found, rel_l2(values[next(iter(graph.outputs))], output)


def in_shape_of(reference: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a value of the graph in the shape that it has in the simulation, whose rows may be on other axes."""
    same_channels = value.shape[-1:] == reference.shape[-1:] and value.numel() == reference.numel()
    return value.reshape(reference.shape) if same_channels else value
