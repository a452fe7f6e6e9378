"""Measure the gain from choosing the bits of every layer: W8A8, and mixed W8A8 and W4A8 plans beside others as large.

    python samples/benchmarks/viditq.py [emoji-dit emoji-unet emoji-pixart emoji-latte] [--json]

Samples are drawn in the simulation of the merged integers, from noise that nothing was calibrated on and that is the
same for all plans; PSNR is to full precision, the mean over samples. Distances of features are relative to the mean
distance of two full-precision samples of a condition from different noise. `w8a8` is balanced; `mixed` is as small as
--mixed asks, balanced and from GPTQ codes, without distillation; `small` is as small as --small asks, or as plans can
be, with distillation.

Plans at the size of `mixed` differ in the layers that have 4-bit weights: ours by sensitivity, measured on balanced
layers; from the beginning of the network; all layers, which is smaller; by `auto_quantize` of modelopt; and at random.
`nearest`: all rounded to nearest. `balanced`: as `mixed` is. Sensitivity's speed is that of `sensitivity_speed.py`.

What is done is kept in --work: a killed run goes on.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer
from _efficientdm_variants import BALANCE, DISTILL
from _rows import Figures, Rows, draw, full_precision, say, simulated, speak
from _viditq_plans import WIDE, Ends, auto_quantized, given, uniform
from full_size import alone, folder
from sensitivity_speed import speeds

from intaglio import Recipe, Step, Store, compile
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.runs.runner import CompiledTarget

BASE = Path(__file__).parents[1]
MODELS: Mapping[str, str] = {
    "emoji-dit": "emoji-dit.yaml",
    "emoji-unet": "emoji-unet.yaml",
    "emoji-pixart": "viditq-w4a8.yaml",
    "emoji-latte": "video-w8a8.yaml",
}
"""A recipe that has the model."""
CALIBRATE = Step(uses="calibrate", options={"samples": 32})
NEAREST = (Step(uses="distill", options={"updates": 0, "input_rate": 0}),)
BALANCED, DISTILLED = ((BALANCE, Step(uses="distill", options={**DISTILL, "updates": updates})) for updates in (0, 120))
VERSION = 2
"""Raised where a figure is computed otherwise than before."""


@dataclass(frozen=True)
class Bench:
    """One model with one seed of its recipe, and where results are kept."""

    model: str
    work: Path
    samples: int
    seed: int = 0

    @property
    def rows(self) -> Rows:
        return Rows(self.work, {"version": VERSION, "samples": self.samples})

    @property
    def file(self) -> Path:
        return BASE / MODELS[self.model]

    @property
    def store(self) -> Store:
        return Store(self.work / "store")

    def compiled(self, *steps: Step) -> CompiledTarget:
        recipe = Recipe.read(self.file)
        changes = {"targets": ("tensorrt-rtx",), "seed": self.seed, "steps": steps}
        (done,) = compile(recipe.model_copy(update=changes), self.store, base=BASE).values()
        return done

    @cached_property
    def ends(self) -> Ends:
        return Ends.of(self.compiled)

    def planned(self, limit_bytes: int) -> tuple[Step, ...]:
        """Our plan."""
        return (*self.ends.analysis(), self.ends.assigned(limit_bytes))

    def measured(self, name: str, plan: Sequence[Step], after: Sequence[Step]) -> Figures:
        """Return figures of the samples of this plan beside those of full precision."""
        say(self.model, f"seed {self.seed}: {name}")
        done = self.compiled(CALIBRATE, *plan, *after, Step(uses="merge"))
        full = full_precision(self.rows, done[MODEL], done.outputs[MODEL], self.samples)
        ratio = self.ends.float_bytes / done[PLAN].size_bytes

        def make(place: Path) -> Figures:
            from _image_distance import feature_distance, features, psnr_db, sqnr_db

            whole = self.rows.tensors(full)
            x = draw(*simulated(done), self.samples)
            psnr = psnr_db(x, whole["samples"])
            row = {"psnr_db": float(psnr.mean()), "psnr_db_min": float(psnr.min()), "size_ratio_fp16": ratio}
            row["sqnr_db"] = float(sqnr_db(x, whole["samples"]).mean())
            if "features.reference" in whole:
                apart = float(feature_distance(features(x), whole["features.reference"]).mean())
                row["feature_distance"] = apart / full["feature_distance_of_noises"]
            return row

        return self.rows.kept(make, model=done.outputs[MODEL], quantized=done.outputs[QUANTIZED], ratio=ratio)


def evaluate(bench: Bench, mixed: float, small: float, random_plans: int) -> Figures:
    """Rows of one model and one seed: by name, and of plans with the bytes of `mixed` by treatment and name."""
    ends = bench.ends
    limit, least = (max(int(ends.float_bytes / ratio), ends.narrow.size_bytes) for ratio in (mixed, small))
    plans = {
        "ours": bench.planned(limit),
        "network order": given(ends.in_order(limit)),
        "all layers": given(ends.narrow),
        "auto_quantize": given(ends.fitted(modelopts(bench, limit), limit)),
    }
    chance = {f"random {i}": given(plan) for i, plan in enumerate(ends.random(random_plans, limit))}
    found = {
        "w8a8": bench.measured("W8A8, balanced", (uniform(WIDE),), BALANCED),
        "mixed": bench.measured("ours, balanced", plans["ours"], BALANCED),
        "small": bench.measured("small, distilled", bench.planned(least), DISTILLED),
    }
    treatments = {"nearest": (NEAREST, plans | chance), "balanced": (BALANCED, plans)}
    for treatment, (after, each) in treatments.items():
        found[treatment] = {name: bench.measured(f"{name}, {treatment}", plan, after) for name, plan in each.items()}
    return found


def modelopts(bench: Bench, limit_bytes: int) -> list[str]:
    """Layers to which it gives 4 bits, found in a process of its own."""
    done = bench.compiled(CALIBRATE)

    def make(_: Path) -> Figures:
        say(bench.model, f"seed {bench.seed}: modelopt's auto_quantize")
        return {"layers": alone(auto_quantized, done, bench.ends, limit_bytes)}

    depends = {"model": done.outputs[MODEL], "trajectory": done.outputs[TRAJECTORY], "limit": limit_bytes}
    layers: list[str] = bench.rows.kept(make, what="auto_quantize", **depends)["layers"]
    return layers


def sensitivity_speeds(bench: Bench) -> Figures:
    """CPU seconds of its estimates, measured once for a model, in a process of its own."""

    def make(_: Path) -> Figures:
        say(bench.model, "speed of sensitivity")
        return alone(speeds, bench.file, bench.store)

    return bench.rows.kept(make, what="speeds", model=bench.compiled(CALIBRATE).outputs[MODEL])


def derived(seeds: Sequence[Figures], speed: Figures) -> Figures:
    """Figures of one model, means over seeds; a plan beats others where it does so in both treatments.

    Sensitivity's time is that of the whole step.
    """

    def mean(row: str, figure: str = "psnr_db", treatment: str | None = None) -> float:
        rows = [(seed[treatment] if treatment else seed)[row] for seed in seeds]
        return statistics.mean(found[figure] for found in rows)

    figures: Figures = {}
    for row in ("w8a8", "mixed", "small"):
        names = [
            n
            for n in ("psnr_db", "psnr_db_min", "sqnr_db", "size_ratio_fp16", "feature_distance")
            if n in seeds[0][row]
        ]
        figures |= {f"{row}_{name}": mean(row, name) for name in names}
    for treatment in ("nearest", "balanced"):
        names = seeds[0][treatment]
        of = {name: mean(name, treatment=treatment) for name in names}
        others = {"uniform": max(of["network order"], of["all layers"]), "auto_quantize": of["auto_quantize"]}
        if chance := [of[name] for name in names if name.startswith("random")]:
            others |= {"random": statistics.mean(chance), "best_random": max(chance)}
        figures |= {f"gain_over_{other}_{treatment}_db": of["ours"] - db for other, db in others.items()}
    for other in ("uniform", "auto_quantize"):
        gains = [figures[f"gain_over_{other}_{treatment}_db"] for treatment in ("nearest", "balanced")]
        figures[f"plan_beats_{other}"] = min(gains) > 0
    buckets = MeasureSensitivity().buckets  # of which one is measured in the other ways
    figures["sensitivity_speedup"] = buckets * speed["direct_without_reuse_cpu_s"] / speed["step_cpu_s"]
    figures["sensitivity_speedup_over_auto_quantize"] = buckets * speed["auto_quantize_cpu_s"] / speed["step_cpu_s"]
    figures["screen_speedup_over_auto_quantize"] = speed["auto_quantize_cpu_s"] / speed["screen_cpu_s"]
    return figures


def summary(models: Sequence[Figures]) -> Figures:
    """The worst of the models: the least of each figure, of distances the largest."""
    common = [name for name in models[0] if all(name in figures for figures in models)]
    return {n: (max if n.endswith("distance") else min)(figures[n] for figures in models) for n in common}


def table(model: str, seeds: Sequence[Figures], figures: Figures) -> str:
    """For people."""
    rows = {name: [seed[name] for seed in seeds] for name in ("w8a8", "mixed", "small")}
    for treatment in ("nearest", "balanced"):
        rows |= {f"{name}, {treatment}": [s[treatment][name] for s in seeds] for name in seeds[0][treatment]}
    columns = ("size_ratio_fp16", "psnr_db", "psnr_db_min", "sqnr_db", "feature_distance")
    lines = [f"{model:28}" + "".join(f"{column:>18}" for column in columns)]
    for name, found in rows.items():
        cells = [statistics.mean(row[c] for row in found) if c in found[0] else None for c in columns]
        lines.append(f"  {name:26}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>18}" for cell in cells))
    return "\n".join([*lines, *listed(figures)])


def listed(figures: Figures) -> list[str]:
    return [f"  {n:42} {v if isinstance(v, bool) else f'{v:.2f}'}" for n, v in figures.items()]


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    samples: Annotated[int, typer.Option(min=1, help="drawn for each plan")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="recipes with seed 0, 1, ...")] = 1,
    mixed: Annotated[float, typer.Option(help="how much smaller than fp16, without distillation")] = 2.5,
    small: Annotated[float, typer.Option(help="the same with distillation; as small as plans can be, at most")] = 3.5,
    random_plans: Annotated[int, typer.Option(min=0)] = 5,
    work: Annotated[Path | None, typer.Option(help="a folder for store and results; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    if unknown := sorted(set(models or ()) - set(MODELS)):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}: there is {', '.join(MODELS)}")
    speak()
    figures, rows = {}, {}
    with folder(work) as place:
        for model in models or MODELS:
            benches = [Bench(model, place, samples, seed) for seed in range(seeds)]
            rows[model] = [evaluate(bench, mixed, small, random_plans) for bench in benches]
            figures[model] = derived(rows[model], sensitivity_speeds(benches[0]))
            if not as_json:
                print(table(model, rows[model], figures[model]), flush=True)
    total = summary(list(figures.values()))
    if as_json:
        print(json.dumps({**total, "models": figures, "rows": rows}))
    elif len(figures) > 1:
        print("\n".join(["the worst of the models", *listed(total)]))


if __name__ == "__main__":
    typer.run(main)
