"""Compare FP8 and NVFP4, with and without balance and distillation, with Model Optimizer's FP8, NVFP4 and INT4.

    python samples/benchmarks/four_bits.py [emoji-dit emoji-unet] [--seeds 3] [--out GRIDS] [--json]

Plans: every layer in W8A8, every layer in FP8, and NVFP4 for every linear layer whose inputs are a multiple of 16, with
W8A8 for the first and the last layer and for convolutions, which have no NVFP4. Model Optimizer follows the same plans.
Samples are drawn in the simulation from noise that no training saw; PSNR is relative to the range of the full-precision
samples, and nothing is clamped. `bytes` are those of all quantizable layers, with the branches of SVDQuant in float16.
The other figures are those of `efficientdm.py`.

What is done is kept in --work: a killed run goes on, and a variant whose options did not change is not run again.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from _efficientdm_report import strips
from _efficientdm_variants import CALIBRATE, ENDS, MODELS, ROUNDED, ours
from _rows import Figures, say, speak
from efficientdm import Bench, difference, peer_rows, recovered, reference, variant
from full_size import alone, folder

from intaglio import Recipe, Step
from intaglio.pipeline.artifacts.keys import PLAN, TRAJECTORY
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.types import Denoise
from intaglio.pipeline.runs.runner import CompiledTarget

TARGET = "tensorrt-rtx-blackwell"
PLANS: Mapping[str, Mapping[str, list[str]]] = {
    "W8A8": {"schemes": ENDS},
    "FP8": {"schemes": ["fp8_token", "fp8_step"]},
    "NVFP4": {"schemes": ["nvfp4_step", *ENDS], "ends": ENDS},
}
BALANCED, DISTILLED = "balance", "balance and distillation"
BRANCHED = "balance, a branch of rank 8"
BRANCHED_DISTILLED = f"{BRANCHED}, and distillation"
COLUMNS = {
    "bytes": "{:.0f}",
    "output_mse": "{:.2e}",
    "psnr_db": "{:.2f}",
    "psnr_db_min": "{:.2f}",
    "sqnr_db": "{:.2f}",
    "feature_distance": "{:.3f}",
}


class FourBits(Bench):
    """One model, compiled for a GPU that multiplies 4-bit floating-point numbers."""

    def recipe(self, seed: int, *steps: Step) -> Recipe:
        path = str(Path(__file__).parents[1] / "models" / self.model)
        ref = ModelRef(path=path, sampling_steps=20, guidance=1.5)
        return Recipe(model=ref, targets=(TARGET,), seed=seed, steps=steps)

    def planned(self, seed: int, plan: str, *steps: Step) -> Recipe:
        return self.recipe(seed, CALIBRATE, Step(uses="uniform", options=PLANS[plan]), *steps)


def variants(model: str, plan: str) -> dict[str, tuple[Step, ...]]:
    rounded = {ROUNDED: (Step(uses="distill", options={"updates": 0, "input_rate": 0}),)}
    match plan:
        case "W8A8":
            return rounded
        case "FP8":
            return {**rounded, BALANCED: ours(model, updates=0)}
    branch = Step(uses="balance", options={"branch": 8})
    (balance, start), (_, distill) = ours(model, updates=0), ours(model)
    return {
        **rounded,
        BALANCED: (balance, start),
        DISTILLED: (balance, distill),
        BRANCHED: (branch, start),
        BRANCHED_DISTILLED: (branch, distill),
    }


def measured(bench: FourBits, plan: str, name: str, seed: int) -> Figures:
    """One of ours, with its bytes."""
    say(bench.model, f"{plan}, seed {seed}: {name}")
    row = variant(bench, plan, variants(bench.model, plan)[name], seed, first=seed == 0)
    before = [step for step in variants(bench.model, plan)[name] if step.uses == "balance"]
    return {**row, "bytes": bench.compiled(bench.planned(seed, plan, *before))[PLAN].size_bytes}


def peers(bench: FourBits, plan: str, seed: int, names: Sequence[str]) -> dict[str, Figures]:
    """Rows of modelopt's algorithms on the trajectories of this seed, in a process of its own."""
    from _four_bits_peers import PEERS, nvfp4_on_cpu, quantized_by

    def quantized(name: str, model: DenoiserModel, done: CompiledTarget) -> tuple[Denoise, Figures]:
        peer = PEERS[plan][name]
        denoise, branches = quantized_by(peer, model, done[PLAN], done[TRAJECTORY])
        return denoise, {"bytes": done[PLAN].size_bytes + branches, "narrow": peer.narrow}

    facts = {name: [str(PEERS[plan][name]), PEERS[plan][name].rows] for name in names}
    with nvfp4_on_cpu():
        return peer_rows(bench, plan, seed, facts, quantized, first=seed == 0)


def evaluate(bench: FourBits, seeds: int) -> Figures:
    """Everything of one model."""
    from _four_bits_peers import PEERS

    say(bench.model, "full precision")
    found: Figures = {"full_precision": reference(bench), "ours": {}, "peers": {}}
    for plan in PLANS:
        names = variants(bench.model, plan)
        found["ours"][plan] = {n: [measured(bench, plan, n, seed) for seed in range(seeds)] for n in names}
        if plan in PEERS:
            by_seed = [alone(peers, bench, plan, seed, list(PEERS[plan])) for seed in range(seeds)]
            found["peers"][plan] = {name: [rows[name] for rows in by_seed] for name in PEERS[plan]}
    return {**found, "figures": derived(found["ours"], found["peers"])}


Table = Mapping[str, Mapping[str, Sequence[Figures]]]


def derived(rows: Table, compared: Table) -> dict[str, Any]:
    """The figures that are compared: means over seeds. `rows` and `compared` are by plan and name."""

    def of(plan: str, name: str, figure: str = "psnr_db") -> list[float]:
        return [row[figure] for row in rows[plan][name]]

    def gain_over_best(name: str) -> dict[str, Any]:
        """Compare one of ours with the peers whose inputs have 4 bits and that are not smaller than it, on average."""
        least = rows["NVFP4"][name][0]["bytes"]
        others = {n: r for n, r in compared["NVFP4"].items() if r[0]["narrow"] and r[0]["bytes"] >= least}
        best = max(others, key=lambda n: statistics.mean(row["psnr_db"] for row in others[n]))
        gains = difference(of("NVFP4", name), [row["psnr_db"] for row in others[best]])
        return {"best_peer": best, "gain_over_best_peer_db": statistics.mean(gains)}

    best_fp8 = max(statistics.mean(row["psnr_db"] for row in seeds) for seeds in compared["FP8"].values())
    found: dict[str, Any] = {}
    for figure, name in (("nvfp4", DISTILLED), ("nvfp4_branch", BRANCHED_DISTILLED)):
        errors = [of(*each, "output_mse") for each in (("NVFP4", ROUNDED), ("NVFP4", name), ("FP8", ROUNDED))]
        found |= {f"{figure}_{what}": value for what, value in gain_over_best(name).items()}
        found[f"{figure}_recovered"] = statistics.mean(recovered(*each) for each in zip(*errors, strict=True))
    found["fp8_gain_over_w8a8_db"] = statistics.mean(difference(of("FP8", ROUNDED), of("W8A8", ROUNDED)))
    found["fp8_gain_over_best_peer_db"] = statistics.mean(of("FP8", ROUNDED)) - best_fp8
    return found


def named(found: Figures) -> dict[str, Sequence[Figures]]:
    """All rows by what people call them, by plan."""
    rows = {}
    for plan, variants_of in found["ours"].items():
        rows |= {f"{plan}, {name}": seeds for name, seeds in variants_of.items()}
        rows |= {f"modelopt {name}": seeds for name, seeds in found["peers"].get(plan, {}).items()}
    return rows


def table(model: str, found: Figures) -> str:
    """For people: means over seeds, and the spread of the PSNR."""
    lines = [f"{model:52}" + "".join(f"{column:>18}" for column in COLUMNS)]
    for name, seeds in named(found).items():
        cells = []
        for column, form in COLUMNS.items():
            values = [row[column] for row in seeds if column in row]
            spread = f" +- {statistics.stdev(values):.2f}" if column == "psnr_db" and len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append(f"  {name:50}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(
        [*lines, *(f"  {n:40} {v if isinstance(v, str) else f'{v:.2f}'}" for n, v in found["figures"].items())]
    )


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    seeds: Annotated[int, typer.Option(min=1, help="recipes with seed 0, 1, ...")] = 3,
    samples: Annotated[int, typer.Option(min=2, help="drawn with every seed")] = 32,
    work: Annotated[Path | None, typer.Option(help="a folder for store and results; kept, and used again")] = None,
    out: Annotated[Path | None, typer.Option(help="a folder for grids of samples")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    speak()
    found = {}
    with folder(work) as place:
        for model in models or MODELS:
            bench = FourBits(model, place, samples, samples)
            found[model] = evaluate(bench, seeds)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                rows = {name: row[0] for name, row in named(found[model]).items()}
                pictures = {n: bench.rows.tensors(r)["samples"] for n, r in rows.items()}
                full = {"full precision": bench.rows.tensors(found[model]["full_precision"])["samples"]}
                strips(full | pictures, out / f"{model}-four-bits.png")
            if not as_json:
                print(table(model, found[model]), flush=True)
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
