"""Define the commands `intaglio bench` and `intaglio profile`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from intaglio.exporters.measure.bench import Bench, EngineFigures
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, PLAN, PROFILE, TARGET
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.cli.console import print_json, print_table
from intaglio.pipeline.cli.options import DEFAULT_STORE, Folder, StoreOption, json_option
from intaglio.pipeline.cli.printing import say
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.output_files import check_output, write_output
from intaglio.pipeline.runs.manifest import target_name
from intaglio.pipeline.runs.registry import find_pass
from intaglio.pipeline.runs.store import Store


def profile_command(
    folder: Folder,
    rows: Annotated[int | None, typer.Option(min=1, max=10_000, help="Rows of the call that is timed.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, max=10_000, help="Calls that are timed.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Threads of ONNX Runtime, 0 for all cores.")
    ] = None,
    trtexec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of trtexec --exportProfile: it is read, nothing is run.")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of trtexec --exportLayerInfo, beside --trtexec.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the times as JSON, for assign.profile.")
    ] = None,
    as_json: Annotated[bool, json_option("the times")] = False,
) -> None:
    """Say how long each layer of a compiled graph takes. `assign.profile` reads the times that --out writes."""
    if out is not None:
        check_output(out)
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / "graph.json").exists():
            raise RecipeError(f"{folder}: no graph.json in it: give the folder of one target that `intaglio run` wrote")
        found = find_pass("profile", Path()).pass_class
        graph, plan, target = Graph.load(folder), QuantPlan.load(folder), load_target(target_name(folder))
        if trtexec is not None:
            from intaglio.exporters.measure.profile import read_trtexec

            profile = read_trtexec(graph, plan, trtexec, layers)
        else:
            if not found.applies(target):
                raise RecipeError(f"{target.name} is not for ONNX Runtime: give trtexec's --exportProfile as --trtexec")
            given = {"rows": rows, "runs": runs, "threads": threads}
            step = found.model_validate({name: n for name, n in given.items() if n is not None})
            state = State({GRAPH: graph, PLAN: plan, TARGET: target}, reader="profile")
            profile = State(step.run(state, Context(scratch=Path(scratch), seed=0)), reader="profile")[PROFILE]
        if out is not None:
            write_output(out, profile.to_json())
        if as_json:
            print_json(profile.model_dump(mode="json"))
        elif out is None:
            print_profile(str(folder), profile)


def bench_command(
    folder: Folder,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Trajectories of each engine, by turns.")] = 5,
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows of a call; one sample with guidance has two.")] = 2,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Threads of ONNX Runtime, 0 for all cores.")] = 1,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("the figures")] = False,
) -> None:
    """Measure speed, size and memory of a compiled graph, beside full precision in the same run."""
    from intaglio.exporters.measure.benchmark import bench

    opened = Store(store)
    with tempfile.TemporaryDirectory(dir=opened.root / "scratch") as scratch:  # large models need the store's room
        found = bench(folder, opened, Context(Path(scratch)), rounds=rounds, rows=rows, threads=threads)
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            print_bench(str(folder), found)


def print_profile(title: str, profile: Profile) -> None:
    """Print the layers, the longest first, and below them the time that belongs to no layer."""
    layers = sorted(profile.layers.items(), key=lambda item: -item[1].microseconds)
    rows = [(name, time.scheme, f"{time.microseconds:,.1f}", f"{time.bytes:,}") for name, time in layers]
    rest = [(name, "no layer", f"{microseconds:,.1f}", "") for name, microseconds in profile.rest_microseconds.items()]
    missing = [(name, "no kernel", "", "") for name in profile.missing]
    called = "" if profile.rows is None else f" of {profile.rows} rows"
    title = f"{title}: {profile.made_by}, medians of {profile.runs} calls{called}"
    print_table(title, ("layer", "scheme", "µs", "bytes"), [*rows, *rest, *missing])


def print_bench(title: str, bench: Bench) -> None:
    """Print a column for each engine, the ratios below, then the figures that were not measured."""

    def mega(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:,.2f} MB"

    def row(name: str, text: Callable[[EngineFigures], str]) -> tuple[str, ...]:
        return name, *map(text, bench.engines.values())

    rows = [
        row("files", lambda e: mega(e.file_bytes)),
        row("load, first in its process", lambda e: f"{e.load_ms:,.0f} ms"),
        row("memory, resident", lambda e: mega(e.resident_bytes)),
        row("memory, peak", lambda e: mega(e.peak_bytes)),
        row("call, median", lambda e: f"{e.latency_ms:,.2f} ms"),
        row("call, quartiles", lambda e: "{:,.2f} to {:,.2f} ms".format(*e.latency_ms_quartiles)),
        row("call, CPU time", lambda e: f"{e.cpu_ms:,.2f} ms"),
        row(f"trajectory of {bench.steps} steps", lambda e: f"{e.trajectory_ms:,.1f} ms"),
    ]
    run = f"{bench.provider}, {bench.rows} rows, {bench.threads or 'all'} threads, {bench.rounds} rounds"
    print_table(f"{title}: {run}", ("", *bench.engines), rows)
    say(f"trajectory {bench.trajectory_speedup_fp32:.2f}x as fast as float32", end="")
    say(f" ({bench.trajectory_cpu_speedup_fp32:.2f}x by CPU time)", end="")
    if bench.peak_memory_ratio is not None:
        say(f", peak memory {bench.peak_memory_ratio:.2f}x smaller", end="")
    say(f", files {bench.size_ratio_fp16:.2f}x smaller than fp16")
    for name, why in bench.left_out.items():
        say(f"{name}: left out, {why}")
    for name, command in bench.filled_by.items():
        say(f"{name}: not measured here: {command}")
