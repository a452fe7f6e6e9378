"""Export a call that torch cannot export for any number of rows: one row alone, for two numbers of rows.

`torch.func.vmap` makes the graph of many rows from the call of one row, so the model sees one row only. Its rules need
a constant number of rows. In the graphs of two and of three rows the same nodes stand at the same places, and constants
such as the shapes of reshapes differ by the number of rows: they are computed from the sample in the merged graph.

Shapes: R rows of one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from intaglio.pipeline.errors import StepFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

ROWS = (2, 3)
"""Numbers of rows of the two graphs."""
BATCH = "batch"
_DIFFERENT = "its graphs for 2 and for 3 rows differ in more than the number of rows"


def merged(two: ir.Model, three: ir.Model, sample: str) -> ir.Model:
    """Return `two` as a graph for any number of rows, which is the size of the first axis of the input `sample`.

    Changes both models. Raises StepFailed if they differ in more than the number of rows.
    """
    for model in (two, three):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = list(zip(two.graph, three.graph, strict=False))
    if len(two.graph) != len(three.graph) or any(_kind(a) != _kind(b) for a, b in nodes):
        raise StepFailed(_DIFFERENT)
    _merge_shapes(two.graph.inputs, three.graph.inputs)
    for node, other in nodes:
        _merge_shapes(node.outputs, other.outputs)
    _compute_sizes(two.graph, three.graph, next(value for value in two.graph.inputs if value.name == sample))
    return two


def _kind(node: ir.Node) -> tuple[str, str, str, int]:
    return node.domain, node.op_type, str(sorted(node.attributes.items())), len(node.inputs)


def _merge_shapes(two: Iterable[ir.Value], three: Iterable[ir.Value]) -> None:
    """Make axes that are the rows symbols; other axes that differ are unknown."""
    for a, b in zip(two, three, strict=True):
        if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
            a.shape = None
            continue
        a.shape = ir.Shape(
            [m if m == n else BATCH if (m, n) == ROWS else None for m, n in zip(a.shape, b.shape, strict=True)]
        )


def _compute_sizes(two: ir.Graph, three: ir.Graph, sample: ir.Value) -> None:
    """Replace constants that differ by what they are for any number of rows: offset + R * slope."""
    rows = ir.node("Shape", [sample], {"start": 0, "end": 1}, name="rows")
    scalar = ir.node("Squeeze", [rows.outputs[0]], name="rows_scalar")
    before: list[ir.Node] = [rows, scalar]
    for node, rank in ((rows, (1,)), (scalar, ())):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape(rank)
    replaced = []
    for name, value in list(two.initializers.items()):
        a, b = value.const_value, three.initializers[name].const_value if name in three.initializers else None
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            raise StepFailed(_DIFFERENT)
        if _same(a.numpy(), b.numpy()):
            continue
        if a.dtype != ir.DataType.INT64 or len(a.shape) > 1:
            raise StepFailed(_DIFFERENT)
        slope = b.numpy() - a.numpy()
        offset = a.numpy() - ROWS[0] * slope
        source = (rows if slope.shape else scalar).outputs[0]
        for operation, numbers, neutral in (("Mul", slope, 1), ("Add", offset, 0)):
            if (numbers == neutral).all() and numbers.shape in ((), (1,)):
                continue
            constant = ir.val(f"{name}_{operation.lower()}", const_value=ir.Tensor(numbers.astype(np.int64)))
            two.register_initializer(constant)
            node = ir.node(operation, [source, constant], name=f"{name}_{operation}")
            source = node.outputs[0]
            source.dtype, source.shape = ir.DataType.INT64, ir.Shape(numbers.shape)
            before.append(node)
        replaced.append((value, source))
    two.insert_before(two[0], before)
    for value, source in replaced:
        ir.convenience.replace_all_uses_with(value, source)
        del two.initializers[str(value.name)]


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return a.ctypes.data == b.ctypes.data or a.tobytes() == b.tobytes()  # weights of both graphs are torch's own
