"""Leave the weights of a large model out of its graph's files, and read them from the model where they are needed.

The weights of such a model stay in its own files, so in the graph's files they would be on the disk once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from intaglio.exporters.float_graph.onnx_file import read_model
from intaglio.exporters.float_graph.turned import origin
from intaglio.pipeline.artifacts.graph import OwnWeight
from intaglio.pipeline.errors import ContractError, RecipeError
from intaglio.pipeline.handed_over import handed_over
from intaglio.pipeline.machine import giving_back
from intaglio.pipeline.runs.store import remove_tree
from intaglio.pipeline.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.model.checkpoint import Checkpoint

LARGE_BYTES = 1 << 30
"""Size in bytes, in float32, of all weights that stay in the model's files, from which on the graph leaves them out."""


def left_out(in_files: int) -> int:
    """Return how many parameters the graph leaves out, of so many that stay in the model's files: all or none."""
    return in_files if 4 * in_files >= LARGE_BYTES else 0


def own_weights(graph: ir.Graph, module: nn.Module) -> dict[str, OwnWeight]:
    """Return the constants that are weights which stay in the module's files, by name; none if they are not large."""
    state = module.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in state.items() if isinstance(tensor, StoredTensor)}
    found, count = {}, 0
    for place, (name, value) in enumerate(graph.initializers.items()):
        assert value.const_value is not None  # the exporter gave it a value
        constant, axes = origin(value.const_value)
        parameter = names.get(id(getattr(constant, "raw", None)))
        if parameter is not None:
            found[name] = OwnWeight(parameter, axes, place)
            count += constant.size
    return found if left_out(count) else {}


def leave_out(graph: ir.Graph, weights: Mapping[str, OwnWeight]) -> None:
    """Make these constants inputs of the graph. Changes `graph`."""
    for name in weights:
        value = graph.initializers.pop(name)
        assert value.const_value is not None  # `own_weights` read it
        value.shape, value.type = ir.Shape(value.const_value.shape.numpy()), ir.TensorType(value.const_value.dtype)
        value.const_value = None
        graph.inputs.append(value)


class ModelWeights(Mapping[str, "NDArray[np.float32]"]):
    """Weights that a graph leaves out, by name. Each is read from the model's files every time that it is asked for."""

    def __init__(self, graph: Graph, model: Checkpoint | None) -> None:
        """Open the model whose weights they are. Raises ContractError without one, RecipeError if it is another."""
        self._weights = graph.weights
        if not self._weights:
            return
        if model is None:
            raise ContractError("the float graph leaves its weights to the model: give MODEL too")
        with giving_back():  # else the C library keeps the room that each weight of the empty model had for a moment
            self._tensors = model.stored_module().state_dict(keep_vars=True)
        for weight in self._weights.values():
            if weight.parameter not in self._tensors:
                raise RecipeError(
                    f"the float graph was exported from a model with a weight {weight.parameter}, which"
                    f" {model.name} lacks: run the recipe again"
                )

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """Return the values in memory of their own, with the axes in the graph's order."""
        weight = self._weights[name]
        tensor = self._tensors[weight.parameter].detach().permute(weight.axes).contiguous()
        array: NDArray[np.float32] = tensor.numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_whole(graph: Graph, model: Checkpoint | None) -> ir.Model:
    """Read a graph with all its constants; those that its files leave out are read from the model when they are used.

    Raises as `ModelWeights` does, and RecipeError for a damaged file.
    """
    found, weights = read_model(graph.path), ModelWeights(graph, model)
    inputs = {str(value.name): value for value in found.graph.inputs}
    constants = list(found.graph.initializers.values())
    for name, weight in sorted(graph.weights.items(), key=lambda each: each[1].place):
        value = inputs[name]
        assert value.dtype is not None  # `leave_out` wrote both
        assert value.shape is not None
        found.graph.inputs.remove(value)
        value.const_value = ir.LazyTensor(partial(_tensor, weights, name), value.dtype, value.shape, name=name)
        constants.insert(weight.place, value)
    found.graph.initializers.clear()
    for value in constants:
        found.graph.register_initializer(value)
    return found


@contextmanager
def whole_graph(graph: Graph, model: Checkpoint | None, folder: Path) -> Iterator[Graph]:
    """Yield the graph with all its weights in its files, which a runtime needs: itself, or a copy in `folder`.

    The folder is removed afterwards. Raises as `read_whole` does.
    """
    if not graph.weights:
        yield graph
        return
    remove_tree(folder)  # from a run that was killed
    work = folder / "written"
    try:
        work.mkdir(parents=True)
        ir.save(read_whole(graph, model), work / "model.onnx", external_data="model.onnx.data")
        with handed_over(work):
            replace(graph, path=work / "model.onnx", weights={}).save(folder)
        yield type(graph).load(folder)
    finally:
        remove_tree(folder)


def _tensor(weights: ModelWeights, name: str) -> ir.TensorProtocol:
    return ir.Tensor(weights[name], name=name)
