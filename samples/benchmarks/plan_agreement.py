"""Does a plan cost what `assign` said that it would? Bytes and latency, predicted from profiles and measured.

    OMP_NUM_THREADS=1 python samples/benchmarks/plan_agreement.py samples/emoji-dit.yaml [--json]

Float, W8A8 and W4A16 everywhere are compiled and timed layer by layer in ONNX Runtime, which is the profile. With it
`assign` makes mixed plans at several sizes; these are compiled and timed too, by turns with the first ones. Latency is
that of the quantizable layers relative to float, one thread. Bytes are those of the graph's files without what is no
weight of these layers, relative to fp16.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from intaglio.exporters.profile import ProfileLayers
from intaglio.pipeline import Recipe, Step, Store, compile
from intaglio.pipeline.artifact import State
from intaglio.pipeline.context import Context
from intaglio.pipeline.keys import FRONT, GRAPH, PLAN, PROFILE, TARGET
from intaglio.pipeline.profile import Profile
from intaglio.pipeline.quant.spec import FLOAT
from intaglio.pipeline.runner import CompiledTarget

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

    def mixed(size: str, profiles: Sequence[Path]) -> CompiledTarget:
        options = {"budget": {"size": float(size)}, "conv_output": "target", "profile": [str(p) for p in profiles]}
        return compiled(*before.values(), Step(uses="assign", options=options), *ROUND, *EXPORT)

    with tempfile.TemporaryDirectory() as folder:
        first = {name: plain(schemes) for name, schemes in PLAIN.items()}
        files = []
        for name, profile in profiled(first, rounds, rows).items():
            files.append(Path(folder) / f"{name}.json")
            files[-1].write_text(profile.to_json())
        plans = {size: mixed(size, files) for size in sizes.split(",")}
    times = {n: total(p) for n, p in profiled({"float": first["float"], **plans}, rounds, rows).items()}
    found = []
    for size, done in plans.items():
        said = done[FRONT].chosen.costs
        found.append(
            {
                "weight_bits": done[PLAN].weight_bits_mean,
                "size_predicted": said["size"],
                "size_measured": size_of_layers(first["float"], done),
                "latency_predicted": said["latency"],
                "latency_measured": times[size] / times["float"],
            }
        )
    apart = {
        what: max(abs(row[f"{what}_measured"] / row[f"{what}_predicted"] - 1) for row in found)
        for what in ("size", "latency")
    }
    if as_json:
        print(json.dumps({"plans": found, "largest_difference": apart}))
        return
    for row in found:
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print("measured to predicted, at most: " + ", ".join(f"{what} {100 * d:.1f} %" for what, d in apart.items()))


def profiled(plans: Mapping[str, CompiledTarget], rounds: int, rows: int) -> dict[str, Profile]:
    """Of every plan: the round whose layers took the median of all rounds, which are by turns."""
    found: dict[str, list[Profile]] = {name: [] for name in plans}
    step = ProfileLayers(rows=rows)
    for _ in range(rounds):
        for name, done in plans.items():
            state = State({key: done[key] for key in (GRAPH, PLAN, TARGET)}, reader=step.name)
            with tempfile.TemporaryDirectory() as scratch:
                outputs = step.run(state, Context(Path(scratch), 0))
                found[name].append(State(outputs, reader=step.name)[PROFILE])
    return {name: sorted(each, key=total)[len(each) // 2] for name, each in found.items()}


def total(profile: Profile) -> float:
    """Microseconds of the layers."""
    return sum(time.microseconds for time in profile.layers.values())


def size_of_layers(whole: CompiledTarget, done: CompiledTarget) -> float:
    """Bytes of the quantizable layers in the graph's files, relative to fp16; `whole` has them in float32."""
    half = sum(layer.size_bytes(FLOAT) for layer in done[PLAN].layers)
    return (done[GRAPH].size_bytes - whole[GRAPH].size_bytes + 2 * half) / half


if __name__ == "__main__":
    typer.run(main)
