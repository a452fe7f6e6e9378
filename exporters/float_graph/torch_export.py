"""Export one call with torch's exporter, then correct names and axes in its graph and remove unused nodes.

Shapes: R rows of one call.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import nn

from intaglio.exporters.float_graph.capture import Calls, Compute, capture, silent
from intaglio.exporters.float_graph.own_weights import leave_out, own_weights
from intaglio.exporters.float_graph.repair import repair, transposed_keys
from intaglio.exporters.float_graph.sites import LAYER_KEY, Site, find_sites
from intaglio.exporters.float_graph.turned import TurnedWeights
from intaglio.pipeline.artifacts.graph import Graph, Interface, TensorSpec, fixed_constant
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.files import one_line
from intaglio.pipeline.model.layers import layer_table

if TYPE_CHECKING:
    from pathlib import Path


PRODUCTS = ("MatMul", "Gemm", "Conv")
"""Operators that torch's exporter writes for a Linear or a convolution."""


def write_graph(
    path: Path,
    module: nn.Module,
    compute: Compute,
    calls: Calls,
    outputs: Sequence[str],
    *,
    opset: int,
    called: str,
    whole: bool = True,
) -> Graph:
    """Export `module`, as `compute` calls it, as a float32 graph in files of its own.

    `called` is the name of the module in error messages. The graph has these outputs and the dynamic axes of `calls`.
    The metadata of every node of a layer has the layer's name. Inputs that are constants of the graph, because their
    values decide what is computed, are constants of its interface. Unless `whole`, the files leave out the weights of a
    large module that stay in its own files. Raises StepFailed.
    """
    exported, fixed = capture(module, compute, calls, outputs, opset, called)
    constants = list(exported.graph.initializers.values())
    _name_calls(exported, module)
    repair(exported.graph)
    _simplify(exported)
    axes = _axis_names(exported.graph, calls)
    _keep_layer_names(exported, frozenset(layer.name for layer in layer_table(module)), axes)
    sites = find_sites(exported.graph)
    _check_weights(module, sites)
    nodes = {name: (str(s[0].x.name), str(s[0].y.name)) for name, s in sites.items()}
    ends = tensor_specs(exported.graph.inputs), tensor_specs(exported.graph.outputs)
    weights = {} if whole else own_weights(exported.graph, module)
    leave_out(exported.graph, weights)
    ir.save(exported, path, external_data="model.onnx.data")
    _check_valid(path, called)
    # onnxscript's rules keep the graph that they last looked at, and its weights are torch's own
    for constant in (*constants, *exported.graph.initializers.values()):
        constant.const_value = None
    interface = Interface(constants={name: fixed_constant(value) for name, value in fixed.items()})
    sizes = calls.sizes(axes)
    return Graph(path, *ends, nodes=nodes, timestep=None, sizes=sizes, interface=interface, weights=weights)


def _check_valid(path: Path, called: str) -> None:
    """Raise StepFailed if the graph is no valid ONNX, such as a convolution in bfloat16."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StepFailed(
            f"torch exports {called} as a graph that is not valid ONNX: {one_line(error)}: correct what the model does"
            " there; it may cast to another type than float32"
        ) from error


def tensor_specs(values: Sequence[ir.Value]) -> dict[str, TensorSpec]:
    """Return element types and shapes of graph inputs or outputs, by name."""
    return {
        str(v.name): TensorSpec(v.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in v.shape))
        for v in values
        if v.dtype is not None and v.shape is not None
    }


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop nodes without effect. Changes `model`.

    The exporter's own optimizer drops additions of 1e-8 or less, which makes x / (|x| + eps) NaN.
    """
    nothing = (
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        transposed_keys(),
    )
    with silent():
        for _ in range(2):
            turned = TurnedWeights(model.graph)
            optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=turned.note)
            turned.release()
            rewriter.rewrite(model, nothing)
        Sequential(
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
        )(model)
        products = [node for node in model.graph if node.op_type in PRODUCTS]
        for node in products:  # two layers with equal weights on one input stay separate
            node.attributes["layer"] = ir.AttrString("layer", _module_path(node))
        common.CommonSubexpressionEliminationPass()(model)
        for node in products:
            del node.attributes["layer"]
        Sequential(common.OutputFixPass(), common.RemoveUnusedOpsetsPass())(model)


def _module_path(node: ir.Node) -> str:
    """Return the path of the module that the exporter made the node for; empty if unknown."""
    return _scope(node, "name_scopes").removeprefix("module.")


def _scope(node: ir.Node, of: str) -> str:
    """Return the innermost module's entry in one of the lists that the exporter attaches to a node."""
    scopes = ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{of}", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _axis_names(graph: ir.Graph, calls: Calls) -> dict[str, tuple[str, str, int]]:
    """Return for each symbol of a dynamic axis its name, and an input and an axis that have it."""
    names: dict[str, tuple[str, str, int]] = {}
    for value in graph.inputs:
        name = str(value.name)
        assert value.shape is not None  # the exporter's inputs have shapes
        for axis in calls.dynamic_axes(name):
            rows = axis == 0 and name not in calls.shared
            names.setdefault(str(value.shape[axis]), ("batch" if rows else f"{name}_{axis}", name, axis))
    return names


def _name_calls(model: ir.Model, module: nn.Module) -> None:
    """Give every product of a layer the layer's name in the table as its scope. Changes `model`.

    If a module is registered or called in several places, torch may use any of its paths, or a path that does not
    exist. So a product belongs to the layer that has the class in its scope and holds its weight. Layers that share a
    weight are told apart by their paths.
    """
    layers = {layer.name: module.get_submodule(layer.name) for layer in layer_table(module)}
    names = {layer: name for name, layer in layers.items()}
    paths = {path: names[part] for path, part in module.named_modules(remove_duplicate=False) if part in names}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    holders: dict[nn.Parameter, list[str]] = {}
    for name, layer in layers.items():
        holders.setdefault(layer.get_parameter("weight"), []).append(name)
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in PRODUCTS and len(node.inputs) > 1 else None
        if weight is None:
            continue
        made = weight.producer()
        source = made.inputs[0] if made is not None and made.op_type == "Transpose" else weight
        parameter = None if source is None else parameters.get(str(source.name).removeprefix("module."))
        if parameter is None:  # not a plain weight: `_check_weights` compares it with the layer's
            continue
        path, kind, held = _module_path(node), _scope(node, "class_hierarchy"), holders.get(parameter, [])
        alike = [n for n in held if kind == f"{type(layers[n]).__module__}.{type(layers[n]).__qualname__}"]
        name = paths[path] if paths.get(path) in alike else alike[0] if len(alike) == 1 else ""
        if name == path or not (name or path in layers):
            continue
        users = [use.node for use in node.outputs[0].uses()]
        for each in (node, *(user for user in users if user.op_type == "Add" and _module_path(user) == path)):
            each.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", name, ""])


def _keep_layer_names(model: ir.Model, layers: frozenset[str], axes: Mapping[str, tuple[str, str, int]]) -> None:
    """Remove all metadata except the name of each node's layer, so that no path remains, and name the axes.

    Changes `model`.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is not None and value.const_value is None:
            value.shape = ir.Shape([_axis(size, axes) for size in value.shape])
    for node in graph:
        layer = _module_path(node)
        node.metadata_props.clear()
        node.doc_string = None
        if layer in layers:
            node.metadata_props[LAYER_KEY] = layer
            node.name = f"{layer}/{node.op_type}"
    for described in (model, graph):
        described.metadata_props.clear()
        described.doc_string = None
    model.producer_name, model.producer_version = "intaglio", None
    common.NameFixPass()(model)


def _axis(size: int | ir.SymbolicDim, axes: Mapping[str, tuple[str, str, int]]) -> int | str | None:
    if isinstance(size, int):
        return size
    return axes[str(size)][0] if str(size) in axes else None


def _check_weights(module: nn.Module, sites: dict[str, list[Site]]) -> None:
    """Raise StepFailed for every layer whose product has another weight than the layer."""
    problems = [
        f"{name}: the exported {site.product.op_type} {site.product.name} has another weight than the layer"
        for name, calls in sites.items()
        for site in calls
        if not np.array_equal(site.weight(), module.get_parameter(f"{name}.weight").detach().numpy())
    ]
    if problems:
        raise StepFailed(*problems)
