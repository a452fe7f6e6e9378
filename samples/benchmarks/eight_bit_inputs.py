"""Measure W4A4 in which some layers keep 8-bit inputs: the bytes stay those of W4A4, and `assign` chooses the layers.

    python samples/benchmarks/eight_bit_inputs.py [emoji-dit emoji-unet] [--more 1.2] [--json]

The plan of `efficientdm.py` is W4A4 with W8A8 in the first and the last layer. The other plan has at most its bytes,
and at most `--more` times its bit operations, which `assign` spends where the measured sensitivity is largest. Both are
balanced, start from GPTQ codes and are trained with equal options. The output error and PSNR are to full precision, on
noise that no training saw. Results are kept in --work.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from _efficientdm_variants import CALIBRATE, GROUPS, MODELS, UPDATES, ours
from _rows import Figures, speak
from efficientdm import Bench, quality
from full_size import folder

from intaglio import Step
from intaglio.pipeline.artifacts.keys import PLAN, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.cost import bit_operations
from intaglio.pipeline.formats.layer import admitted_schemes
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.runs.runner import CompiledTarget

SCHEMES = {
    "linear": ["w4a4_token", "w4a8_token", "w8a8_token"],
    "conv": ["w4a4_step", "w4a8_step", "w8a8_step"],
}
MEASURED: Mapping[str, Any] = {
    "rows": 2,
    "buckets": 1,
    "samples": 4,
    "groups": GROUPS,
    "drift_below_db": -100,  # all layers are predicted: whole trajectories would take longer than the training
}
ROUNDING = 1e-5
"""Added to the size that `assign` may use, since budgets are written with five digits."""


def shares(plan: QuantPlan, rows: Mapping[str, float]) -> tuple[float, float]:
    """Bytes and bit operations of the layers, relative to float."""
    layers, schemes = plan.layers, plan.schemes
    size = sum(x.size_bytes(schemes[x.name]) for x in layers) / sum(x.size_bytes(FLOAT) for x in layers)
    done = sum(bit_operations(x, schemes[x.name], rows[x.name]) for x in layers)
    return size, done / sum(bit_operations(x, FLOAT, rows[x.name]) for x in layers)


def possible(plan: QuantPlan) -> dict[str, list[str]]:
    """The schemes of each kind of layer that the shape of some layer admits."""
    admitted = {(x.op, scheme.name) for x in plan.layers for scheme in admitted_schemes(x, GROUPS)}
    return {op: found for op, names in SCHEMES.items() if (found := [name for name in names if (op, name) in admitted])}


def figures(bench: Bench, done: CompiledTarget, rows: Mapping[str, float]) -> Figures:
    """Quality of one plan, and its cost."""
    size, bops = shares(done[PLAN], rows)
    schemes = dict(Counter(scheme.name for scheme in done[PLAN].schemes.values()))
    return {**quality(bench, done, first=False), "size": size, "bops": bops, "schemes": schemes}


def evaluate(bench: Bench, more: float, updates: int, seed: int) -> Figures:
    """Both plans, without and with updates."""
    uniform = bench.compiled(bench.planned(seed, "W4A4"))
    rows = uniform[WORKLOAD].rows
    size, bops = shares(uniform[PLAN], rows)
    budget = {"size": round(size, 5) + ROUNDING, "bops": round(bops * more, 6)}
    schemes = possible(uniform[PLAN])
    choose = (
        Step(uses="sensitivity", options={**MEASURED, "schemes": schemes}),
        Step(uses="assign", options={"schemes": schemes, "budget": budget, "front": 0}),
    )
    found = {}
    for count in dict.fromkeys((0, updates)):
        last = (*ours(bench.model, updates=count), Step(uses="merge"))
        recipes = {
            "W4A4": bench.planned(seed, "W4A4", *last),
            "with 8-bit inputs": bench.recipe(seed, CALIBRATE, *choose, *last),
        }
        for name, recipe in recipes.items():
            found[f"{name}, {count} updates"] = figures(bench, bench.compiled(recipe), rows)
    return found


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    more: Annotated[float, typer.Option(min=1, help="bit operations, relative to those of W4A4")] = 1.2,
    updates: Annotated[int | None, typer.Option(min=0, help="of the training; None: as many as efficientdm.py")] = None,
    samples: Annotated[int, typer.Option(min=1, help="drawn from noise that no training saw")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="of the recipes")] = 0,
    work: Annotated[Path | None, typer.Option(help="a folder for the store; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    speak()
    found = {}
    with folder(work) as place:
        for model in models or MODELS:
            bench = Bench(model, place, samples, samples)
            found[model] = evaluate(bench, more, UPDATES[model] if updates is None else updates, seed)
            if not as_json:
                for name, row in found[model].items():
                    quality = f"{row['output_mse']:.2e} {row['psnr_db']:.1f} dB, lowest {row['psnr_db_min']:.1f} dB"
                    print(f"{model:12} {name:32} {quality}, size {row['size']:.4f}, bops {row['bops']:.4f}", flush=True)
                    print(f"{'':12} {row['schemes']}", flush=True)
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
