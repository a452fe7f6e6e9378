"""Run one layer of an exported graph alone, on given inputs."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from intaglio.exporters.float_graph.onnx_file import read_model
from intaglio.exporters.float_graph.sites import INPUT_CODES
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from intaglio.pipeline.runs.runtime import Runtime


def layer_model(graph: Graph, layer: str) -> onnx.ModelProto:
    """Return a model of the layer alone, from its input, and `step` if the layer reads that, to its output.

    The codes of a quantized input are a second output; in formats of floating-point numbers, the numbers themselves, in
    float32. Raises KeyError for a layer not in `graph.nodes`.
    """
    before, after = graph.nodes[layer]
    model = _loaded(graph.path, graph.path.stat().st_mtime_ns)
    inputs = [before, *(v.name for v in model.graph.inputs if v.name == STEP_INPUT != before)]
    alone = ir.convenience.extract(model.graph, [n for n in inputs if n is not None], [after])
    for value in list(alone.inputs):
        if value.name == STEP_INPUT and not value.uses():
            alone.inputs.remove(value)
    for node in [node for node in alone if str(node.name).endswith(INPUT_CODES)]:
        alone.outputs.append(_numbers(alone, node.outputs[0]))
    proto: onnx.ModelProto = ir.to_proto(ir.external_data.load_to_model(ir.Model(alone, ir_version=model.ir_version)))
    return proto


def _numbers(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """Return floating-point codes in float32, exactly, as NumPy has no type for them; other codes unchanged."""
    if codes.dtype is None or not codes.dtype.is_floating_point():
        return codes
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT.value}, name=f"{codes.name}/Cast")
    graph.append(cast)
    numbers = cast.outputs[0]
    numbers.name, numbers.type, numbers.shape = f"{codes.name}/numbers", ir.TensorType(ir.DataType.FLOAT), codes.shape
    return numbers


@lru_cache(maxsize=1)
def _loaded(path: Path, _: int) -> ir.Model:
    """Return the graph, parsed once for all its layers; the weights stay on disk."""
    return read_model(path)


def run_layer(
    graph: Graph, layer: str, x: NDArray[np.float32], runtime: Runtime, step: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.generic] | None]:
    """Return the layer's output on x at `step` in the runtime, and the codes of its input if it is quantized.

    The codes have the form that `layer_model` describes.

    The axes of x before its channels may differ from those of the graph, such as (B S, C) for (B, S, C). x may also
    have fewer tokens than the graph takes, which was traced row by row: a model may leave out masked tokens in a call
    of one row. Then the last token of x is repeated, and the outputs of the repeated tokens are left out.
    """
    import numpy as np

    model = layer_model(graph, layer)
    inputs, outputs = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    sizes = [axis.dim_value or -1 for axis in model.graph.input[0].type.tensor_type.shape.dim]
    shape, more = x.shape, 0
    tokens_differ = len(sizes) == x.ndim == 3 and sizes[1] not in (-1, shape[1]) and sizes[-1] == shape[-1]
    if (len(sizes) != x.ndim or tokens_differ) and sizes.count(-1) <= 1:
        tokens, in_a_row = x.reshape(-1, shape[-1]), math.prod(size for size in sizes[:-1] if size > 0)
        more = -len(tokens) % in_a_row if sizes[-1] == shape[-1] else 0
        x = (np.concatenate([tokens, tokens[-1:].repeat(more, 0)]) if more else x).reshape(sizes)
    feed = {inputs[0]: x.astype(entry_type(graph, layer)), STEP_INPUT: np.array(step, np.int64)}
    found = runtime.open_model(model.SerializeToString()).run({name: feed[name] for name in inputs})
    y, *codes = (found[name] for name in outputs)
    if more:
        y, *codes = (each.reshape(-1, each.shape[-1])[:-more].reshape(*shape[:-1], -1) for each in (y, *codes))
    return y.astype(np.float32), codes[0] if codes else None


def entry_type(graph: Graph, layer: str) -> np.dtype[np.generic]:
    """Return the type of the layer's input: float32 or float16."""
    model, name = _loaded(graph.path, graph.path.stat().st_mtime_ns), graph.nodes[layer][0]
    graph_values = (*model.graph.inputs, *model.graph.initializers.values())  # a layer may read a constant
    values = (*graph_values, *(value for node in model.graph for value in node.outputs))
    dtype = next(value.dtype for value in values if value.name == name)
    assert dtype is not None  # the exporter writes graphs with all types
    return dtype.numpy()
