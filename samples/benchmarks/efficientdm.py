"""Measure the gain of data-free distillation of adapters: W8A8, W4A8 and W4A4 with and without, peers, ablations, QAT.

    npm pack emoji-datasource-google@16.0.0
    python samples/benchmarks/efficientdm.py [emoji-dit emoji-unet] --data emoji-datasource-google-16.0.0.tgz [--json]

Every layer has the plan's format where its shape admits it, else W8A8; the first and the last layer have W8A8. Errors
and distances are to full precision, on noise that no training saw and that is the same for all variants: `output_mse`
is the mean squared error of the guided output along full-precision trajectories, all steps alike; PSNR, SSIM and SQNR
are means over samples. Distances of features are relative to the mean distance of two full-precision samples of a class
from different noise; KID is to full-precision samples from other noise, next to full precision's own. Without --data no
QAT is run. CPU seconds of QAT begin at its first update, those of ours and of QAT on our loss with calibration.

Results are kept in --work: a killed run continues, and a variant whose options did not change is not run again.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from _efficientdm_variants import (
    CALIBRATE,
    ENDS,
    GROUPS,
    MODELS,
    OURS,
    OURS_BRANCHED,
    PLANS,
    QAT_START,
    ROUNDED,
    TRAINED,
    ablations,
    ours,
    variants,
)
from _rows import Figures, Rows, draw, full_precision, say, simulated, speak
from full_size import alone, folder

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.types import Denoise
from intaglio.pipeline.runs.runner import CompiledTarget
from intaglio.pipeline.runs.store import file_digest

# ---- measuring -------------------------------------------------------------------------------------------------------

VERSION = 3
"""Raised where a figure is computed otherwise than before."""
HELD_OUT_SEED = 10_000
HELD_OUT_SAMPLES = 8
PICTURES = 16


@dataclass(frozen=True)
class Bench:
    """One model, and where results are kept."""

    model: str
    work: Path
    samples: int
    """Number of samples of the first seed, from which features and KID are computed."""
    compared: int
    """Number of samples of every seed from which PSNR, SSIM and SQNR are computed; the first ones of the first seed."""

    def recipe(self, seed: int, *steps: Step) -> Recipe:
        path = str(Path(__file__).parents[1] / "models" / self.model)
        ref = ModelRef(path=path, sampling_steps=20, guidance=1.5)
        return Recipe(model=ref, targets=("tensorrt-rtx",), seed=seed, steps=steps)

    def planned(self, seed: int, plan: str, *steps: Step) -> Recipe:
        uniform = Step(uses="uniform", options={"schemes": PLANS[plan], "ends": ENDS, "groups": GROUPS})
        return self.recipe(seed, CALIBRATE, uniform, *steps)

    def compiled(self, recipe: Recipe) -> CompiledTarget:
        (done,) = compile(recipe, Store(self.work / "store"), base=Path(__file__).parent).values()
        return done

    def held_out(self) -> CompiledTarget:
        step = Step(uses="calibrate", options={"samples": HELD_OUT_SAMPLES})
        return self.compiled(self.recipe(HELD_OUT_SEED, step))

    @property
    def rows(self) -> Rows:
        return Rows(self.work, {"version": VERSION, "samples": self.samples, "compared": self.compared})


def reference(bench: Bench) -> Figures:
    """Full precision."""
    done = bench.held_out()
    return full_precision(bench.rows, done[MODEL], done.outputs[MODEL], bench.samples)


def measure(
    denoise: Denoise, sampler: Sampler, bench: Bench, held_out: Trajectory, full: Figures, place: Path, *, first: bool
) -> Figures:
    """All figures of one quantized denoiser; those of features where it is of the first seed."""
    from _efficientdm_training import output_error
    from _image_distance import feature_distance, features, kid, psnr_db, sqnr_db, ssim
    from safetensors.torch import save_file

    whole = bench.rows.tensors(full)
    x = draw(denoise, sampler, bench.samples if first else bench.compared)
    some, ref = x[: bench.compared], whole["samples"][: bench.compared]
    psnr = psnr_db(some, ref)
    figures = {
        "output_mse": output_error(denoise, sampler, held_out),
        "psnr_db": float(psnr.mean()),
        "psnr_db_min": float(psnr.min()),
        "ssim": float(ssim(some, ref).mean()),
        "sqnr_db": float(sqnr_db(some, ref).mean()),
    }
    if first:
        found = features(x)
        apart = feature_distance(found, whole["features.reference"])
        figures["feature_distance"] = float(apart.mean()) / full["feature_distance_of_noises"]
        figures["kid"] = kid(found, whole["features.others"])
    save_file({"samples": x[:PICTURES].contiguous()}, place.with_suffix(".safetensors"))
    return figures


def variant(bench: Bench, plan: str, steps: Sequence[Step], seed: int, *, first: bool) -> Figures:
    """One of ours: compiled, and measured in the simulation of its integers."""
    return quality(bench, bench.compiled(bench.planned(seed, plan, *steps, Step(uses="merge"))), first=first)


def quality(bench: Bench, done: CompiledTarget, *, first: bool) -> Figures:
    """All figures of a compiled plan, in the simulation of its integers."""
    held, full = bench.held_out(), reference(bench)

    def make(place: Path) -> Figures:
        denoise, sampler = simulated(done)
        return measure(denoise, sampler, bench, held[TRAJECTORY], full, place, first=first)

    return bench.rows.kept(
        make,
        what="variant",
        model=done.outputs[MODEL],
        quantized=done.outputs[QUANTIZED],
        held_out=held.outputs[TRAJECTORY],
        first=first,
    )


def peers(bench: Bench, plan: str, seed: int, names: Sequence[str], *, first: bool) -> dict[str, Figures]:
    """Rows of modelopt's algorithms on the trajectories of this seed, in a process of its own."""
    from _efficientdm_peers import CALIBRATION_ROWS, PEERS, quantized_by

    def quantized(name: str, model: DenoiserModel, done: CompiledTarget) -> tuple[Denoise, Figures]:
        return quantized_by(PEERS[plan][name], model, done[PLAN], done[TRAJECTORY]), {}

    facts = {name: [*map(str, PEERS[plan][name]), CALIBRATION_ROWS] for name in names}
    return peer_rows(bench, plan, seed, facts, quantized, first=first)


def peer_rows(
    bench: Bench,
    plan: str,
    seed: int,
    facts: Mapping[str, Sequence[object]],
    quantized: Callable[[str, DenoiserModel, CompiledTarget], tuple[Denoise, Figures]],
    *,
    first: bool,
) -> dict[str, Figures]:
    """Rows of modelopt's algorithms, each kept under its `facts`; `quantized` also returns figures that it adds."""
    from importlib.metadata import version

    done, held, full = bench.compiled(bench.planned(seed, plan)), bench.held_out(), reference(bench)
    speak()
    rows = {}
    for name, each in facts.items():

        def make(place: Path, name: str = name) -> Figures:
            say(bench.model, f"{plan}, seed {seed}: modelopt {name}")
            model = done[MODEL].open()
            sampler = Sampler(model, done[MODEL].ref.sampling_steps, done[MODEL].ref.guidance)
            denoise, more = quantized(name, model, done)
            return {**measure(denoise, sampler, bench, held[TRAJECTORY], full, place, first=first), **more}

        rows[name] = bench.rows.kept(
            make,
            what="peer",
            peer=[*each, version("nvidia-modelopt")],
            model=done.outputs[MODEL],
            plan=done.outputs[PLAN],
            trajectory=done.outputs[TRAJECTORY],
            held_out=held.outputs[TRAJECTORY],
            first=first,
        )
    return rows


def training(bench: Bench, data: Path, updates: int) -> Figures:
    """Ours and QAT on the plan `TRAINED`, each in a process of its own, with the first seed."""
    import _efficientdm_training as t

    from intaglio.passes.distill.distill import Distill

    *before, last = ours(bench.model)
    base, options = Path(__file__).parent, Distill(**last.options)
    plain, balanced = bench.planned(0, TRAINED), bench.planned(0, TRAINED, *before)
    held = bench.held_out()

    def depends(recipe: Recipe) -> Figures:
        done = bench.compiled(recipe)
        inputs = [done.outputs[key] for key in (MODEL, PLAN, TRAJECTORY)] + [held.outputs[TRAJECTORY]]
        return {"what": "training", "inputs": inputs}

    def trained(kind: str, recipe: Recipe, options: Distill) -> Figures:
        def make(place: Path) -> Figures:
            say(bench.model, f"{TRAINED}: {kind}, rate {options.rate:g}, {options.updates} updates")
            task = t.Training(kind, recipe, base, bench.work / "store", options, data.resolve())
            found = alone(t.run, task, held[TRAJECTORY], place)
            (place / "distill.pt").unlink()
            place.rmdir()
            return found

        digest = file_digest(data) if kind == t.QAT else ""
        version = f"{options.version} {options.model_dump_json()}"
        return bench.rows.kept(make, kind=kind, options=version, data=digest, **depends(recipe))

    def make_preparation(place: Path) -> Figures:
        return {"cpu_s": alone(t.preparation_cpu_s, balanced, base)}

    prepared = bench.rows.kept(make_preparation, kind="preparation", **depends(balanced))
    rows = {
        t.OURS: trained(t.OURS, balanced, options),
        t.QAT: trained(t.QAT, plain, options.model_copy(update={**QAT_START, "updates": updates})),
        t.QAT_OWN_LOSS: trained(t.QAT_OWN_LOSS, balanced, options),
    }
    ours_row = rows[t.OURS]
    start_s = prepared["cpu_s"] + ours_row["started_cpu_s"]
    return {
        "curves": {kind: row["curve"] for kind, row in rows.items()},
        "peak_bytes": {kind: row["peak_bytes"] for kind, row in rows.items()},
        "training_bytes": {kind: row["training_bytes"] for kind, row in rows.items()},
        "ours_start_cpu_s": start_s,
        "memory_ratio": ours_row["training_bytes"] / rows[t.QAT]["training_bytes"],
        t.QAT: t.time_ratios(ours_row["curve"], start_s, rows[t.QAT]["curve"], 0.0),
        t.QAT_OWN_LOSS: t.time_ratios(ours_row["curve"], start_s, rows[t.QAT_OWN_LOSS]["curve"], start_s),
    }


# ---- figures ---------------------------------------------------------------------------------------------------------


def recovered(rounded: float, ours: float, eight: float) -> float:
    """Share of the error between a plan rounded to nearest and W8A8 that is gone: 1 where ours is as good as W8A8."""
    return (rounded - ours) / (rounded - eight)


def derived(rows: Mapping[str, Mapping[str, Sequence[Figures]]], best_peer: Sequence[Figures]) -> dict[str, Figures]:
    """Figures of one model by seed, with mean and spread. `rows` are by plan and variant, `best_peer` that of W4A8."""

    def of(plan: str, name: str, figure: str) -> list[float]:
        return [row[figure] for row in rows[plan][name]]

    eight = of("W8A8", ROUNDED, "output_mse")
    by_seed: dict[str, list[float]] = {}
    peer = [row["psnr_db"] for row in best_peer]
    for figure, plan, name in (
        ("w4a4", "W4A4", OURS),
        ("w4a8", "W4A8", OURS),
        ("w4a8_branch", "W4A8", OURS_BRANCHED),
    ):
        errors = zip(of(plan, ROUNDED, "output_mse"), of(plan, name, "output_mse"), eight, strict=True)
        by_seed[f"{figure}_recovered"] = [recovered(*each) for each in errors]
        by_seed[f"{figure}_gain_db"] = difference(of(plan, name, "psnr_db"), of(plan, ROUNDED, "psnr_db"))
        if plan == "W4A8":
            by_seed[f"{figure}_gain_over_best_peer_db"] = difference(of(plan, name, "psnr_db"), peer)
    by_seed["w8a8_gain_db"] = difference(of("W8A8", OURS, "psnr_db"), of("W8A8", ROUNDED, "psnr_db"))
    by_seed["w8a8_not_worse"] = [
        float(ours <= rounded) for ours, rounded in zip(of("W8A8", OURS, "output_mse"), eight, strict=True)
    ]
    return {
        name: {"mean": statistics.mean(found), "spread": spread(found), "seeds": found}
        for name, found in by_seed.items()
    }


def difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def evaluate(bench: Bench, seeds: int, data: Path | None, updates: int, *, ablated: bool) -> Figures:
    """Everything of one model, the ablations last."""
    from _efficientdm_peers import PEERS

    say(bench.model, "full precision")
    found: Figures = {"full_precision": reference(bench), "variants": {}, "peers": {}, "best_peer": {}}
    for plan in PLANS:
        rows = found["variants"][plan] = {}
        for name, steps in variants(bench.model, plan).items():
            rows[name] = []
            for seed in range(seeds):
                say(bench.model, f"{plan}, seed {seed}: {name}")
                rows[name].append(variant(bench, plan, steps, seed, first=seed == 0))
        compared = alone(peers, bench, plan, 0, list(PEERS[plan]), first=True)
        best = max(compared, key=lambda name: compared[name]["psnr_db"])
        others = [alone(peers, bench, plan, seed, [best], first=False)[best] for seed in range(1, seeds)]
        found["peers"][plan], found["best_peer"][plan] = compared, {"name": best, "seeds": [compared[best], *others]}
    found["figures"] = derived(found["variants"], found["best_peer"]["W4A8"]["seeds"])
    if data is not None:
        found["training"] = training(bench, data, updates)
    for name, steps in ablations(bench.model).items() if ablated else ():
        say(bench.model, f"{TRAINED}: {name}")
        found["variants"][TRAINED][name] = [variant(bench, TRAINED, steps, 0, first=True)]
    return found


def summary(models: Mapping[str, Figures]) -> Figures:
    """The least of each figure over the models, means over seeds; of memory the most."""
    first = next(iter(models.values()))
    least = {name: min(m["figures"][name]["mean"] for m in models.values()) for name in first["figures"]}
    if "training" not in first:
        return least
    for field, kind in (("qat", "qat"), ("qat_own_loss", "qat on our loss")):
        for ratio, name in (("ratio", f"{field}_time_ratio"), ("ratio_to_our_best", f"{field}_time_ratio_to_our_best")):
            worst = min((m["training"][kind] for m in models.values()), key=lambda found: found[ratio])
            least |= {name: worst[ratio], f"{name}_is_bound": worst[f"{ratio}_is_bound"]}
    return least | {"qat_memory_ratio": max(m["training"]["memory_ratio"] for m in models.values())}


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    seeds: Annotated[int, typer.Option(min=1, help="recipes with seed 0, 1, ...")] = 3,
    samples: Annotated[int, typer.Option(min=2, help="drawn with the first seed, for features and KID")] = 64,
    compared: Annotated[int, typer.Option(min=1, help="of these, drawn with every seed, for PSNR, SSIM, SQNR")] = 32,
    qat_updates: Annotated[int, typer.Option(help="budget of QAT")] = 1200,
    ablated: Annotated[
        bool, typer.Option("--ablations/--no-ablations", help="with the first seed, what each part of the method adds")
    ] = True,
    data: Annotated[Path | None, typer.Option(help="the npm archive, for QAT")] = None,
    work: Annotated[Path | None, typer.Option(help="a folder for store and results; kept, and used again")] = None,
    out: Annotated[Path | None, typer.Option(help="a folder for grids of samples and curves of training")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    from _efficientdm_report import curves, grid, tables

    speak()
    if data is not None and not data.is_file():
        raise typer.BadParameter(f"no file {data}: npm pack emoji-datasource-google@16.0.0 makes it")
    found = {}
    with folder(work) as place:
        for model in models or MODELS:
            bench = Bench(model, place, samples, min(compared, samples))
            found[model] = evaluate(bench, seeds, data, qat_updates, ablated=ablated)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                grid(bench, found[model], out / f"{model}-efficientdm.png")
                if data is not None:
                    curves(found[model]["training"], out / f"{model}-qat.png")
            if not as_json:
                print(tables(model, found[model]), flush=True)
    total = summary(found)
    if as_json:
        print(json.dumps({**total, "models": found}))
    else:
        print("least of the models\n" + "\n".join(f"  {name:40} {value}" for name, value in total.items()))


if __name__ == "__main__":
    typer.run(main)
