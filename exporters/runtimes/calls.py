"""Call a graph that a runtime has opened: as a denoiser, as a function of its inner values, or with noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph, as_array, step_index
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from intaglio.pipeline.model.types import Denoise, Inputs, Values
    from intaglio.pipeline.runs.runtime import Opened, Runtime


def graph_denoise(graph: Graph, runtime: Runtime, *, threads: int = 0) -> Denoise:
    """Return the graph as a denoiser: its first output for a call's inputs, as `opened_call` has it.

    Raises RecipeError for a graph that leaves its weights out, and as `opened_call` does.
    """
    if graph.weights:
        raise RecipeError(
            f"{printable(graph.path)}: leaves {len(graph.weights)} weights to the model's own files, so it cannot be"
            " called: `own_weights.whole_graph` writes it with them"
        )
    call = opened_call(graph, runtime.open(graph, threads=threads))
    output = next(iter(graph.outputs))
    return lambda inputs: call(inputs)[output]


def opened_call(graph: Graph, opened: Opened) -> Values:
    """Return a function from a call's inputs to the graph's outputs, by name; it finds `step` from the timestep.

    Raises RecipeError if graph.json lacks what a call needs.
    """
    import torch

    check_callable(graph)

    def call(inputs: Inputs) -> dict[str, torch.Tensor]:
        found = opened.run(_feed(graph, inputs))
        return {name: torch.from_numpy(found[name]) for name in graph.outputs}

    return call


def graph_values(graph: Graph, runtime: Runtime, names: Sequence[str]) -> Values:
    """Return a function from a call's inputs to the values of these names inside the graph, as float32.

    Values that become outputs cannot be fused away, so the runtime may use other kernels than for the graph itself.
    """
    import onnx
    import torch

    from intaglio.exporters.float_graph.onnx_file import read_proto

    model = read_proto(graph.path)
    there = {value.name for value in model.graph.output} | set(graph.inputs)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    opened = runtime.open_model(model.SerializeToString(), graph.path.parent)

    def values(inputs: Inputs) -> dict[str, torch.Tensor]:
        feed = _feed(graph, inputs)
        found = feed | opened.run(feed)
        return {name: torch.from_numpy(found[name]).float() for name in names}

    return values


def usual_shapes(graph: Graph, rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs at the sizes that the graph was exported with."""
    return {
        name: tuple(axis if isinstance(axis, int) else graph.sizes.get(axis, (rows,))[0] for axis in spec.shape)
        for name, spec in graph.inputs.items()
    }


def noise_feed(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator, step: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Make inputs without meaning, for timing: noise for floating-point inputs, else ones; a step and its timestep."""
    feed: dict[str, NDArray[np.generic]] = {}
    for name, spec in graph.inputs.items():
        if name == STEP_INPUT:
            feed[name] = np.array(step, np.int64)
        elif name == graph.timestep and graph.timesteps:
            feed[name] = np.full(shapes[name], graph.timesteps[step], spec.dtype)
        elif spec.dtype.startswith("float"):
            feed[name] = rng.standard_normal(shapes[name]).astype(spec.dtype)
        else:
            feed[name] = np.ones(shapes[name], spec.dtype)
    return feed


def check_callable(graph: Graph) -> None:
    """Raise RecipeError if a graph lacks what a call of it needs."""
    problem = None
    if not graph.outputs:
        problem = "outputs: there is none"
    elif STEP_INPUT in graph.inputs and not graph.timesteps:
        problem = f"timesteps: there is none, but the graph has the input `{STEP_INPUT}`"
    elif STEP_INPUT in graph.inputs and graph.timestep is not None and graph.timestep not in graph.inputs:
        problem = f"timestep: {printable(graph.timestep)} is no input"
    if problem is not None:
        raise RecipeError(f"{printable(graph.path.with_name('graph.json'))}: is damaged: {problem}")


def _feed(graph: Graph, inputs: Inputs) -> dict[str, NDArray[np.generic]]:
    """Return what the graph takes: a call's inputs, and the step whose timestep is nearest."""
    feed = {  # whole timesteps may be floating point in the graph
        name: as_array(inputs[name]).astype(spec.dtype, copy=False)
        for name, spec in graph.inputs.items()
        if name != STEP_INPUT
    }
    if STEP_INPUT in graph.inputs:
        feed[STEP_INPUT] = np.array(step_index(graph, inputs), np.int64)
    return feed
