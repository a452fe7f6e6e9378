"""Compare a quantized model's simulation with its deployed graph, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from intaglio.exporters.runtimes.calls import graph_denoise, graph_values
from intaglio.exporters.verify.departures import LayersInGraph, find_departures, in_shape_of, value_names
from intaglio.exporters.verify.layer_run import entry_type, run_layer
from intaglio.pipeline.artifacts.verification import DepartureFigures, LayerParity
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.model.calls import clocked, denoise_with, step_of
from intaglio.pipeline.model.hooks import Copies, after_calls
from intaglio.pipeline.numerics.quality import rel_l2
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import simulate

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.artifacts.quantized import Quantized
    from intaglio.pipeline.artifacts.verification import Departure
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.types import Denoise, Inputs
    from intaglio.pipeline.runs.runtime import Runtime


@dataclass(frozen=True)
class Comparison:
    """Quantized model, both simulated and deployed in `runtime`. `step` returns the denoising step of a call.

    Both return whole outputs, with what the scheduler does not read.
    """

    graph: Graph
    layers: Mapping[str, QuantizedLayer]
    simulated: Denoise
    deployed: Denoise
    step: Callable[[Inputs], int]
    runtime: Runtime

    @classmethod
    def of(cls, model: DenoiserModel, quantized: Quantized, graph: Graph, runtime: Runtime) -> Comparison:
        """Turn the model into its simulation, and open the graph. Changes `model`."""
        clock = simulate(model.module, quantized)
        layers = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantizedLayer)}
        simulated = clocked(denoise_with(model.module, model, whole=True), clock, model.names.timestep)
        step = partial(step_of, clock, timestep_name=model.names.timestep)
        return cls(graph, layers, simulated, graph_denoise(graph, runtime), step, runtime)

    def in_half(self) -> set[str]:
        """Return the layers that compute in float16 themselves if the graph is in float16 between the layers."""
        return {n for n, m in self.layers.items() if m.branch or isinstance(m.scheme.input, Float)}

    def departures(self, call: Inputs) -> tuple[DepartureFigures, dict[str, Departure]]:
        """Compare all layers inside the whole graph in one call. Returns the figures and the errors of each layer."""
        values = graph_values(self.graph, self.runtime, value_names(self.graph))
        found, output = find_departures(self.layers, self.simulated, self.graph, values, call)
        return DepartureFigures.of(found, output), found

    def parity(self, call: Inputs) -> float:
        """Return the relative L2 error of the graph's output on one call."""
        return rel_l2(self.deployed(call), self.simulated(call))

    @torch.no_grad()
    def layer_parity(self, call: Inputs, ctx: Context) -> dict[str, LayerParity]:
        """Compare every layer alone in the runtime, on its input in the simulation of `call`.

        A layer that is called several times is compared at its first call, whose input and output the graph names.
        """
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        copies = Copies()  # the model may add to an output, or to an input that it no longer needs

        def note(name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name not in seen:
                seen[name] = copies.of(args[0]), output.detach().clone()

        with after_calls(self.layers, note):
            self.simulated(call)
        found, step, ends = {}, self.step(call), LayersInGraph(self.graph, self.layers)
        with ctx.progress("layers", len(seen)) as advance:
            for name in self.graph.nodes:
                found[name] = compare_layer(ends, name, *seen[name], step, self.runtime)
                advance()
        return found


@torch.no_grad()
def compare_layer(
    ends: LayersInGraph, name: str, x: torch.Tensor, y: torch.Tensor, step: int, runtime: Runtime
) -> LayerParity:
    """Compare one layer of the graph at a step with its simulation, whose output on `x` is `y`.

    If the layer's input is float16, `x` is first rounded to float16.
    """
    graph = ends.graph
    x = ends.entering(name, x)
    half = entry_type(graph, name) == np.float16
    if half:
        x = x.half().float()
    deployed, codes = run_layer(graph, name, x.numpy(), runtime, step)
    with ends.reading(name) as layer, layer.clock.at(step):
        left = in_shape_of(y, torch.from_numpy(deployed))
        error = rel_l2(ends.leaving(name, left), layer.forward(x) if half else y)
        if isinstance(layer.scheme.input, Float) or codes is None:
            return LayerParity(error, 0, 0, 0)
        form = layer.scheme.input
        simulated = form.codes(layer.input_codes(x).codes).numpy().astype(np.int32)
    if codes.dtype == np.float32:
        codes = form.codes(torch.from_numpy(codes)).numpy()
    distance = codes.astype(np.int32).ravel() - (128 if codes.dtype == np.uint8 else 0) - simulated.ravel()
    return LayerParity(error, distance.size, int(np.count_nonzero(distance)), int(np.abs(distance).max()))
