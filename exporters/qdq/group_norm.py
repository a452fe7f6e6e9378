"""Write group normalization in older operators, for runtimes that do not know, misread or expand the operator.

Shapes: B batch, C channels, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target

NAME = "GroupNormalization-21"
"""Name in `limits.unsupported` and `limits.expanded` of the operator since opset 21.

Its `scale` has one value for each channel."""


ONE_GROUP = "one-group-norm"
"""Name in `limits.forms`: with one group, the target normalizes each channel alone."""


def spell_out_group_norm(graph: ir.Graph, target: Target) -> None:
    """Replace each GroupNormalization by older operators if the target refuses it, misreads it or has no kernel for it.

    y = InstanceNormalization(x as (B, G, rest)) in x's shape, times scale, plus bias. Where the target has no kernel,
    the last two are one BatchNormalization, and x keeps its shape if each channel is a group. Changes `graph`.
    """
    limits = target.limits
    always, misread = NAME in (*limits.unsupported, *limits.expanded), ONE_GROUP in limits.forms
    for node in [n for n in graph if n.op_type == "GroupNormalization"]:
        if always or (misread and node.attributes.get_int("num_groups", 1) == 1):
            _spell_out(graph, node, in_one_pass=NAME in limits.expanded)


def _spell_out(graph: ir.Graph, node: ir.Node, *, in_one_pass: bool) -> None:
    x, scale, bias = node.inputs
    assert x is not None  # ONNX requires all three
    assert scale is not None
    assert bias is not None
    assert x.shape is not None  # inferred when the graph was exported

    def constant(role: str, array: NDArray[np.generic]) -> ir.Value:
        value = ir.val(f"{node.name}/{role}", const_value=ir.Tensor(array, name=f"{node.name}/{role}"))
        graph.register_initializer(value)
        return value

    def same(role: str, value: float, count: int) -> ir.Value:
        return constant(role, np.full(count, value, np.float32))

    groups = node.attributes.get_int("num_groups", 1)
    channels = x.shape[1] if isinstance(x.shape[1], int) else None
    epsilon = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    new = tape.Tape()
    if in_one_pass and groups == channels:
        y = new.op("InstanceNormalization", [x, scale, bias], epsilon)
    else:
        grouped = new.op("Reshape", [x, constant("groups", np.array([0, groups, -1]))])
        moments = [same("ones", 1, groups), same("zeros", 0, groups)]
        unit = new.op("Reshape", [new.op("InstanceNormalization", [grouped, *moments], epsilon), new.op("Shape", [x])])
        if in_one_pass and channels is not None:
            mean_and_variance = [same("mean", 0, channels), same("variance", 1, channels)]
            y = new.op("BatchNormalization", [unit, scale, bias, *mean_and_variance], {"epsilon": 0.0})
        else:
            axes = constant("axes", np.array([-1, *(1 for _ in x.shape[2:])]))
            scaled = new.op("Mul", [unit, new.op("Reshape", [scale, axes])])
            y = new.op("Add", [scaled, new.op("Reshape", [bias, axes])])
    for i, each in enumerate(new.nodes):
        each.name = f"{node.name}/{i}/{each.op_type}"
        each.outputs[0].name = f"{each.name}:0"
    graph.insert_before(node, new.nodes)
    old, name = node.outputs[0], node.outputs[0].name
    y.type, y.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    y.name = name
