"""Fold the transposes of a model's weights without holding the transposed weights in memory."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

LARGE = 1 << 13
"""Number of elements from which on a folded constant is read again when it is needed."""


TURNED = "turned"
"""Key in a tensor's own data of the constant that it is read from, and of the order of its axes."""


def turned(constant: ir.TensorProtocol, order: tuple[int, ...], name: str) -> ir.TensorProtocol:
    """Return a constant with its axes in another order, under a name; it is transposed each time that it is read."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(constant.numpy().transpose(order), name=name)

    sizes = constant.shape.numpy()
    made = ir.LazyTensor(read, constant.dtype, ir.Shape([sizes[axis] for axis in order]), name=name)
    made.meta[TURNED] = constant, order
    return made


def origin(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, tuple[int, ...]]:
    """Return the constant behind all transposes of a tensor, and the order in which the tensor has its axes."""
    order = tuple(range(len(tensor.shape)))
    while TURNED in tensor.meta:
        tensor, inner = tensor.meta[TURNED]
        order = tuple(inner[axis] for axis in order)
    return tensor, order


class _Folded(NamedTuple):
    """A transpose that is about to be folded: its result's name, the constant, and the order of its axes."""

    name: str
    constant: ir.TensorProtocol
    order: tuple[int, ...]


class TurnedWeights:
    """Replaces each weight that constant folding transposes by one that is transposed when it is read.

    onnxscript folds the nodes one after the other, and asks before each: at the next question, the last transposed
    weight is replaced. So one of them is in memory at a time.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._last: _Folded | None = None

    def note(self, node: ir.Node) -> bool | None:
        """Note a node that may be folded next, for `should_fold` of the optimizer, which is to decide by itself."""
        self.release()
        constant = None if node.op_type != "Transpose" or node.inputs[0] is None else node.inputs[0].const_value
        if constant is not None and constant.size > LARGE:
            order = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(constant.shape))))
            self._last = _Folded(str(node.outputs[0].name), constant, tuple(order))
        return None

    def release(self) -> None:
        """Release the weight that was transposed last, if its node was folded."""
        last, self._last = self._last, None
        if last is not None and (made := self._graph.initializers.get(last.name)) is not None:
            made.const_value = turned(last.constant, last.order, last.name)
