"""Export the denoiser in full precision: once, for every target and every plan.

Shapes: R rows of one call.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import io
import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import StepFailed, TargetError
from intaglio.pipeline.graph import Graph, Interface, TensorSpec
from intaglio.pipeline.keys import FLOAT_GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import onnx_ir as ir
    import onnxruntime
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from intaglio.exporters._layer import Site
    from intaglio.pipeline.checkpoint import Factory
    from intaglio.pipeline.denoiser import Inputs
    from intaglio.pipeline.trajectory import Trajectory

TOLERANCE = 1e-4
"""Relative L2 error that a whole network may have for the order of its float32 sums; a wrong graph is far from it."""
HALF_TOLERANCE = 1e-2
"""The same where inputs and outputs were recorded in float16: a network may answer 2^-11 with some times as much."""
RANGE_STEPS, RANGE_ROWS = 5, 4
"""Recorded calls, from first to last, and rows of each, that magnitudes are taken from: float16 keeps a margin."""


class ExportFloat(Pass):
    """The graph computes what torch does at any number of rows, and every node knows the layer it came from.

    Axes that have another size in the model's other call are dynamic too.
    """

    name: ClassVar[str] = "export-float"
    version: ClassVar[int] = 5
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({FLOAT_GRAPH})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "onnxscript", "onnx-ir")

    opset: int = Field(21, ge=21, le=22, description="ONNX opset; 21 has 4-bit weights, 23 hides attention's products")

    def check(self, target: Target) -> None:
        """Raises TargetError for an opset that the target does not read."""
        if self.opset > target.opset_max:
            raise TargetError(f"opset {self.opset}, but {target.name} reads up to {target.opset_max}")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises StepFailed where the graph does not compute what torch does."""
        graph, expected = self._write_graph(state, ctx)
        gc.collect()  # the wrapped module is in a cycle
        tolerance = HALF_TOLERANCE if state[TRAJECTORY].half else TOLERANCE
        amax = _magnitudes(graph.path, state[TRAJECTORY], tolerance, ctx)
        _check_outputs(graph.path, expected, tolerance)
        return {FLOAT_GRAPH: replace(graph, amax=amax)}

    def _write_graph(self, state: State, ctx: Context) -> tuple[Graph, list[Expected]]:
        """The graph's files, and what torch returns for the calls that it is checked with beside those recorded."""
        import onnx
        import onnx_ir as ir

        from intaglio.exporters._layer import find_sites
        from intaglio.exporters._repair import repair
        from intaglio.pipeline.checkpoint import layer_table
        from intaglio.pipeline.denoiser import other_call
        from intaglio.pipeline.nesting import in_order

        model, trajectory = state[MODEL].open(), state[TRAJECTORY]
        recorded = trajectory.call(0, slice(2))  # a wide call takes minutes in a full-size model, and shows no more
        call = {n: recorded[n] for n in in_order(recorded, inspect.signature(model.module.forward).parameters)}
        calls = Calls(call, other_call(model, call), frozenset(trajectory.shared))
        layers = [layer.name for layer in layer_table(model.module)]
        expected = _expected(model, calls, trajectory.outputs[0][: calls.rows])
        exported = _export(model, calls, self.opset)
        weights = list(exported.graph.initializers.values())
        repair(exported.graph)
        _simplify(exported)
        axes = _axis_names(exported.graph, calls)
        _keep_layer_names(exported, frozenset(layers), axes)
        sites = find_sites(exported.graph)
        _check_weights(model.module, sites)
        path = ctx.scratch / "model.onnx"
        ir.save(exported, path, external_data="model.onnx.data")
        onnx.checker.check_model(path, full_check=True)
        # onnxscript's rules keep the graph that they last looked at, and its weights are torch's own
        for weight in (*weights, *exported.graph.initializers.values()):
            weight.const_value = None
        if absent := [name for name in layers if name not in sites]:
            ctx.log.warning("not in the graph, so they have to stay in float: %s", ", ".join(absent))
        nodes = {name: (str(s[0].x.name), str(s[0].y.name)) for name, s in sites.items()}
        inputs, outputs = tensor_specs(exported.graph.inputs), tensor_specs(exported.graph.outputs)
        interface = _interface(model)
        return Graph(
            path, inputs, outputs, (), nodes, model.names.timestep, calls.sizes(axes), interface=interface
        ), expected


class Expected(NamedTuple):
    """What torch returns for a call, and which call it is."""

    where: str
    inputs: Inputs
    output: torch.Tensor


@dataclass(frozen=True)
class Calls:
    """The recorded call, and one where every axis that is to be dynamic has another size, by input name.

    `shared` names the inputs that have no axis of rows.
    """

    usual: Inputs
    other: Inputs | None
    shared: frozenset[str]

    @property
    def traced(self) -> Inputs:
        """The larger call, with more than one row: an axis of size 1 would be taken for a constant."""
        both = (self.usual,) if self.other is None else (self.usual, self.other)
        larger = max(both, key=lambda call: sum(value.numel() for value in call.values()))
        return self.with_rows(larger, max(2, self.rows))

    @property
    def rows(self) -> int:
        return next(len(value) for name, value in self.usual.items() if name not in self.shared)

    def with_rows(self, call: Inputs, rows: int) -> dict[str, torch.Tensor]:
        """As many rows, repeated where there are fewer."""
        import torch

        return {
            name: value.contiguous() if name in self.shared else value[torch.arange(rows) % len(value)]
            for name, value in call.items()
        }

    def dynamic_axes(self, name: str) -> tuple[int, ...]:
        """Those of an input that have another size in the other call, the rows first."""
        shape, other = self.usual[name].shape, (self.other or self.usual)[name].shape
        if len(shape) != len(other):
            raise StepFailed(f"{name}: {len(shape)} axes in the recorded call, {len(other)} at the other size")
        varying = tuple(axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)
        return varying if name in self.shared else tuple(dict.fromkeys((0, *varying)))

    def sizes(self, axes: Mapping[str, tuple[str, str, int]]) -> dict[str, tuple[int, int]]:
        """By name of a dynamic axis but the batch: its size in the recorded call, and in the other."""
        other = self.other or self.usual
        found = {name: (owner, axis) for name, owner, axis in axes.values() if name != "batch"}
        return {
            name: (self.usual[owner].shape[axis], other[owner].shape[axis]) for name, (owner, axis) in found.items()
        }


def _interface(model: Factory) -> Interface:
    """Of a diffusers class its configuration, without where it came from."""
    import diffusers

    module: Any = model.module
    arguments = tuple(inspect.signature(module.forward).parameters)
    kind = type(module).__name__
    config: dict[str, object] = {}
    if getattr(diffusers, kind, None) is type(module):
        config = {n: v for n, v in json.loads(module.to_json_string()).items() if not n.startswith("_")}
    return Interface(kind if config else "", config, arguments, model.names.sample, dict(model.constants))


def tensor_specs(values: Sequence[ir.Value]) -> dict[str, TensorSpec]:
    """Element types and shapes of graph inputs or outputs, by name."""
    return {
        str(v.name): TensorSpec(v.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in v.shape))
        for v in values
        if v.dtype is not None and v.shape is not None
    }


def _export(model: Factory, calls: Calls, opset: int) -> ir.Model:
    """torch's exporter on one call, its dynamic axes so, nothing simplified yet. Raises StepFailed."""
    import torch

    from intaglio.pipeline.denoiser import denoise_with

    names = list(calls.usual)
    with_rows = [place for place, name in enumerate(names) if name not in calls.shared]

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model.module
            self.denoise = denoise_with(model.module, model)

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            rows = values[with_rows[0]].shape[0]
            for place in with_rows[1:]:  # one symbol for the batch: masks and latents are combined in some models
                torch._check(values[place].shape[0] == rows)  # type: ignore[no-untyped-call]  # torch
            return self.denoise(dict(zip(names, values, strict=True)))

    # AUTO and not DYNAMIC: an axis that has to be constant is named below, all of them together
    axes = tuple(dict.fromkeys(calls.dynamic_axes(name), torch.export.Dim.AUTO) for name in names)
    try:
        with _silent(), torch.no_grad():
            program = torch.onnx.export(
                Denoiser().eval(),
                tuple(calls.traced.values()),
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=(axes,),
                verbose=False,
                optimize=False,
            )
    except torch.onnx.errors.OnnxExporterError as e:
        called = _shapes(calls.traced)
        raise StepFailed(f"torch cannot export the denoiser called with {called}: {_first_cause(e)}") from e
    assert program is not None  # it is, with dynamo
    assert program.exported_program is not None
    _check_dynamic(program.exported_program, calls)
    return program.model


def _check_dynamic(program: torch.export.ExportedProgram, calls: Calls) -> None:
    """Raise StepFailed for every axis that was to be dynamic and is a constant: the ONNX graph does not tell."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    limits = {str(symbol): (int(r.lower), r.lower == r.upper) for symbol, r in program.range_constraints.items()}
    constant = []
    for name, user_input in zip(calls.usual, program.graph_signature.user_inputs, strict=True):
        for axis in calls.dynamic_axes(name):
            size = values[user_input].shape[axis]
            least, only = (size, True) if isinstance(size, int) else limits.get(str(size), (0, False))
            if only:
                constant.append(
                    f"{name}: axis {axis} can only be {least}, it enters the graph as a constant (a position table,"
                    " or a size that is computed with): call at one size only, or give what depends on it as an input"
                )
    if constant:
        raise StepFailed(*constant)


def _first_cause(error: BaseException) -> str:
    """Where it began, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's progress, warnings and log lines."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop what does nothing. Changes `model`.

    The exporter's own optimizer takes an addition of 1e-8 or less for none, and x / (|x| + eps) is NaN then.
    """
    import onnx_ir as ir
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    from intaglio.exporters._repair import transposed_keys

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
    with _silent():
        for _ in range(2):
            optimizer.fold_constants(model, onnx_shape_inference=True)
            rewriter.rewrite(model, nothing)
        Sequential(
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
        )(model)
        products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
        for node in products:  # two layers with equal weights on one input are two
            node.attributes["layer"] = ir.AttrString("layer", _module_path(node))
        common.CommonSubexpressionEliminationPass()(model)
        for node in products:
            del node.attributes["layer"]
        Sequential(common.OutputFixPass(), common.RemoveUnusedOpsetsPass())(model)


def _module_path(node: ir.Node) -> str:
    """Of the module that the exporter made the node for; empty where it does not say."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]).removeprefix("module.") if len(scopes) > 1 else ""


def _axis_names(graph: ir.Graph, calls: Calls) -> dict[str, tuple[str, str, int]]:
    """By symbol of a dynamic axis: its name, and an input and axis that have it."""
    names: dict[str, tuple[str, str, int]] = {}
    for value in graph.inputs:
        name = str(value.name)
        assert value.shape is not None  # the exporter's inputs have shapes
        for axis in calls.dynamic_axes(name):
            rows = axis == 0 and name not in calls.shared
            names.setdefault(str(value.shape[axis]), ("batch" if rows else f"{name}_{axis}", name, axis))
    return names


def _keep_layer_names(model: ir.Model, layers: frozenset[str], axes: Mapping[str, tuple[str, str, int]]) -> None:
    """Of all metadata leave each node's layer, and give axes their names. Changes `model`: no path is left in it."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    from intaglio.exporters._layer import LAYER_KEY

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
    import numpy as np

    problems = [
        f"{name}: the exported {site.product.op_type} {site.product.name} has another weight than the layer"
        for name, calls in sites.items()
        for site in calls
        if not np.array_equal(site.weight(), module.get_parameter(f"{name}.weight").detach().numpy())
    ]
    if problems:
        raise StepFailed(*problems)


def _expected(model: Factory, calls: Calls, output: torch.Tensor) -> list[Expected]:
    """What torch returns for two rows, the recorded one twice where there is no other, and at the other size.

    `output` is of the recorded rows. Raises StepFailed where torch cannot.
    """
    import torch

    from intaglio.pipeline.denoiser import denoise_with

    repeated = calls.with_rows({"output": output}, 2)["output"]
    expected = [Expected("at 2 rows", calls.with_rows(calls.usual, 2), repeated)]
    if calls.other is not None:
        try:
            with torch.no_grad():
                found = denoise_with(model.module, model)(calls.other)
        except (RuntimeError, ValueError) as e:  # shapes that do not fit
            called = _shapes(calls.other)
            raise StepFailed(f"at the other size the denoiser cannot be called with {called}: {e}") from e
        expected.append(Expected("at the other size", calls.other, found))
    return expected


def _check_outputs(path: Path, expected: Sequence[Expected], tolerance: float) -> None:
    """Run the graph on calls. Raise StepFailed where it leaves torch."""
    from intaglio.exporters._session import lean_session

    with lean_session(path) as session:
        for where, inputs, output in expected:
            (found,) = _run(session, inputs)
            _check_output(where, found, output, tolerance)


def _magnitudes(path: Path, trajectory: Trajectory, tolerance: float, ctx: Context) -> dict[str, float]:
    """The largest magnitude of each floating-point value in some rows of some recorded calls, by name.

    To three digits: the order of a sum moves the others, and with them the digest of the artifact. Raises StepFailed
    where the graph leaves torch in one of them.
    """
    import numpy as np

    from intaglio.exporters._session import lean_session

    beside = path.with_name("ranges.onnx")  # so that it reads the weights that are there
    names = _write_with_ends(path, beside)
    amax = np.zeros(len(names), np.float32)
    rows = range(trajectory.outputs.shape[1])[trajectory.some_rows(RANGE_ROWS)]
    steps = np.unique(np.linspace(0, len(trajectory.timesteps) - 1, RANGE_STEPS).round().astype(int))
    with lean_session(beside) as session, ctx.progress("ranges", len(steps) * len(rows)) as advance:
        beside.unlink()
        for step, row in itertools.product(steps, rows):  # one at a time: scores of attention are large
            inputs, output = trajectory.call(int(step), [row]), trajectory.outputs[step][[row]]
            found, *ends = _run(session, inputs)
            _check_output("at 1 row", found, output, tolerance)
            amax = np.maximum(amax, np.abs(np.array(ends, np.float32)).reshape(-1, 2).max(1))
            advance()
    return {name: float(f"{largest:.2e}") for name, largest in zip(names, amax, strict=True)}


def _run(session: onnxruntime.InferenceSession, inputs: Inputs) -> list[NDArray[np.float32]]:
    """All outputs for a call of which the graph may read only a part."""
    found: list[NDArray[np.float32]] = session.run(
        None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    )
    return found


def _check_output(where: str, found: NDArray[np.float32], output: torch.Tensor, tolerance: float) -> None:
    """Raise StepFailed unless what the graph returned is what torch did."""
    import torch

    if found.shape != output.shape:
        raise StepFailed(f"{where} the exported graph returns {found.shape}, torch {tuple(output.shape)}")
    error = float((torch.from_numpy(found) - output).norm() / output.norm().clamp_min(1e-12))
    if not error <= tolerance:  # NaN is not
        raise StepFailed(f"{where} the exported graph is {error:.1e} from torch, relative L2 ({tolerance:.0e} allowed)")


def _shapes(inputs: Inputs) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())


def _write_with_ends(path: Path, beside: Path) -> list[str]:
    """The graph with the ends of each floating-point value, largest and least, as outputs more; names of the values."""
    import onnx_ir as ir

    model = ir.load(path)
    made = [(node, v) for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    for node, value in made:  # two ends and not one magnitude: that is first a copy of the value, which may be large
        ends = [ir.node(op, [value], {"keepdims": 0}, name=f"{value.name}/{op}") for op in ("ReduceMax", "ReduceMin")]
        for end in ends:
            end.outputs[0].dtype, end.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            model.graph.outputs.append(end.outputs[0])
        # at once: among nodes that can run the runtime takes the first, and the value is free then
        model.graph.insert_after(node, ends)
    ir.save(model, beside)
    return [str(value.name) for _, value in made]
