"""Export the denoiser in full precision: once, for every target and every plan.

Shapes: R rows of one call.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.graph import NOT_IN_GRAPH, Graph, Interface
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.artifacts.plan import in_float_lines
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import StepFailed, TargetError
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.machine import giving_back

if TYPE_CHECKING:
    import torch

    from intaglio.exporters.float_graph.agreement import Expected
    from intaglio.exporters.float_graph.capture import Calls
    from intaglio.exporters.float_graph.own_weights import ModelWeights
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.model.cost import ModelCost
    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.types import Inputs

OUTPUT = "output"
"""Name of the output of the denoiser's graph."""
RANGE_STEPS, RANGE_ROWS = 5, 4
"""Number of recorded calls, and of rows of each, from which magnitudes are taken; float16 keeps a margin."""


class ExportFloat(Pass):
    """Export a graph that computes the same as torch for any number of rows.

    Axes whose size differs in the model's other call are dynamic too. The metadata of a layer's nodes name the layer.
    Weights of 1 GiB or more that stay in the model's own files are left out of the graph's: readers of the graph read
    them there, and the comparison with torch runs the graph in parts.
    """

    name: ClassVar[str] = "export-float"
    version: ClassVar[int] = 11
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({FLOAT_GRAPH})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "onnxscript", "onnx-ir")

    opset: int = Field(
        21,
        ge=21,
        le=22,
        description="ONNX opset; 4-bit weights need 21; from 23 on, attention is one operator, whose products cannot be"
        " quantized",
    )

    def check(self, target: Target) -> None:
        """Check the opset. Raises TargetError if the target does not read it."""
        if self.opset > target.opset_max:
            raise TargetError(f"opset {self.opset}, but {target.name} reads up to {target.opset_max}")

    def forward_rows(self, model: ModelCost) -> int:
        """Return the number of rows on which the graph is run."""
        return RANGE_ROWS * min(RANGE_STEPS, model.steps) + 1

    def stored_bytes(self, parameters: int, in_files: int) -> int:
        """Return the bytes in float32 of the weights that the graph does not leave to the model's own files."""
        from intaglio.exporters.float_graph.own_weights import left_out

        return 4 * (parameters - left_out(in_files))

    def run(self, state: State, ctx: Context) -> Outputs:
        """Export the graph. Raises StepFailed if the graph differs from torch."""
        from intaglio.exporters.float_graph.agreement import HALF_TOLERANCE, TOLERANCE, check_outputs
        from intaglio.exporters.float_graph.multiples import find_multiples
        from intaglio.exporters.float_graph.own_weights import ModelWeights

        graph, expected = self._write_graph(state, ctx)
        gc.collect()  # the wrapped module is part of a reference cycle
        weights = ModelWeights(graph, state[MODEL])
        tolerance = HALF_TOLERANCE if state[TRAJECTORY].half else TOLERANCE
        amax = _magnitudes(graph, state[TRAJECTORY], tolerance, weights, ctx)
        check_outputs(graph.path, expected, tolerance, weights)
        multiples = find_multiples(graph, _call_of(graph, state[TRAJECTORY], 0, [0]), weights) if graph.sizes else {}
        return {FLOAT_GRAPH: replace(graph, amax=amax, multiples=multiples)}

    def _write_graph(self, state: State, ctx: Context) -> tuple[Graph, list[Expected]]:
        """Write the graph's files; return it with outputs of torch that the trajectory does not hold."""
        from intaglio.exporters.float_graph.capture import Calls
        from intaglio.exporters.float_graph.torch_export import write_graph
        from intaglio.pipeline.model.arguments import in_order
        from intaglio.pipeline.model.calls import denoise_with, other_call
        from intaglio.pipeline.model.layers import layer_table

        with giving_back():  # as `ModelWeights` does
            model, trajectory = state[MODEL].open(stored=True), state[TRAJECTORY]
        recorded = trajectory.call(0, slice(2))  # a wider call takes minutes in a full-size model, and adds nothing
        call = {n: recorded[n] for n in in_order(recorded, inspect.signature(model.module.forward).parameters)}
        call = _with_floating_timestep(model, call)
        other = other_call(model, call)
        calls = Calls(call, other, frozenset(trajectory.shared), _recorded(model, call, other))
        expected = _expected(model, calls, trajectory)
        denoise = denoise_with(model.module, model, whole=True)
        graph = write_graph(
            ctx.scratch / "model.onnx",
            model.module,
            lambda inputs: {OUTPUT: denoise(inputs)},
            calls,
            (OUTPUT,),
            opset=self.opset,
            called="the denoiser",
            whole=False,
        )
        if absent := [layer.name for layer in layer_table(model.module) if layer.name not in graph.nodes]:
            for line in in_float_lines(dict.fromkeys(absent, NOT_IN_GRAPH)):
                ctx.log.info("%s", line)
        if fixed := graph.interface.constants:
            ctx.log.info("the graph holds for %s as recorded: the values decide what is computed", ", ".join(fixed))
        interface = _interface(model)
        interface = replace(interface, constants={**interface.constants, **fixed}, component=state[MODEL].ref.subfolder)
        return replace(graph, timestep=model.names.timestep, interface=interface), expected


def _with_floating_timestep(model: DenoiserModel, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the call with a floating-point timestep where the model computes the same from it.

    The timesteps of some schedulers are whole, those of others are not, and users change schedulers. A model that looks
    its timestep up in a table keeps whole ones.
    """
    import torch

    from intaglio.pipeline.model.calls import denoise_with

    name = model.names.timestep
    if name is None or name not in call or call[name].is_floating_point():
        return call
    floating, denoise = {**call, name: call[name].float()}, denoise_with(model.module, model)
    try:
        with torch.no_grad():
            return floating if torch.equal(denoise(floating), denoise(call)) else call
    except (IndexError, RuntimeError, TypeError):  # which a table raises for an index that is no integer
        return call


def _recorded(model: DenoiserModel, call: Inputs, other: Inputs | None) -> dict[str, torch.Tensor]:
    """Return the inputs that have the same values in all recorded rows and at both sizes: one row, or the whole."""
    import torch

    alike = {}
    for name, rows in model.conditions.items():
        if name == model.names.timestep:  # its condition has factors
            continue
        if all(bool((each == rows[:1]).all()) for each in (rows, model.null.get(name, rows))):
            alike[name] = rows[:1]
    return {
        name: value
        for name, value in {**alike, **model.shared}.items()
        if name in call and (other is None or torch.equal(other[name][: len(value)], value))
    }


def _interface(model: DenoiserModel) -> Interface:
    """Return the model's interface, with the configuration of a diffusers class but not its origin."""
    import diffusers

    from intaglio.pipeline.model.call_form import CallForm

    module: Any = model.module
    arguments = tuple(inspect.signature(module.forward).parameters)
    kind = type(module).__name__
    config: dict[str, object] = {}
    if getattr(diffusers, kind, None) is type(module):
        config = {n: v for n, v in json.loads(module.to_json_string()).items() if not n.startswith("_")}
    form = None if model.form == CallForm() else model.form
    return Interface(kind if config else "", config, arguments, model.names.sample, dict(model.constants), form)


def _expected(model: DenoiserModel, calls: Calls, trajectory: Trajectory) -> list[Expected]:
    """Return torch's whole outputs where the trajectory has only the part that the scheduler reads, or another size.

    Raises StepFailed if the model does not compute what was recorded, or if torch fails at the other size.
    """
    import torch

    from intaglio.exporters.float_graph.agreement import HALF_TOLERANCE, Expected, first_entries
    from intaglio.exporters.float_graph.capture import shapes
    from intaglio.pipeline.model.calls import denoise_with
    from intaglio.pipeline.numerics.quality import rel_l2

    denoise, expected = denoise_with(model.module, model, whole=True), []
    with torch.no_grad():
        usual = denoise(calls.usual)
        recorded = trajectory.outputs[0][:2]
        if (error := rel_l2(first_entries(usual, recorded), recorded)) > HALF_TOLERANCE:
            raise StepFailed(
                f"the model's outputs for {len(recorded)} recorded rows differ by {error:.1e}, relative L2"
                f" ({HALF_TOLERANCE:.0e} allowed), from those that `calibrate` recorded: its factory returns other"
                " weights each time, where torch.manual_seed helps, or the rows of a call affect each other, as with"
                " statistics of a batch"
            )
        if model.read(usual).shape != usual.shape:
            expected.append(Expected("with its whole output", calls.usual, {OUTPUT: usual}))
        if calls.other is not None:
            try:
                other = denoise(calls.other)
            except (RuntimeError, ValueError) as e:  # shapes that do not fit
                called = shapes(calls.other)
                raise StepFailed(f"at the other size the denoiser cannot be called with {called}: {e}") from e
            expected.append(Expected("at the other size", calls.other, {OUTPUT: other}))
    return expected


def _magnitudes(
    graph: Graph, trajectory: Trajectory, tolerance: float, weights: ModelWeights, ctx: Context
) -> dict[str, float]:
    """Return the magnitudes that `find_magnitudes` finds in some rows of some recorded calls, by name."""
    import numpy as np

    from intaglio.exporters.float_graph.agreement import Expected, find_magnitudes

    rows = range(trajectory.outputs.shape[1])[trajectory.some_rows(RANGE_ROWS)]
    steps = np.unique(np.linspace(0, len(trajectory.timesteps) - 1, RANGE_STEPS).round().astype(int)).tolist()
    # one row at a time, as attention scores are large; the first row twice, to test that rows do not affect each other
    first, *others = ((step, [row]) for step, row in itertools.product(steps, rows))
    taken = [(first[0], first[1] * 2), *others]
    with ctx.progress("ranges", len(taken)) as advance:

        def calls() -> Iterator[Expected]:
            for step, some in taken:
                where = f"at {len(some)} row{'s' * (len(some) > 1)}"
                call = _call_of(graph, trajectory, step, some)
                yield Expected(where, call, {OUTPUT: trajectory.outputs[step][some]}, first=True)
                advance()

        return find_magnitudes(graph.path, calls(), tolerance, weights)


def _call_of(graph: Graph, trajectory: Trajectory, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return these rows of a recorded call, with a floating-point timestep where the graph takes one."""
    return {
        name: value.float() if name == graph.timestep and graph.inputs[name].dtype == "float32" else value
        for name, value in trajectory.call(step, rows).items()
    }
