"""Write the plan into the float graph: integer weights and rounded inputs, in the form the target executes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from intaglio.pipeline.artifacts.graph import NOT_IN_GRAPH, STEP_INPUT
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, PLAN, QUANTIZED, TARGET
from intaglio.pipeline.artifacts.plan import in_float_lines
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import ContractError, TargetError
from intaglio.pipeline.formats.schemes import FLOAT, Float

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from intaglio.exporters.qdq.call import Call
    from intaglio.exporters.qdq.folding import ChannelScale
    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.artifacts.quantized import Quantized
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.checkpoint import Checkpoint


class ExportQdq(Pass):
    """Write a graph of standard operators; only the rounding of NVFP4 inputs uses an operator of TensorRT.

    The graph makes the same codes as the simulation from the same input. Embedding tables are stored in float16: in
    float32 they would be a quarter of a class-conditional DiT with 4-bit weights. In the returned plan, layers that the
    graph does not contain are in float.
    """

    name: ClassVar[str] = "export-qdq"
    version: ClassVar[int] = 7
    requires: ClassVar[frozenset[AnyKey]] = frozenset({FLOAT_GRAPH, QUANTIZED, PLAN, TARGET})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({MODEL})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, PLAN})
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    def stored_bytes(self, parameters: int, in_files: int) -> int:
        """Return the bytes of 8-bit codes; those of fewer bits take fewer."""
        return parameters

    def run(self, state: State, ctx: Context) -> Outputs:
        """Write the graph. Raises TargetError that lists every layer that the target cannot execute."""
        target, float_graph = state[TARGET], state[FLOAT_GRAPH]
        planned = (name for name, scheme in state[PLAN].schemes.items() if scheme != FLOAT)
        absent = {name: NOT_IN_GRAPH for name in planned if name not in float_graph.nodes}
        plan, quantized = state[PLAN].left_in_float(absent), state[QUANTIZED].only(float_graph.nodes)
        plan.check(target)
        _check_same(plan, quantized)
        graph = write_lowered(ctx.scratch / "model.onnx", float_graph, quantized, target, state.find(MODEL))
        ctx.log.info("wrote %d of %d layers for %s", len(graph.nodes), len(plan.layers), target.name)
        for line in in_float_lines(absent):
            ctx.log.info("%s", line)
        if balanced := [name for name, data in quantized.layers.items() if data.balance is not None]:
            folded = sum(map(graph.is_folded, balanced))
            done = "channel scales of %d of %d balanced layers are folded into the operators before them"
            ctx.log.info(done, folded, len(balanced))
        return {GRAPH: graph, PLAN: plan}


def write_lowered(
    path: Path, graph: Graph, quantized: Quantized, target: Target, source: Checkpoint | None = None
) -> Graph:
    """Write a copy of the float graph in which these layers have rounded weights and inputs, as their schemes say.

    Layers that the graph does not contain are skipped. `source` is the model whose weights the graph leaves out, if it
    leaves out any. Raises TargetError for an opset that the target does not read.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from intaglio.exporters.float_graph.own_weights import read_whole
    from intaglio.exporters.float_graph.torch_export import tensor_specs
    from intaglio.exporters.qdq.folding import fold_scales
    from intaglio.exporters.qdq.group_norm import spell_out_group_norm
    from intaglio.exporters.qdq.half import type_half

    model = read_whole(graph, source)
    if (opset := model.opset_imports[""]) > target.opset_max:
        raise TargetError(f"the float graph has opset {opset}, but {target.name} reads up to {target.opset_max}")
    spell_out_group_norm(model.graph, target)
    calls = _find_calls(model.graph, quantized)
    nodes = {c.site.layer: (str(c.site.x.name), str(c.site.y.name)) for c in reversed(calls)}
    ends = {str(end.name) for call in calls for end in (call.site.x, call.site.y)}
    scales = _rewrite(model.graph, calls, target)
    model.graph.sort()  # a bias may be computed after the product, and is read where the product was
    _declare(model)
    scaled, factors = fold_scales(model.graph, scales, ends, symmetric=target.limits.symmetric)
    amax = {name: largest * factors.get(name, 1.0) for name, largest in graph.amax.items()}
    if target.float_type == "float16":
        integer = {name for name, data in quantized.layers.items() if not isinstance(data.scheme.input, Float)}
        type_half(model, integer, amax)
    RemoveUnusedNodesPass()(model)
    _halve_tables(model.graph)
    ir.save(model, path, external_data="model.onnx.data")
    onnx.checker.check_model(path, full_check=True)
    return replace(
        graph,
        path=path,
        inputs=tensor_specs(model.graph.inputs),
        timesteps=quantized.timesteps if quantized.stepped else (),
        nodes={name: nodes[name] for name in sorted(nodes)},
        amax=amax,
        scaled=scaled,
        weights={},
    )


def _check_same(plan: QuantPlan, quantized: Quantized) -> None:
    """Raise ContractError if the schemes of the integers differ from those of the plan."""
    planned = {name: scheme for name, scheme in plan.schemes.items() if scheme != FLOAT}
    made = {name: data.scheme for name, data in quantized.layers.items()}
    if wrong := sorted(name for name in planned.keys() | made.keys() if planned.get(name) != made.get(name)):
        raise ContractError(
            f"the plan and the quantized weights have different schemes for {', '.join(wrong)}: run `merge` after the"
            " last change of the plan"
        )


def _find_calls(graph: ir.Graph, quantized: Quantized) -> list[Call]:
    """Return every call of every quantized layer, in the graph's order."""
    from intaglio.exporters.float_graph.sites import find_sites
    from intaglio.exporters.qdq.call import Call

    calls = {
        site.product: Call(site, quantized.layers[name], f"{name}@{i}" if i else name)
        for name, sites in find_sites(graph).items()
        if name in quantized.layers
        for i, site in enumerate(sites)
    }
    return [calls[node] for node in graph if node in calls]


def _rewrite(graph: ir.Graph, calls: list[Call], target: Target) -> list[ChannelScale]:
    """Replace every call by its form on the target. Changes `graph`; values between layers keep their names.

    Returns the multiplications by channel scales in front of balanced layers.
    """
    import numpy as np
    import onnx_ir as ir

    from intaglio.exporters.qdq.call import carrier_scale
    from intaglio.exporters.qdq.lowering import lowering
    from intaglio.exporters.qdq.writer import Writer

    step = ir.Value(name=STEP_INPUT, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    if any(call.data.tables.stepped for call in calls):
        graph.inputs.append(step)
    # find all rows and scales before the first change: rewriting replaces values
    rows = [lowering(call.op, call.data.scheme, target.runtime) for call in calls]
    keys = {call.input_key for call in calls}
    carriers = {key: carrier_scale([c for c in calls if c.input_key == key]) for key in keys if key is not None}
    writer = Writer(graph, step, np.uint8(128) if target.activation_dtype == "uint8" else np.int8(0), carriers)
    for call, row in zip(calls, rows, strict=True):
        old, new = call.site.y, writer.write(call, row.product, row.entering)
        new.type, new.shape = old.type, old.shape
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove([n for n in (call.site.add, call.site.product) if n is not None], safe=True)
        new.name = name
    return writer.scales


def _declare(model: ir.Model) -> None:
    """Declare the domains of all operators; with FP4 numbers, at least the opset and IR version that have them."""
    import onnx_ir as ir

    for node in model.graph:
        if node.domain not in model.opset_imports:
            model.opset_imports[node.domain] = 1
    if any(value.dtype == ir.DataType.FLOAT4E2M1 for value in model.graph.initializers.values()):
        model.opset_imports[""] = max(model.opset_imports[""] or 0, 23)
        model.ir_version = max(model.ir_version, 11)


def _halve_tables(graph: ir.Graph) -> None:
    """Store in float16 the tables (rows, features) that only Gather reads, and cast the rows. Changes `graph`."""
    import onnx_ir as ir
    import torch

    from intaglio.pipeline.numerics.rounding import half_table

    for table in graph.initializers.values():
        picks = [use.node for use in table.uses() if use.node.op_type == "Gather" and use.idx == 0]
        by_row = all(not node.attributes.get_int("axis", 0) for node in picks)
        if table.dtype != ir.DataType.FLOAT or len(table.shape or ()) != 2 or not by_row:
            continue
        if not picks or len(picks) < len(table.uses()):
            continue
        assert table.const_value is not None  # initializers that were read from a file have a value
        half = half_table(torch.from_numpy(table.const_value.numpy().copy()))
        if half.dtype != torch.float16:
            continue
        table.const_value, table.type = ir.Tensor(half.numpy(), name=table.name), ir.TensorType(ir.DataType.FLOAT16)
        for node in picks:
            rows = node.outputs[0]
            whole = ir.Value(name=rows.name, type=rows.type, shape=rows.shape)
            ir.convenience.replace_all_uses_with(rows, whole, replace_graph_outputs=True)
            rows.name, rows.type = f"{whole.name}/half", table.type
            attributes = {"to": int(ir.DataType.FLOAT)}
            graph.insert_after(node, ir.node("Cast", [rows], attributes, outputs=[whole], name=f"{node.name}/Cast"))
