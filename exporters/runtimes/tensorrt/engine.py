"""Run a TensorRT engine on torch's tensors on the GPU, without copies.

It has not run on a GPU yet: tests use a stand-in of the runtime, and check its calls against TensorRT's type stubs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from intaglio.exporters.runtimes.tensorrt.kit_scripts.run import Execution, RunError
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Engine, Graph, step_index
from intaglio.pipeline.errors import CallError, MissingExtra, RecipeError, TargetError

if TYPE_CHECKING:
    from intaglio.pipeline.model.types import Inputs, Values


def engine_call(graph: Graph, runtime: str, module: str, extra: str) -> Values:
    """Open the engine.plan beside the graph on torch's current GPU and stream, as a function of named inputs.

    `module` is the Python module of this runtime, and `extra` the extra of intaglio that installs it.

    Raises RecipeError if the folder has no engine of this runtime, TargetError if it does not run here,
    MissingExtra if the module is not installed.
    """
    folder = graph.path.parent
    made = Engine.load(folder) if (folder / "engine.json").is_file() else None
    if made is not None and made.runtime != runtime:
        raise RecipeError(
            f"{folder}: its engine was built by {made.runtime}, not by {runtime}: give the backend {made.runtime!r}"
        )
    if made is None or made.plan is None:
        raise RecipeError(
            f"{folder}: no engine.plan in it: build it on the device that runs it, with the archive of `intaglio kit`,"
            " and copy it into this folder"
        )
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise MissingExtra(extra, f"the backend {runtime!r}") from error
    if not torch.cuda.is_available():
        raise TargetError(f"{folder}: its engine needs a GPU, and torch {torch.__version__} finds none")
    built_by = f"{runtime} {made.version}" if made.version[0].isdigit() else "another device or version"
    try:
        execution = Execution(loaded, made.plan, built_by)
    except RunError as error:
        raise TargetError(f"{folder}: {error}") from error
    device = torch.device("cuda", torch.cuda.current_device())
    return on_tensors(graph, execution, device, lambda: torch.cuda.current_stream(device).cuda_stream)


def on_tensors(graph: Graph, execution: Execution, device: torch.device, stream: Callable[[], int]) -> Values:
    """Return a function of a call's inputs, contiguous on `device`, by name; the step follows from the timestep."""

    def call(inputs: Inputs) -> dict[str, torch.Tensor]:
        tensors = {name: inputs[name] for name in graph.inputs if name != STEP_INPUT}
        if STEP_INPUT in graph.inputs:
            tensors[STEP_INPUT] = torch.tensor(step_index(graph, inputs), device=device)
        try:
            shapes = execution.resize({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            for name, shape in shapes.items():
                dtype = getattr(torch, graph.outputs[name].dtype)
                tensors[name] = torch.empty(shape, dtype=dtype, device=device)
            execution.start({name: tensor.data_ptr() for name, tensor in tensors.items()}, stream())
        except RunError as error:
            raise CallError(str(error)) from error
        return {name: tensors[name] for name in graph.outputs}

    return call
