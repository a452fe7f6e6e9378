"""Quantizes a model as a plan says, without sensitivity or training, and runs the simulation layer by layer."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from harness import Artifacts, run_pass

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.verify.departures import LayersInGraph
from intaglio.exporters.verify.parity import compare_layer
from intaglio.passes.distill.distill import Distill
from intaglio.passes.merge import MergeAdapters
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance, LayerBalance, bases_of
from intaglio.pipeline.simulation.layer import QuantizedLayer, channel_axis
from intaglio.pipeline.simulation.model import quantize_model, simulate

HALF_TOLERANCE = 1e-3
"""Relative L2 error of a layer in float16: its weight, product, sum and bias are rounded, by 2^-11 / sqrt(3) each."""

TO_GRAPH = """
steps:
- calibrate: {samples: 1}
- uniform: {schemes: [w4a8_token, w8a8_token, w8a8o8_step]}
- distill: {updates: 0}
- merge
- export-float
- export-qdq
"""
"""Steps of a recipe that lead to a quantized graph without training."""

Seen = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def planned(start: Artifacts, schemes: tuple[str, ...], target: str, folder: Path) -> Artifacts:
    """`start` with the target and the plan of the step `uniform`."""
    made = start | {TARGET: load_target(target)}
    return made | run_pass(UniformPlan(schemes=schemes, groups=(32,)), made, folder / "plan")


def written(made: Artifacts, folder: Path, **options) -> Artifacts:
    """`made` with its graph for the target, without training unless `options` of `distill` say otherwise."""
    made = made | run_pass(Distill(**{"updates": 0} | options), made, folder / "distill")
    made |= run_pass(MergeAdapters(), made, folder / "merge")
    return made | run_pass(ExportQdq(), made, folder / "qdq")


def with_plan(
    start: Artifacts,
    choose: Callable[[Layer], LayerScheme],
    balance: Callable[[Layer], Balance | None] = lambda _: None,
    timesteps: tuple[float, ...] | None = None,
) -> Artifacts:
    """`start` with a plan, and the integers that the layers get by rounding alone; with tables at `timesteps`."""
    module, trajectory = start[MODEL].open().module, start[TRAJECTORY]
    layers = layer_table(module)
    plan = QuantPlan(layers, {layer.name: choose(layer) for layer in layers})
    chosen = {layer.name: balance(layer) for layer in layers if plan.schemes[layer.name] != FLOAT}
    plan = plan.balanced(balanced_ranges(start, {name: b for name, b in chosen.items() if b is not None}))
    timesteps = timesteps or trajectory.timesteps
    tables = trajectory.tables(plan.schemes, plan.balances, timesteps)
    made = quantize_model(module, plan.schemes, StepClock(timesteps), tables, bases_of(plan.balances))
    return start | {PLAN: plan, QUANTIZED: integers(made, timesteps)}


def balanced_ranges(start: Artifacts, balances: Mapping[str, Balance]) -> dict[str, LayerBalance]:
    """The balances with the ends of their layers' inputs in every recorded call."""
    model, trajectory = start[MODEL].open(), start[TRAJECTORY]
    steps = range(len(trajectory.timesteps))
    seen: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in steps] for name in balances}
    now = 0

    def note(layer, args, name):
        seen[name][now].append(torch.stack(balances[name].input(args[0], channel_axis(layer)).aminmax()))

    for name in balances:
        model.module.get_submodule(name).register_forward_pre_hook(partial(note, name=name))
    with torch.no_grad():
        for now in steps if balances else ():
            denoise_with(model.module, model)(trajectory.call(now))
    found = {}
    for name, balance in balances.items():
        low, high = zip(*(torch.stack(calls).T for calls in seen[name]), strict=True)
        found[name] = LayerBalance(balance, torch.stack([v.min() for v in low]), torch.stack([v.max() for v in high]))
    return found


def integers(layers: Mapping[str, QuantizedLayer], timesteps: tuple[float, ...]) -> Quantized:
    return Quantized(
        timesteps,
        {
            name: QuantizedLayerData(
                m.scheme,
                m.weight_codes(),
                m.weight_rounding.scale.detach(),
                None if m.weight_rounding.group is None else m.scheme.weight.stored_groups(m.weight_rounding.group),
                m.tables,
                m.balance,
                m.branch,
            )
            for name, m in layers.items()
        },
    )


def output_error(artifacts: Artifacts) -> float:
    """Relative squared error of the merged model on the recorded calls."""
    model, trajectory = artifacts[MODEL].open(), artifacts[TRAJECTORY]
    clock = simulate(model.module, artifacts[QUANTIZED])
    total = 0.0
    with torch.no_grad():
        for step, t in enumerate(trajectory.timesteps):
            with clock.at(clock.index(t)):
                error = denoise_with(model.module, model)(trajectory.call(step)) - trajectory.outputs[step]
            total += float(error.square().sum() / trajectory.outputs[step].square().sum())
    return total


class Simulation:
    """The quantized layers; `at(step)` gives what enters and leaves each in the recorded call, and the prediction."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.trajectory = artifacts[TRAJECTORY]
        model = artifacts[MODEL].open()
        self.denoise = denoise_with(model.module, model)
        self.clock = simulate(model.module, artifacts[QUANTIZED])
        self.layers = {name: model.module.get_submodule(name) for name in artifacts[QUANTIZED].layers}
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, args, y, name=name: self.seen.__setitem__(name, (args[0], y)))

    def at(self, step: int) -> tuple[Seen, torch.Tensor]:
        with torch.no_grad(), self.clock.at(step):
            prediction = self.denoise(self.trajectory.call(step))
        return dict(self.seen), prediction


def parity(
    graph: Graph, name: str, layers: Mapping[str, QuantizedLayer], x, y, step: int, *, optimize: bool
) -> tuple[float, int, int]:
    """Relative L2 error of a layer of the graph on x, how many of its input codes differ, and by how much."""
    ends = LayersInGraph(graph, layers)
    found = compare_layer(ends, name, x.detach(), y.detach(), step, OnnxRuntime(optimize))
    return found.rel_l2, found.codes_differing, found.code_distance_max


def rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).norm() / reference.norm())
