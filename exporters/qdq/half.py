"""Choose float16 or float32 for each value of a float32 graph, for a runtime that computes in half precision.

float16 has 11 bits of precision from 2^-14 to 65504. A node computes in one of both types; what passes between nodes of
different types is cast once. Inputs and outputs of the graph stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from intaglio.exporters.float_graph.products import constant, dequantized, producer
from intaglio.exporters.float_graph.sites import BASIS, BRANCH, LAYER_KEY

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_TYPES = (_HALF, _FLOAT)

HALF_EPS = 2.0**-11
"""Largest relative error of rounding to float16, within its normal range."""
HALF_MAX = 65504.0
MASKING = 1e30
"""A constant as large as this stands for infinity: masks have the largest number of float32."""
AMAX_LOW, AMAX_HIGH = 2.0**-14, 2.0**14
"""Range of recorded magnitudes in which a value becomes float16.

It ends at a quarter of float16's largest number, because values that were not recorded may be larger."""

EXPONENT_AMAX = 2.0**8
"""Largest recorded magnitude of an exponent in float16: it is rounded by up to 1/16, and its power changes by 6 %."""

STATISTICS = frozenset(
    {"Exp", "Log", "Pow", "Reciprocal", "Sqrt"}
    | {f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")}
)
"""Operators whose results can exceed float16 even if their inputs do not.

Operators that combine such a result with other values stay in float32 too."""
CAREFUL = STATISTICS | {
    "BatchNormalization",
    "Cast",
    "Cos",
    "CumSum",
    "GroupNormalization",
    "If",
    "InstanceNormalization",
    "LayerNormalization",
    "LogSoftmax",
    "Loop",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
    "Range",
    "Scan",
    "Sin",
    "Softmax",
}
"""Operators that compute in float32; all except STATISTICS have results that float16 holds."""
EXPONENTIAL = frozenset({"Exp", "LogSoftmax", "Softmax"})
PERIODIC = frozenset({"Sin", "Cos"})
"""An angle of 1000 is only known to 0.5 in float16: all that leads to it from the graph's inputs is float32."""
ELEMENTWISE = frozenset(
    {"Abs", "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish"}
    | {"Mul", "Neg", "PRelu", "Relu", "Sigmoid", "Softplus", "Softsign", "Sub", "Swish", "Tanh", "Where"}
)
PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})


def type_half(model: ir.Model, layers: Collection[str], amax: Mapping[str, float]) -> None:
    """Make all nodes float16 that do not need float32. Changes `model`.

    Nodes of `layers` need it; nodes of their branches may be float16.

    `amax`: the largest recorded magnitude of each value, by name.
    """
    common.ShapeInferencePass(data_prop=False)(model)
    graph, opset = model.graph, model.opset_imports[""]
    typer = _Typer(graph, opset, _wide_nodes(graph, opset, layers, amax))
    for node in list(graph):
        typer.type_node(node)
    typer.keep_outputs()


def _wide_nodes(graph: ir.Graph, opset: int, layers: Collection[str], amax: Mapping[str, float]) -> set[ir.Node]:
    """Return the nodes that compute in float32."""
    wide = {
        node
        for node in graph
        if node.op_type in CAREFUL
        or node.domain not in ("", "ai.onnx")
        or (node.metadata_props.get(LAYER_KEY) in layers and f"/{BRANCH}/" not in str(node.name))
        or not any(_is_float(value) for value in node.inputs)
        or any(use.node.graph is not graph for value in node.outputs for use in value.uses())
        or not all(_within(value, amax) for value in (*_given(node.inputs), *node.outputs))
        or not all(_fits(node, place) for place in _half_inputs(node, opset))
    }
    _add_angles(graph, wide)
    _add_bases(graph, layers, wide)
    wide |= {n for n in graph if n.op_type in ELEMENTWISE and any(_made_by(v, STATISTICS) for v in n.inputs)}
    for node in graph:  # a Cast between DequantizeLinear and a product keeps its weight from being read as it is stored
        operands = [dequantized(value) for value in node.inputs] if node.op_type in PRODUCTS else []
        whole = {node, *(part for o in operands if o is not None for part in (o.dequantize, *o.between))}
        if len(whole) > 1 and not wide.isdisjoint(whole):
            wide.update(whole)
    _go_on(graph, wide)
    return wide


def _add_angles(graph: ir.Graph, wide: set[ir.Node]) -> None:
    """Add all nodes that compute an angle. Changes `wide`.

    They lie between each Sin and Cos and the graph's inputs or a layer.
    """
    pending = [value for node in graph if node.op_type in PERIODIC for value in node.inputs]
    while pending:
        maker = producer(pending.pop())
        if maker is not None and LAYER_KEY not in maker.metadata_props:
            wide.add(maker)
            pending += [value for value in maker.inputs if _is_float(value)]


def _add_bases(graph: ir.Graph, layers: Collection[str], wide: set[ir.Node]) -> None:
    """Add the nodes that transform an input of `layers` to its basis. Changes `wide`.

    They are added even if they were written for another layer.
    """
    pending = [v for node in graph if node.metadata_props.get(LAYER_KEY) in layers for v in node.inputs]
    while pending:
        maker = producer(pending.pop())
        if maker is not None and f"/{BASIS}/" in str(maker.name) and maker not in wide:
            wide.add(maker)
            pending += _computed(maker)


def _go_on(graph: ir.Graph, wide: set[ir.Node]) -> None:
    """Add nodes that compute from one float32 value, and nodes that only pass it on to float32 nodes. Changes `wide`.

    A Cast before such a node would round once more, and TensorRT-RTX 1.7.1 ends the kernel of a GroupNormalization at
    it. After a Softmax float16 is used instead: the builder fails on float32 nodes between the Softmax and the product
    of its attention, and float16 holds weights of at most 1. A sum of two values is float16 too: it is written to
    memory and read by several nodes, so half the bytes are a gain.
    """
    origin: dict[ir.Value, ir.Value] = {}
    more = set()
    for node in graph:
        sources = {origin.get(value, value) for value in _computed(node)}
        behind_softmax = any(_made_by(value, frozenset({"Softmax"})) for value in sources)
        if node not in wide and node.op_type not in PRODUCTS and len(sources) == 1 and not behind_softmax:
            more.add(node)
            origin.update(dict.fromkeys(node.outputs, sources.pop()))
    while True:
        both = wide | more
        out = {
            node
            for node in more
            if not all(maker is None or maker in both for maker in map(producer, _computed(node)))
            or not (node.op_type in ELEMENTWISE or all(use.node in both for v in node.outputs for use in v.uses()))
        }
        if not out:
            break
        more -= out
    wide |= more


def _computed(node: ir.Node) -> list[ir.Value]:
    """Return the floating-point values that a node reads, without constants."""
    return [value for value in node.inputs if value is not None and _is_float(value) and constant(value) is None]


def _made_by(value: ir.Value | None, op_types: frozenset[str]) -> bool:
    maker = producer(value)
    return maker is not None and maker.op_type in op_types


def _given(values: Sequence[ir.Value | None]) -> Iterator[ir.Value]:
    return (value for value in values if value is not None)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == _FLOAT


def _within(value: ir.Value, amax: Mapping[str, float]) -> bool:
    """Return True if float16 holds the recorded range. Zero fits, and so does infinity, which masks have on purpose."""
    recorded = amax.get(str(value.name), 0.0)
    exponent = any(use.node.op_type in EXPONENTIAL for use in value.uses())
    return recorded in (0.0, float("inf")) or AMAX_LOW <= recorded <= (EXPONENT_AMAX if exponent else AMAX_HIGH)


def _fits(node: ir.Node, place: int) -> bool:
    """Return True if float16 holds the constant at this input, or if the input is no constant."""
    if (tensor := constant(node.inputs[place])) is None:
        return True
    if LAYER_KEY in node.metadata_props and (node.op_type == "Add" or place == 2):
        # a bias: float16 loses digits below 2^-14, which the rounding of a larger sum loses as well
        return bool(np.abs(tensor.numpy()).max(initial=0) <= HALF_MAX)
    return holds(tensor.numpy(), each=node.op_type == "DequantizeLinear")


def holds(array: NDArray[np.float32], *, each: bool) -> bool:
    """Return True if rounding to float16 changes the constant by at most 2^-11 of it.

    Each element is compared if `each` is True, else their L2 norm; then elements far below the others may round to
    zero. A value that stands for infinity becomes infinity.
    """
    finite = array[np.abs(array) < MASKING].astype(np.float32)
    error = np.abs(_halved(finite).astype(np.float32) - finite)
    if not np.isfinite(error).all():
        return False
    if each:
        return bool(np.all(error <= HALF_EPS * np.abs(finite)))
    return bool(np.linalg.norm(error) <= HALF_EPS * np.linalg.norm(finite))


def _halved(array: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def _half_inputs(node: ir.Node, opset: int) -> Iterator[int]:
    """Yield the places of the floating-point inputs that the operator accepts in float16."""
    formals = _schema(node.op_type, opset).inputs
    for place, value in enumerate(node.inputs):
        formal = formals[min(place, len(formals) - 1)]  # the last may stand for any number of inputs
        if value is not None and value.dtype in _TYPES and "tensor(float16)" in formal.types:
            yield place


@lru_cache(maxsize=1024)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, opset)


@dataclass
class _Typer:
    """Casts the inputs of each node to the type in which it computes. Call `type_node` in the graph's order."""

    graph: ir.Graph
    opset: int
    wide: set[ir.Node]
    _cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def type_node(self, node: ir.Node) -> None:
        half = () if node in self.wide else tuple(_half_inputs(node, self.opset))
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype in _TYPES:
                node.replace_input_with(place, self._as(value, _HALF if place in half else _FLOAT))
        if half:
            for value in node.outputs:
                if value.dtype == _FLOAT:
                    value.dtype = _HALF

    def keep_outputs(self) -> None:
        """Make the graph's outputs float32 again; they keep their names."""
        for place, value in enumerate(self.graph.outputs):
            if value.dtype == _HALF:
                name, cast = value.name, self._as(value, _FLOAT)
                self.graph.outputs[place] = cast
                value.name, cast.name = f"{name}/half", name

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in this type: a constant, or the output of one Cast that all readers share."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._cast:
            tensor = constant(value)
            self._cast[value, dtype] = self._node(value, dtype) if tensor is None else self._constant(value, tensor)
        return self._cast[value, dtype]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        name, shape = f"{value.name}/half", ir.Shape(tensor.shape.numpy())
        # read when the file is written, so that the model is not in memory twice
        half = ir.LazyTensor(lambda: ir.Tensor(_halved(tensor.numpy()), name=name), _HALF, shape, name=name)
        made = ir.Value(name=name, type=ir.TensorType(_HALF), shape=shape, const_value=half)
        self.graph.register_initializer(made)
        return made

    def _node(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        role = "half" if dtype == _HALF else "float"
        node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{value.name}/Cast/{role}")
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{value.name}/{role}", dtype, value.shape
        if (maker := value.producer()) is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        return made
