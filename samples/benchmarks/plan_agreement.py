"""Does a plan cost what `assign` said that it would? Bytes and latency, predicted from profiles and measured.

    OMP_NUM_THREADS=1 python samples/benchmarks/plan_agreement.py samples/emoji-dit.yaml [--json]

Float, W8A8 and W4A16 everywhere, and mixed plans of several sizes, are compiled and timed layer by layer in ONNX
Runtime, all of them by turns. Times of the first three are the profile by which `assign` predicts the latency of the
mixed ones. Latency is that of the quantizable layers relative to float, one thread. Bytes are those of the graph's
files without what is no weight of these layers, relative to fp16. What `profile` counts of a call, layers and the rest,
is held against the whole call as `bench` times it, by turns as well.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from intaglio import Recipe, Step, Store, compile
from intaglio.exporters.measure.engine_process import EngineProcess, Setting
from intaglio.exporters.measure.profile import ProfileLayers
from intaglio.exporters.runtimes.onnxruntime.runtime import CPU, OnnxRuntime
from intaglio.pipeline.artifacts.keys import FRONT, GRAPH, PLAN, PROFILE, TARGET
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.runs.runner import CompiledTarget

RUNTIME = "onnxruntime-cpu"
PLAIN: Mapping[str, list[str]] = {
    "float": ["float"],
    "W8A8": ["w8a8_token", "w8a8o8_step", "w8a8_step"],
    "W4A16": ["w4a16"],
}
ROUND = (Step(uses="distill", options={"updates": 0, "input_rate": 0}), Step(uses="merge"))
EXPORT = (Step(uses="export-float"), Step(uses="export-qdq"))


def main(
    recipe_file: Path,
    sizes: Annotated[str, typer.Option(help="of the mixed plans, relative to fp16")] = "0.32,0.38,0.44",
    rounds: Annotated[int, typer.Option(min=1, help="profiles of each plan, by turns")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="rows of the call that is timed")] = 8,
    store: Path = Path(".intaglio/store"),
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    recipe, base = Recipe.read(recipe_file), recipe_file.parent
    before = {step.name: step for step in recipe.steps if step.name in ("calibrate", "sensitivity")}

    def compiled(*steps: Step) -> CompiledTarget:
        short = recipe.model_copy(update={"steps": steps, "targets": (RUNTIME,)})
        return compile(short, Store(store), base=base)[RUNTIME]

    def plain(schemes: list[str]) -> CompiledTarget:
        return compiled(before["calibrate"], Step(uses="uniform", options={"schemes": schemes}), *ROUND, *EXPORT)

    def assigned(size: str, profiles: Sequence[Path] = ()) -> tuple[Step, ...]:
        options = {"budget": {"size": float(size)}, "conv_output": "target", "profile": [str(p) for p in profiles]}
        return (*before.values(), Step(uses="assign", options=options))

    first = {name: plain(schemes) for name, schemes in PLAIN.items()}
    mixed = {size: compiled(*assigned(size), *ROUND, *EXPORT) for size in sizes.split(",")}
    rounds_of, of_calls = profiled({**first, **mixed}, rounds, rows)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.json" for name in first]
        for name, file in zip(first, files, strict=True):
            file.write_text(sorted(rounds_of[name], key=total)[rounds // 2].to_json())
        costs = {size: compiled(*assigned(size, files))[FRONT].chosen.costs for size in mixed}
    found = [
        {
            "weight_bits": done[PLAN].weight_bits_mean,
            "size_predicted": costs[size]["size"],
            "size_measured": size_of_layers(first["float"], done),
            "latency_predicted": costs[size]["latency"],
            "latency_measured": median(map(ratio, rounds_of[size], rounds_of["float"])),
        }
        for size, done in mixed.items()
    ]
    apart = {
        what: max(abs(row[f"{what}_measured"] / row[f"{what}_predicted"] - 1) for row in found)
        for what in ("size", "latency")
    }
    if as_json:
        print(json.dumps({"plans": found, "largest_difference": apart, "profile_to_bench": of_calls}))
        return
    for row in found:
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print("measured to predicted, at most: " + ", ".join(f"{what} {100 * d:.1f} %" for what, d in apart.items()))
    print(f"all kernels of a profile, to the call as bench times it: {of_calls:.3f}")


def profiled(plans: Mapping[str, CompiledTarget], rounds: int, rows: int) -> tuple[dict[str, list[Profile]], float]:
    """Profile the plans by turns, once a round. Also returns the time of all kernels relative to that of calls."""
    found: dict[str, list[Profile]] = {name: [] for name in plans}
    of_calls, step = list[float](), ProfileLayers(rows=rows)
    with ExitStack() as stack:
        graphs = {name: done[GRAPH].path.parent for name, done in plans.items()}
        settings = {name: Setting(folder, rows, step.threads, CPU, OnnxRuntime.name) for name, folder in graphs.items()}
        engines = {name: stack.enter_context(EngineProcess(setting)) for name, setting in settings.items()}
        for _ in range(rounds):
            for name, done in plans.items():
                state = State({key: done[key] for key in (GRAPH, PLAN, TARGET)}, reader=step.name)
                with tempfile.TemporaryDirectory() as scratch:
                    outputs = step.run(state, Context(Path(scratch), 0))
                profile = State(outputs, reader=step.name)[PROFILE]
                kernels = total(profile) + sum(profile.rest_microseconds.values())
                of_calls.append(kernels / (1e6 * median(engines[name].call(step.runs).clock)))
                found[name].append(profile)
    return found, median(of_calls)


def total(profile: Profile) -> float:
    """Microseconds of the layers."""
    return sum(time.microseconds for time in profile.layers.values())


def ratio(profile: Profile, to: Profile) -> float:
    """Return the ratio of the times of all layers."""
    return total(profile) / total(to)


def size_of_layers(whole: CompiledTarget, done: CompiledTarget) -> float:
    """Bytes of the quantizable layers in the graph's files, relative to fp16; `whole` has them in float32."""
    half = sum(layer.size_bytes(FLOAT) for layer in done[PLAN].layers)
    return (done[GRAPH].size_bytes - whole[GRAPH].size_bytes + 2 * half) / half


if __name__ == "__main__":
    typer.run(main)
