"""Rewrite nodes of torch's exporter that follow torch's rules instead of ONNX's, or part a product from its bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern


def repair(graph: ir.Graph) -> None:
    """Replace each node that ONNX or its runtimes read differently from torch. Changes `graph`."""
    for node in list(graph):
        match node.op_type:
            case "Squeeze" if len(node.inputs) > 1:
                _keep_long_axes(graph, node)
            case "Where" if node.outputs[0].dtype == ir.DataType.BOOL:
                _choose_by_logic(graph, node)
            case "Add":
                _add_before_reshape(graph, node)


def _keep_long_axes(graph: ir.Graph, node: ir.Node) -> None:
    """Drop axes from Squeeze whose size is not 1: torch ignores them, ONNX refuses the model."""
    x, listed = node.inputs[:2]
    axes = None if listed is None else ir.convenience.get_const_tensor(listed)
    if x is None or x.shape is None or axes is None:
        return
    given = [int(axis) for axis in axes.numpy().reshape(-1)]
    short = [axis for axis in given if x.shape[axis] == 1]
    if short == given:
        return
    if short:
        kept = ir.val(f"{node.outputs[0].name}_axes", const_value=ir.Tensor(np.array(short, np.int64)))
        graph.register_initializer(kept)
        node.replace_input_with(1, kept)
    else:
        ir.convenience.replace_all_uses_with(node.outputs[0], x, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _choose_by_logic(graph: ir.Graph, node: ir.Node) -> None:
    """Replace Where(c, x, y) of booleans by (c and x) or (not c and y): ONNX Runtime has no Where for them."""
    c, x, y = node.inputs
    old = node.outputs[0]
    first, negated = ir.node("And", [c, x]), ir.node("Not", [c])
    second = ir.node("And", [negated.outputs[0], y])
    either = ir.node("Or", [first.outputs[0], second.outputs[0]])
    for new in (first, negated, second, either):
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    either.outputs[0].shape, either.outputs[0].name = old.shape, old.name
    graph.insert_before(node, [first, negated, second, either])
    ir.convenience.replace_all_uses_with(old, either.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _add_before_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Add a bias to the product itself, and not to a Reshape of it that keeps the last axis, the bias' own."""
    for reshaped, bias in (node.inputs, node.inputs[::-1]):
        reshape = _only_for(reshaped, "Reshape")
        product = None if reshape is None else _only_for(reshape.inputs[0], "MatMul")
        if reshape is None or product is None or bias is None or not bias.is_initializer():
            continue
        old, widths = (
            product.outputs[0],
            {_last_size(value) for value in (product.outputs[0], reshape.outputs[0], bias)},
        )
        if len(widths) > 1 or None in widths or bias.shape is None or len(bias.shape) != 1:
            continue
        added = ir.node("Add", [old, bias], name=node.name)
        added.metadata_props.update(node.metadata_props)
        added.outputs[0].type, added.outputs[0].shape = old.type, old.shape
        graph.insert_before(reshape, added)
        reshape.replace_input_with(0, added.outputs[0])
        ir.convenience.replace_all_uses_with(node.outputs[0], reshape.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return


def _only_for(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that computes a value for one other node, if it is of this kind."""
    node = None if value is None or value.is_graph_output() or len(value.uses()) != 1 else value.producer()
    return node if node is not None and node.op_type == kind else None


def _last_size(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape else None
    return size if isinstance(size, int) else None


def transposed_keys() -> pattern.RewriteRule:
    """Return the rule that makes one Transpose of the keys of attention.

    The exporter flattens the axes before the last two, to sizes that it takes from the shape at run time. Then the
    shape of the product is unknown, and the runtime keeps two copies of the attention scores.
    """
    return pattern.RewriteRule(_flattened_keys, _one_transpose, _sizes_are_of_the_shape)


def _flattened_keys(op: Any, x: ir.Value, flat: ir.Value) -> Any:  # onnxscript's builder has no types
    shape = op.Shape(x)
    first, rows, columns = (op.Slice(shape, pattern.Var(f"from_{i}"), pattern.Var(f"to_{i}")) for i in range(3))
    flattened = op.Reshape(x, op.Concat(flat, rows, columns, axis=0))
    turned = op.Transpose(flattened, perm=[0, 2, 1])
    return op.Reshape(turned, op.Concat(first, columns, rows, axis=0))


def _sizes_are_of_the_shape(context: Any, x: ir.Value, **numbers: ir.Value) -> bool:
    """Return True if the sizes are shape[:-2], shape[-2:-1] and shape[-1:]."""
    found = {name: ir.convenience.get_const_tensor(value) for name, value in numbers.items()}
    value = {name: int(t.numpy().item()) for name, t in found.items() if t is not None and t.size == 1}
    begin, end = value.pop("from_0", 1), value.pop("to_2", 0)
    inner = {"flat": -1, "to_0": -2, "from_1": -2, "to_1": -1, "from_2": -1}
    return x.shape is not None and value == inner and end >= len(x.shape) and (begin == 0 or begin <= -len(x.shape))


def _one_transpose(op: Any, x: ir.Value, **_: ir.Value) -> Any:
    assert x.shape is not None  # `_sizes_are_of_the_shape` checked it
    *first, rows, columns = range(len(x.shape))
    return op.Transpose(x, perm=[*first, columns, rows])
