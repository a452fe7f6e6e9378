"""Choose the fastest plan that keeps a quality of the final samples, and correct its prediction by drawn samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.formats.schemes import FLOAT, Float
from intaglio.pipeline.numerics.quality import mean_squared_error, psnr_db

if TYPE_CHECKING:
    from intaglio.passes.assign.budgets import Option, Problem
    from intaglio.passes.assign.knapsack import Chosen
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.contract.artifact import State
    from intaglio.pipeline.contract.context import Context

SLACK = 0.02
"""Share of time, and of bytes, that is given for less loss."""
SLACK_BELOW = 0.1
"""The same if the wanted quality is not reached."""
ROUNDS = 3
"""Plans for which samples are drawn, at most."""
NEAR_DB = 0.5
"""Quality above the wanted one at which no faster plan is looked for."""
BATCH = 4
"""Samples that are drawn at once."""


@dataclass(frozen=True)
class Aim:
    """The wanted mean PSNR of the samples in dB, the limits of costs, and the number of samples to draw."""

    psnr_db: float
    limits: Mapping[str, float]
    drawn: int


class _Tried(NamedTuple):
    """A plan, the quality that its samples have, and its time relative to float."""

    chosen: Chosen
    psnr_db: float
    time: float


def choose(problem: Problem, table: Sensitivity, aim: Aim, state: State, ctx: Context) -> tuple[Chosen, float]:
    """Return the fastest plan with the wanted quality within the limits, and the factor on its predicted loss.

    If no plan has this quality, it is the plan with the least loss. The wanted quality is at most that of 8-bit weights
    with float inputs.
    """
    drawing = _drawing(problem, table, aim.drawn, state, ctx)
    wanted_db, slack = aim.psnr_db, SLACK
    floor = problem.first(_precision)
    samples = table.samples
    reach_db = samples.psnr_db(problem.loss(floor))
    if drawing is not None and reach_db < wanted_db + NEAR_DB + 6:
        reach_db = drawing(floor)
    if reach_db < wanted_db:
        ctx.log.info("8-bit weights with float inputs reach %.1f dB: that is wanted, not %.1f", reach_db, wanted_db)
        wanted_db, slack = reach_db, SLACK_BELOW
    factor, tried = 1.0, list[_Tried]()
    for _ in range(ROUNDS):
        most_loss = samples.mse(wanted_db) / factor
        chosen = problem.fastest(aim.limits, most_loss, slack)
        if chosen is None:
            chosen = problem.best(aim.limits)
        if any((chosen == each.chosen).all() for each in tried):
            break
        if drawing is None:
            return chosen, 1.0
        found_db = drawing(chosen)
        tried.append(_Tried(chosen, found_db, float(problem.knapsack.costs[problem.time][chosen].sum())))
        factor = samples.mse(found_db) / problem.loss(chosen)
        if 0 <= found_db - wanted_db <= NEAR_DB:
            break
    good = [each for each in tried if each.psnr_db >= wanted_db]
    best = min(good, key=lambda each: each.time) if good else max(tried, key=lambda each: each.psnr_db)
    if not good:
        ctx.log.warning(
            "no plan within the budgets has the wanted %.1f dB: samples of the best that was tried have %.1f dB",
            wanted_db,
            best.psnr_db,
        )
    return best.chosen, samples.mse(best.psnr_db) / problem.loss(best.chosen)


def _precision(option: Option) -> int:
    """Return how a scheme ranks as the one to compare with: 8-bit weights with float inputs before float and others."""
    if not isinstance(option.scheme.input, Float) or option.basis:
        return 2
    return {8: 0, FLOAT.weight_bits: 1}.get(option.scheme.weight_bits, 2)


def _drawing(
    problem: Problem, table: Sensitivity, samples: int, state: State, ctx: Context
) -> Callable[[Chosen], float] | None:
    """Return a function from a plan to the mean PSNR in dB of samples that are drawn with it; None without a model.

    All plans are drawn from the same noise. Weights are rounded to the nearest code, as they are before distillation.
    """
    if not samples or MODEL not in state or TRAJECTORY not in state:
        return None
    import torch

    from intaglio.passes.sensitivity.forms import Form
    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.model.calls import clocked, denoise_with
    from intaglio.pipeline.model.sampler import Sampler

    checkpoint, trajectory = state[MODEL], state[TRAJECTORY]
    model = checkpoint.open()
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    rounded = RoundedLayers(model.module, trajectory, table.bases)
    denoise = clocked(denoise_with(model.module, model), rounded.clock, sampler.names.timestep)
    start = sampler.start(samples, ctx.torch_rng("drawn"))
    parts = [start.part(slice(first, first + BATCH)) for first in range(0, samples, BATCH)]
    references: list[torch.Tensor] = []

    def draw(chosen: Chosen) -> float:
        found = list[float]()
        with contextlib.ExitStack() as stack:
            for option in (problem.options[i] for i in chosen):
                if option.scheme != FLOAT:
                    stack.enter_context(rounded.alone(option.layer.name, Form(option.scheme, option.basis)))
            with ctx.progress("samples of the plan", len(parts)) as advance:
                for part, reference in zip(parts, references, strict=True):
                    error = mean_squared_error(sampler.sample(denoise, part), reference)
                    found += psnr_db(error, table.samples.peak).tolist()
                    advance()
        return sum(found) / len(found)

    references += [sampler.sample(denoise, part) for part in parts]
    return draw
