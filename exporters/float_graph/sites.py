"""What became of one layer of the model in an ONNX graph: its nodes, and the layer alone as a model that runs.

Shapes: N out features, K in features, C input channels, kh kw kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from intaglio.exporters.float_graph.onnx_file import read_model
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

LAYER_KEY = "intaglio.layer"
"""Node metadata: the name of the layer that the node belongs to."""
BRANCH = "branch"
"""In the names of nodes: what a layer computes in float beside its product."""
INPUT_CODES = "/input/QuantizeLinear"
"""How the name of a node ends that makes the codes of a layer's input."""


@dataclass(frozen=True)
class Site:
    """One call of a layer in a float graph: a product with a constant weight, and the addition of a bias if apart."""

    layer: str
    product: ir.Node
    add: ir.Node | None

    @property
    def x(self) -> ir.Value:
        """The layer's input."""
        return _given(self.product.inputs[0])

    @property
    def y(self) -> ir.Value:
        """The layer's output."""
        return (self.add or self.product).outputs[0]

    @property
    def bias(self) -> ir.Value | None:
        """The constant (N,) that is added, if any."""
        if self.add is not None:
            return next(_given(v) for v in self.add.inputs if v is not self.product.outputs[0])
        return self.product.inputs[2] if len(self.product.inputs) > 2 else None

    def weight(self) -> NDArray[np.float32]:
        """In torch's layout: (N, K), or (N, C, kh, kw)."""
        constant = _given(self.product.inputs[1]).const_value
        assert constant is not None  # `find_sites` made sure
        w: NDArray[np.float32] = constant.numpy()
        transposed = self.product.op_type == "MatMul" or (
            self.product.op_type == "Gemm" and not self.product.attributes.get_int("transB", 0)
        )
        return w.T if transposed else w


def find_sites(nodes: Iterable[ir.Node]) -> dict[str, list[Site]]:
    """Every call of every layer, in the order of the nodes, by the names that their metadata give."""
    sites: dict[str, list[Site]] = {}
    for node in nodes:
        layer = node.metadata_props.get(LAYER_KEY)
        if layer is None or node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        adds = [user for user in users if user.op_type == "Add" and user.metadata_props.get(LAYER_KEY) == layer]
        sites.setdefault(layer, []).append(Site(layer, node, adds[0] if len(users) == len(adds) == 1 else None))
    return sites


def layer_model(graph: Graph, layer: str) -> onnx.ModelProto:
    """The layer alone: from the value that enters it, and `step` if it looks at that, to the one that leaves it.

    The codes of its input, where it has any, are a second output. Raises KeyError for a layer not in `graph.nodes`.
    """
    before, after = graph.nodes[layer]
    model = _loaded(graph.path, graph.path.stat().st_mtime_ns)
    inputs = [before, *(v.name for v in model.graph.inputs if v.name == STEP_INPUT != before)]
    alone = ir.convenience.extract(model.graph, [n for n in inputs if n is not None], [after])
    for value in list(alone.inputs):
        if value.name == STEP_INPUT and not value.uses():
            alone.inputs.remove(value)
    alone.outputs.extend(node.outputs[0] for node in alone if str(node.name).endswith(INPUT_CODES))
    proto: onnx.ModelProto = ir.to_proto(ir.external_data.load_to_model(ir.Model(alone, ir_version=model.ir_version)))
    return proto


@lru_cache(maxsize=1)
def _loaded(path: Path, _: int) -> ir.Model:
    """Parsed once for all layers of a graph; its weights stay on disk."""
    return read_model(path)


def run_layer(
    graph: Graph, layer: str, x: NDArray[np.float32], step: int = 0, *, optimize: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.integer] | None]:
    """The layer's output on x at `step`, and the codes of its input, if it has any, in ONNX Runtime."""
    import numpy as np

    session = open_session(layer_model(graph, layer).SerializeToString(), optimize=optimize)
    x = x.astype(entry_type(graph, layer))
    feed = {session.get_inputs()[0].name: x, STEP_INPUT: np.array(step, np.int64)}
    y, *codes = session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})
    return y.astype(np.float32), codes[0] if codes else None


def entry_type(graph: Graph, layer: str) -> np.dtype[np.generic]:
    """Of the value that enters the layer: float32 or float16."""
    model, name = _loaded(graph.path, graph.path.stat().st_mtime_ns), graph.nodes[layer][0]
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    dtype = next(value.dtype for value in values if value.name == name)
    assert dtype is not None  # the exporter writes graphs with all types
    return dtype.numpy()


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None  # ONNX requires this input of a MatMul, Gemm, Conv or Add
    return value
