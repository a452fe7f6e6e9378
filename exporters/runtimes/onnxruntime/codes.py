"""Find the largest code of the 8-bit weights of a graph: it decides which kernels multiply the graph exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from intaglio.exporters.float_graph.onnx_file import read_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

INTEGER_PRODUCTS = frozenset(
    {
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "QGemm",
        "QLinearMatMul",
        "QLinearConv",
        "ConvInteger",
    }
)
"""Operators of ONNX Runtime that multiply integers."""
LARGEST = 128
"""Magnitude that no 8-bit code exceeds."""
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVED = ("Cast", "Identity", "Reshape", "Transpose")
_PASSED = (*_MOVED, "Expand", "Flatten", "MaxPool", "Slice", "Squeeze", "Unsqueeze")
"""Operators that ONNX Runtime moves in front of DequantizeLinear, so that the operators after them read codes."""
_DEPTH = 8
"""Largest number of operators between the constant codes of a weight and its product."""


def largest_code(model: Path | bytes, data: Path | None = None) -> int:
    """Return the largest magnitude of the 8-bit codes of weights in a graph, 0 without any, LARGEST if it is unknown.

    It is known where weights are constant codes, or 4-bit codes that are multiplied by the integers of their groups,
    and enter products through DequantizeLinear. `data` is the folder of the external tensors of a model in bytes.
    """
    try:
        graph = _read(model, data).graph
        return max((_entering(node) for node in ir.traversal.RecursiveGraphIterator(graph)), default=0)
    except Exception:  # the session that opens the file reports its fault
        return LARGEST


def _read(model: Path | bytes, data: Path | None) -> ir.Model:
    if isinstance(model, Path):
        return read_model(model)
    read = ir.from_proto(onnx.load_from_string(model))
    if data is not None:
        ir.external_data.set_base_dir(read.graph, data)
    return read


def _entering(node: ir.Node) -> int:
    """Return the largest code of the second factor of a product of codes; 0 if a factor is in float."""
    if node.op_type in INTEGER_PRODUCTS:
        return LARGEST
    if node.op_type not in _PRODUCTS or not _has_codes(node.inputs[0]):
        return 0
    factor = None if (value := node.inputs[1]) is None else value.producer()
    if factor is None or factor.op_type != "DequantizeLinear":
        return 0
    bound = _bound(factor.inputs[0], _DEPTH)
    return LARGEST if bound is None else min(LARGEST, int(np.ceil(bound)))


def _has_codes(value: ir.Value | None) -> bool:
    """Return True if ONNX Runtime can read a value as codes."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSED and (value := node.inputs[0]) is not None:
        node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _bound(value: ir.Value | None, depth: int) -> float | None:
    """Return a magnitude that a value made of constants does not exceed; None for any other value."""
    if value is None or not depth:
        return None
    if value.const_value is not None:
        return _magnitude(value.const_value.numpy())
    node = value.producer()
    if node is None:
        return None
    bounds = [_bound(each, depth - 1) for each in node.inputs[:2]]
    match node.op_type, bounds:
        case op, [float(codes), *_] if op in _MOVED:
            return codes
        case "Mul" | "DequantizeLinear", [float(codes), float(factor)]:
            return codes * factor
        case "QuantizeLinear", [float(codes), float(1.0)]:
            return codes
    return None


def _magnitude(array: NDArray[np.generic]) -> float:
    """Return the largest magnitude of codes, or of scales."""
    numbers = array if array.dtype.kind in "iuf" else array.astype(np.int8)  # numpy does not compare 4-bit codes
    return float(max(numbers.max(), -numbers.min().astype(np.float32))) if numbers.size else 0.0
