"""Is the plan that was found better than chance? Mixed W8A8 / W4A16 at 0.65 of W8A8's bytes, against random plans.

    python samples/benchmarks/mixed_plan.py samples/emoji-dit.yaml [--json]

Every plan is rounded to nearest without distillation and draws the same samples from the same noise in the simulation;
PSNR and SQNR are to full precision, the mean of each sample's own; the peak is the range of full-precision samples. A
random plan turns layers to 4 bits in random order while it has more bytes than the plan that was found, so it never has
more than the found plan could have used.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import PLAN, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme
from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import clocked, denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import quality
from intaglio.pipeline.simulation.model import quantize_model


def main(
    recipe_file: Path,
    share: Annotated[float, typer.Option(help="bytes of the mixed plans, relative to W8A8")] = 0.65,
    random_plans: int = 10,
    samples: int = 16,
    store: Path = Path(".intaglio/store"),
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    recipe = Recipe.read(recipe_file)
    analysis = tuple(step for step in recipe.steps if step.name in ("calibrate", "sensitivity"))
    base = recipe_file.parent

    def assigned(size: float) -> tuple[QuantPlan, Sensitivity, Trajectory]:
        step = Step(uses="assign", options={"budget": {"size": size}})
        short = recipe.model_copy(update={"steps": (*analysis, step), "targets": recipe.targets[:1]})
        done = compile(short, Store(store), base=base)[recipe.targets[0]]
        return done[PLAN], done[SENSITIVITY], done[TRAJECTORY]

    eight, table, trajectory = assigned(1.0)
    whole = eight.size_bytes / share_of_fp16(eight)
    mixed, *_ = assigned(share * eight.size_bytes / whole)
    limit = mixed.size_bytes
    checkpoint = Checkpoint.resolve(recipe.model, base)
    sampler = Sampler(checkpoint.open(), checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    start = sampler.start(samples, torch.Generator().manual_seed(2))
    reference = draw(checkpoint, None, trajectory, start)

    def decibels(plan: QuantPlan) -> tuple[float, float]:
        """PSNR and SQNR."""
        mse = quality.mean_squared_error(draw(checkpoint, plan, trajectory, start), reference)
        psnr = quality.psnr_db(mse, trajectory.samples.peak)
        return float(psnr.mean()), float(quality.sqnr_db(mse, reference).mean())

    (eight_db, eight_sqnr_db), (found_db, found_sqnr_db) = decibels(eight), decibels(mixed)
    rng = np.random.default_rng(0)
    chance = [
        decibels(random_plan(eight, table, limit, rng))
        for _ in track(range(random_plans), "random plans", disable=as_json)
    ]
    random_db = statistics.mean(psnr_db for psnr_db, _ in chance)
    figures = {
        "w8a8_psnr_db": eight_db,
        "w8a8_sqnr_db": eight_sqnr_db,
        "bytes_of_w8a8": limit / eight.size_bytes,
        "mixed_psnr_db": found_db,
        "mixed_sqnr_db": found_sqnr_db,
        "random_psnr_db_mean": random_db,
        "random_sqnr_db_mean": statistics.mean(sqnr_db for _, sqnr_db in chance),
        "random_psnr_db_best": max(psnr_db for psnr_db, _ in chance),
        "gain_db": found_db - random_db,
    }
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value:8.3f}" for name, value in figures.items()))


def share_of_fp16(plan: QuantPlan) -> float:
    """Bytes of the plan relative to fp16."""
    return plan.size_bytes / sum(layer.size_bytes(FLOAT) for layer in plan.layers)


def random_plan(eight: QuantPlan, table: Sensitivity, limit_bytes: int, rng: np.random.Generator) -> QuantPlan:
    """Layers at 4 bits in random order."""
    four = {n.name: table.schemes[n.name]["w4a16"] for n in eight.layers if "w4a16" in table.schemes[n.name]}
    names = list(four)
    return narrowed(eight, {names[i]: four[names[i]] for i in rng.permutation(len(names))}, limit_bytes)


def narrowed(wide: QuantPlan, narrow: Mapping[str, LayerScheme], limit_bytes: int) -> QuantPlan:
    """Layers get the schemes of `narrow` in its order until the plan fits, then their own again where that fits."""
    plan = wide
    for name, scheme in narrow.items():
        if plan.size_bytes <= limit_bytes:
            break
        plan = plan.replace({name: scheme})
    for name in narrow:
        larger = plan.replace({name: wide.schemes[name]})
        if larger.size_bytes <= limit_bytes:
            plan = larger
    return plan


def draw(checkpoint: Checkpoint, plan: QuantPlan | None, trajectory: Trajectory, start: Start) -> torch.Tensor:
    """Samples of the model rounded as the plan says, or in full precision."""
    model = checkpoint.open()
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    clock = StepClock(trajectory.timesteps)
    if plan is not None:
        quantize_model(model.module, plan.schemes, clock, trajectory.tables(plan.schemes))
    denoise = clocked(denoise_with(model.module, model), clock, sampler.names.timestep)
    return sampler.sample(denoise, start)


if __name__ == "__main__":
    typer.run(main)
