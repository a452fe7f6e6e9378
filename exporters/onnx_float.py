"""Export the denoiser in full precision: once, for every target and every plan.

Shapes: R rows of one call.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import StepFailed, TargetError
from intaglio.pipeline.graph import Graph, TensorSpec
from intaglio.pipeline.keys import FLOAT_GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.target import Target

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    import torch
    from torch import nn

    from intaglio.exporters._layer import Site
    from intaglio.pipeline.checkpoint import Factory
    from intaglio.pipeline.denoiser import Inputs
    from intaglio.pipeline.trajectory import Trajectory

TOLERANCE = 1e-4
"""Relative L2 error that a whole network may have for the order of its float32 sums; a wrong graph is far from it."""
RANGE_ROWS = 8
"""Rows of each recorded call, at least, that magnitudes are taken from."""


class ExportFloat(Pass):
    """The graph computes what torch does at any number of rows, and every node knows the layer it came from."""

    name: ClassVar[str] = "export-float"
    version: ClassVar[int] = 2
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
        import onnx
        import onnx_ir as ir

        from intaglio.exporters._layer import find_sites
        from intaglio.pipeline.checkpoint import layer_table

        model = state[MODEL].open()
        names = [n for n in inspect.signature(model.module.forward).parameters if n in state[TRAJECTORY].inputs]
        call = {name: state[TRAJECTORY].call(0)[name] for name in names}
        layers = [layer.name for layer in layer_table(model.module)]
        exported = _export(model, call, self.opset)
        _simplify(exported)
        _keep_layer_names(exported, frozenset(layers))
        sites = find_sites(exported.graph)
        _check_weights(model.module, sites)
        path = ctx.scratch / "model.onnx"
        ir.save(exported, path, external_data="model.onnx.data")
        onnx.checker.check_model(path, full_check=True)
        _check_outputs(model, path, call)
        if absent := [name for name in layers if name not in sites]:
            ctx.log.warning("not in the graph, so they have to stay in float: %s", ", ".join(absent))
        nodes = {name: (str(s[0].x.name), str(s[0].y.name)) for name, s in sites.items()}
        inputs, outputs = tensor_specs(exported.graph.inputs), tensor_specs(exported.graph.outputs)
        with ctx.progress("ranges", len(state[TRAJECTORY].timesteps)) as advance:
            amax = _record_ranges(path, state[TRAJECTORY], advance)
        return {FLOAT_GRAPH: Graph(path, inputs, outputs, (), nodes, amax)}


def tensor_specs(values: Sequence[ir.Value]) -> dict[str, TensorSpec]:
    """Element types and shapes of graph inputs or outputs, by name."""
    return {
        str(v.name): TensorSpec(v.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in v.shape))
        for v in values
        if v.dtype is not None and v.shape is not None
    }


def _export(model: Factory, call: Inputs, opset: int) -> ir.Model:
    """torch's exporter on the first call, the batch axis dynamic, nothing simplified yet."""
    import torch

    from intaglio.pipeline.denoiser import denoise_with

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model.module
            self.denoise = denoise_with(model.module, model)

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            for value in values[1:]:  # one symbol for the batch: masks and latents are combined in some models
                torch._check(value.shape[0] == values[0].shape[0])  # type: ignore[no-untyped-call]  # torch
            return self.denoise(dict(zip(call, values, strict=True)))

    # an axis of size 1 would be taken for a constant
    values = tuple(torch.cat([v, v]) if len(v) == 1 else v.contiguous() for v in call.values())
    batch = {0: torch.export.Dim.DYNAMIC}
    with _silent(), torch.no_grad():
        program = torch.onnx.export(
            Denoiser().eval(),
            values,
            dynamo=True,
            opset_version=opset,
            input_names=list(call),
            output_names=["output"],
            dynamic_shapes=((batch,) * len(values),),
            verbose=False,
            optimize=False,
        )
    assert program is not None  # it is, with dynamo
    return program.model


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
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    nothing = (
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.slice_split_rule,
        rules.materialize_reshape_shape_rule,
    )
    with _silent():
        for _ in range(2):
            optimizer.fold_constants(model, onnx_shape_inference=True)
            rewriter.rewrite(model, nothing)
        Sequential(
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.RemoveUnusedOpsetsPass(),
        )(model)


def _keep_layer_names(model: ir.Model, layers: frozenset[str]) -> None:
    """Of all metadata leave each node's layer, and call the batch axis so. Changes `model`: no path is left in it."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    from intaglio.exporters._layer import LAYER_KEY

    graph = model.graph
    symbols = {str(v.shape[0]) for v in graph.inputs if v.shape is not None}
    for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is not None and value.const_value is None:
            value.shape = ir.Shape([_axis(size, symbols) for size in value.shape])
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        layer = scopes[-2].removeprefix("module.") if len(scopes) > 1 else ""
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


def _axis(size: int | ir.SymbolicDim, batch: set[str]) -> int | str | None:
    if isinstance(size, int):
        return size
    return "batch" if str(size) in batch else None


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


def _check_outputs(model: Factory, path: Path, call: Inputs) -> None:
    """Run the graph at the recorded number of rows and at one more. Raise StepFailed where it leaves torch."""
    import torch

    from intaglio.exporters._session import open_session
    from intaglio.pipeline.denoiser import denoise_with

    session = open_session(path)
    denoise = denoise_with(model.module, model)
    for inputs in (call, {name: torch.cat([value, value[:1]]) for name, value in call.items()}):
        with torch.no_grad():
            expected = denoise(inputs)
        found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error <= TOLERANCE:  # NaN is not
            rows = len(expected)
            raise StepFailed(
                f"at {rows} rows the exported graph is {error:.1e} from torch, relative L2 ({TOLERANCE:.0e} allowed)"
            )


def _record_ranges(path: Path, trajectory: Trajectory, advance: Callable[[], object]) -> dict[str, float]:
    """The largest magnitude of each floating-point value in some rows of every call, by name, to three digits.

    The order of a sum moves the others, and with them the digest of the artifact.
    """
    import numpy as np
    import onnx_ir as ir

    from intaglio.exporters._session import open_session

    model = ir.load(path)
    values = [v for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    del model.graph.outputs[:]
    for value in values:
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0}, name=f"{value.name}/amax")
        largest.outputs[0].dtype, largest.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
        model.graph.extend([magnitude, largest])
        model.graph.outputs.append(largest.outputs[0])
    beside = path.with_name("ranges.onnx")  # so that it reads the weights that are there
    ir.save(model, beside)
    session = open_session(beside)
    beside.unlink()
    amax = np.zeros(len(values), np.float32)
    rows = slice(None, None, max(1, trajectory.outputs.shape[1] // RANGE_ROWS))
    for step in range(len(trajectory.timesteps)):
        call = {name: x.numpy() for name, x in trajectory.call(step, rows).items()}
        found = session.run(None, {i.name: call[i.name] for i in session.get_inputs()})
        amax = np.maximum(amax, np.array(found, np.float32))
        advance()
    return {str(value.name): float(f"{largest:.2e}") for value, largest in zip(values, amax, strict=True)}
