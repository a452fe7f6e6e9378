"""Time the compiled graph against the full-precision one, by turns: calls in one process, or whole trajectories."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.exporters.measure.bench import Bench, EngineFigures
from intaglio.exporters.measure.turns import spent
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, LATENCY, MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.runs.publish import made_from
from intaglio.pipeline.runs.registry import find_runtime
from intaglio.pipeline.runs.store import Store

if TYPE_CHECKING:
    from intaglio.exporters.measure.engine_process import Loaded, Spent
    from intaglio.pipeline.model.cost import ModelCost


class MeasureLatency(Pass):
    """Measure the median time of one call of the float32 and of the compiled graph, alternately.

    The target's runtime executes both graphs.
    """

    name: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({FLOAT_GRAPH, GRAPH, TARGET, TRAJECTORY})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({MODEL})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LATENCY})

    rows: int = Field(8, ge=1, description="rows of the call that is timed")
    rounds: int = Field(15, ge=1, description="timed calls of each graph; one more call before them is not counted")
    threads: int = Field(
        1,
        ge=0,
        description="threads of ONNX Runtime, 0 for all cores: with more than one, other jobs disturb the ratio",
    )

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Return True for runtimes that execute the graph itself: an engine is timed on its device."""
        return find_runtime(target.runtime).runs_graph

    def forward_rows(self, model: ModelCost) -> int:
        """Return the rows of all calls of both graphs."""
        return 2 * (self.rounds + 1) * self.rows

    def stored_bytes(self, parameters: int, in_files: int) -> int:
        """Return the bytes in float32 of a large model's weights, which the float graph needs while it is timed."""
        from intaglio.exporters.float_graph.own_weights import left_out

        return 4 * parameters if left_out(in_files) else 0

    def run(self, state: State, ctx: Context) -> Outputs:
        """Time both graphs alternately, and take the medians."""
        from intaglio.exporters.float_graph.own_weights import whole_graph
        from intaglio.exporters.runtimes.calls import graph_denoise
        from intaglio.pipeline.artifacts.verification import Latency

        runtime, trajectory = find_runtime(state[TARGET].runtime), state[TRAJECTORY]
        call = trajectory.call(len(trajectory.timesteps) // 2, slice(self.rows))
        with (
            whole_graph(state[FLOAT_GRAPH], state.find(MODEL), ctx.scratch / "float32") as whole,
            ctx.progress("latency", self.rounds + 1) as advance,
        ):
            both = {
                "float32": graph_denoise(whole, runtime, threads=self.threads),
                "compiled": graph_denoise(state[GRAPH], runtime, threads=self.threads),
            }
            seconds = spent({name: partial(denoise, call) for name, denoise in both.items()}, self.rounds, advance)
        float_ms, compiled_ms = (1e3 * seconds[name] for name in ("float32", "compiled"))
        ctx.log.info("%d rows: %.1f ms float32, %.1f ms compiled", self.rows, float_ms, compiled_ms)
        return {LATENCY: Latency(rows=self.rows, float32_ms=float_ms, compiled_ms=compiled_ms)}


def bench(folder: Path, store: Store, ctx: Context, *, rounds: int, rows: int, threads: int) -> Bench:
    """Run each engine of a compiled folder in a process of its own.

    In each of `rounds` rounds, every engine runs one trajectory. `float32` is the float graph of the run, from the
    store. `float16` is the same graph in float16, only for a provider that computes in float16. A trajectory is as many
    calls as the recipe has steps, with the inputs that `profile` uses. The scheduler's own work is left out: it is the
    same for all. Graphs for TensorRT run as they are written, without ONNX Runtime's fusions. Raises RecipeError if the
    store lacks what is needed, TargetError for a graph that the runtime refuses.
    """
    from intaglio.exporters.float_graph.own_weights import whole_graph
    from intaglio.exporters.measure.engine_process import EngineProcess, Setting

    model, target = made_from(folder, store, MODEL), made_from(folder, store, TARGET)
    steps, left_out = model.ref.sampling_steps, {}

    def engine(graph: Graph) -> EngineProcess:
        return EngineProcess(Setting(graph.path.parent, rows, threads, target.provider, target.runtime))

    with ExitStack() as stack:
        lean = made_from(folder, store, FLOAT_GRAPH)
        full = stack.enter_context(whole_graph(lean, model, ctx.scratch / "float32"))
        graphs = {"float32": full, "compiled": Graph.load(folder)}
        engines = {name: stack.enter_context(engine(graph)) for name, graph in graphs.items()}
        provider = engines["compiled"].loaded.provider
        if not engines["compiled"].loaded.half:
            left_out["float16"] = f"{provider} computes float16 graphs in float32, so its time says nothing"
        else:
            graphs["float16"] = half_graph(graphs["float32"], ctx.scratch)
            engines["float16"] = stack.enter_context(engine(graphs["float16"]))
        spent: dict[str, list[Spent]] = {name: [] for name in engines}
        with ctx.progress("trajectories", rounds * len(engines)) as advance:
            for _ in range(rounds):
                for name, running in engines.items():
                    spent[name].append(running.call(steps))
                    advance()
        figures = {name: _figures(graphs[name], engines[name].loaded, spent[name]) for name in engines}
    whole, compiled = figures["float32"].peak_bytes, figures["compiled"].peak_bytes
    return Bench(
        target=target.name,
        provider=provider,
        rows=rows,
        threads=threads,
        steps=steps,
        rounds=rounds,
        engines=figures,
        left_out=left_out,
        trajectory_speedup_fp32=_speedup(spent, lambda one: one.clock),
        trajectory_cpu_speedup_fp32=_speedup(spent, lambda one: one.cpu),
        peak_memory_ratio=whole / compiled if whole and compiled else None,
        size_ratio_fp16=2 * model.parameter_count() / graphs["compiled"].size_bytes,
        filled_by=_commands(target, graphs["compiled"], rows),
    )


def half_graph(graph: Graph, scratch: Path) -> Graph:
    """Write the graph in float16 below `scratch` and return it. What float16 cannot represent stays in float32."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from intaglio.exporters.float_graph.onnx_file import read_model
    from intaglio.exporters.qdq.half import type_half

    model = read_model(graph.path)
    type_half(model, (), graph.amax)
    RemoveUnusedNodesPass()(model)
    written, folder = scratch / "model.onnx", scratch / "float16"
    ir.save(model, written, external_data="model.onnx.data")
    folder.mkdir()
    replace(graph, path=written).save(folder)
    return Graph.load(folder)


def _figures(graph: Graph, loaded: Loaded, spent: Sequence[Spent]) -> EngineFigures:
    calls = [1e3 * seconds for one in spent for seconds in one.clock]
    low, median, high = statistics.quantiles(calls, n=4) if len(calls) > 1 else calls * 3
    return EngineFigures(
        file_bytes=graph.size_bytes,
        load_ms=1e3 * loaded.seconds,
        resident_bytes=loaded.resident_bytes,
        peak_bytes=loaded.peak_bytes,
        latency_ms=median,
        latency_ms_quartiles=(low, high),
        cpu_ms=1e3 * statistics.median(seconds for one in spent for seconds in one.cpu),
        trajectory_ms=1e3 * statistics.median(sum(one.clock) for one in spent),
    )


def _speedup(spent: Mapping[str, Sequence[Spent]], times: Callable[[Spent], Sequence[float]]) -> float:
    pairs = zip(spent["float32"], spent["compiled"], strict=True)
    return statistics.median(sum(times(whole)) / sum(times(compiled)) for whole, compiled in pairs)


def _commands(target: Target, graph: Graph, rows: int) -> Mapping[str, str]:
    """Return figure -> the command that measures it on the device, in the folder of model.onnx."""
    from intaglio.exporters.runtimes.calls import usual_shapes

    dynamic = {name for name, spec in graph.inputs.items() if any(isinstance(axis, str) for axis in spec.shape)}
    usual = usual_shapes(graph, rows)
    shapes = ",".join(f"{name}:{'x'.join(map(str, usual[name]))}" for name in usual if name in dynamic)
    latency = find_runtime(target.runtime).latency_command(shapes)
    commands = {"gpu_latency_ms": latency, "energy_joules": "tegrastats --interval 100 --logfile power.log"}
    return {figure: command for figure, command in commands.items() if command is not None}
