"""Write a graph of one layer, in float or in a scheme, to time it alone.

Shapes: R rows (tokens, or output pixels), N out features, K in features, C input channels, kh kw kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.qdq.export_qdq import write_lowered
from intaglio.pipeline.artifacts.graph import Graph, TensorSpec
from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import IntWeight, RoundedWeight, TwoLevel
from intaglio.pipeline.numerics.rounding import GROUP_HIGH

if TYPE_CHECKING:
    from pathlib import Path

    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Target

X, Y = "x", "y"
_TABLES = LayerTables(torch.tensor([3.0]), torch.tensor([0.5]), torch.tensor([30.0]))


def input_shape(layer: Layer, rows: int) -> tuple[int, ...]:
    """Return the shape of an input from which a layer computes about R rows: (1, R, K) or (1, C, H, ...).

    A convolution is assumed to have a stride of 1, and an output that is a square or a cube.
    """
    if layer.op == "linear":
        return 1, rows, layer.k
    kernel, sides, rest = layer.shape[2:], [], rows
    for axes in range(len(kernel), 0, -1):
        sides.append(max(1, int(rest ** (1 / axes) + 1e-9)) if axes > 1 else rest)
        rest = -(-rest // sides[-1])
    grown = [0 if layer.padded else size - 1 for size in kernel]
    return 1, layer.channels, *map(sum, zip(sides, grown, strict=True))


def single_layer(folder: Path, layer: Layer, rows: int, scheme: LayerScheme, target: Target) -> Graph:
    """Write a graph of this layer alone, with random weights, in the form that the target executes.

    Its input is float32.
    """
    rng = torch.Generator().manual_seed(0)
    graph = _float_graph(folder, layer, input_shape(layer, rows), torch.randn(layer.shape, generator=rng))
    if not isinstance(form := scheme.weight, RoundedWeight):
        return graph
    groups = 1 if form.group_size is None else layer.k // form.group_size
    two_levels = isinstance(form, IntWeight) and isinstance(form.granularity, TwoLevel)
    scale_NG = torch.full((1 if form.fixed_group else layer.n, 1 if two_levels or form.fixed_group else groups), 0.01)
    group_NG = torch.full((layer.n, groups), float(GROUP_HIGH)) if two_levels or form.fixed_group else None
    data = QuantizedLayerData(
        scheme,
        torch.randint(form.low, form.high + 1, (layer.n, layer.k), generator=rng, dtype=torch.int8),
        scale_NG,
        None if group_NG is None else form.stored_groups(group_NG),
        replace(_TABLES, output_share_N=torch.ones(layer.n)).needed_by(scheme, padded=layer.padded),
    )
    (folder / "lowered").mkdir()
    return write_lowered(folder / "lowered" / "model.onnx", graph, Quantized((1.0,), {layer.name: data}), target)


def _float_graph(folder: Path, layer: Layer, shape: tuple[int, ...], weight: torch.Tensor) -> Graph:
    import onnx
    from onnx import helper, numpy_helper

    linear = layer.op == "linear"
    constants = {"weight": weight.numpy().T.copy() if linear else weight.numpy(), "bias": np.ones(layer.n, np.float32)}
    if linear:
        nodes = [helper.make_node("MatMul", [X, "weight"], ["product" if layer.bias else Y])]
        nodes += [helper.make_node("Add", ["product", "bias"], [Y])] if layer.bias else []
    else:
        pads = [size // 2 if layer.padded else 0 for size in layer.shape[2:]]
        ends = [X, "weight", *(["bias"] if layer.bias else [])], [Y]
        nodes = [helper.make_node("Conv", *ends, pads=[*pads, *pads], kernel_shape=layer.shape[2:], group=layer.groups)]
    for node in nodes:
        node.name = f"{layer.name}/{node.op_type}"
        node.metadata_props.add(key=LAYER_KEY, value=layer.name)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(X, onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(Y, onnx.TensorProto.FLOAT, [f"size_{axis}" for axis in range(len(shape))])],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if layer.bias or name != "bias"],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")
    out = TensorSpec("float32", tuple(f"size_{axis}" for axis in range(len(shape))))
    return Graph(
        folder / "model.onnx", {X: TensorSpec("float32", shape)}, {Y: out}, timestep=None, nodes={layer.name: (X, Y)}
    )
