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
REST_DB = 3.0
"""Quality that rounded inputs may take: half of the error comes from weights, half from inputs."""
BATCH = 4
"""Samples that are drawn at once."""


@dataclass(frozen=True)
class Aim:
    """The wanted mean PSNR of the samples in dB, the limits of costs, and the number of samples to draw."""

    psnr_db: float
    limits: Mapping[str, float]
    drawn: int


class _Tried(NamedTuple):
    """A plan, the quality of its samples, its time relative to float, and the factor on its predicted loss."""

    chosen: Chosen
    psnr_db: float
    time: float
    factor: float


def choose(problem: Problem, table: Sensitivity, aim: Aim, state: State, ctx: Context) -> tuple[Chosen, float]:
    """Return the fastest plan with the wanted quality within the limits, and the factor on its predicted loss.

    If no plan has this quality, it is the plan with the least loss. Each plan for which samples are drawn corrects the
    prediction of the next one.
    """
    draw = _drawing(problem, table, aim.drawn, state, ctx)
    samples = table.samples

    def tried(chosen: Chosen) -> _Tried:
        predicted_db = samples.psnr_db(problem.loss(chosen))
        found_db = predicted_db if draw is None else draw(chosen)
        ctx.log.info("tried a plan: single layers predict %.1f dB, samples have %.1f dB", predicted_db, found_db)
        time = float(problem.knapsack.costs[problem.time][chosen].sum())
        return _Tried(chosen, found_db, time, samples.mse(found_db) / problem.loss(chosen))

    wanted_db, factor, slack = _wanted(problem, aim, tried, ctx)
    found: list[_Tried] = []
    for _ in range(ROUNDS):
        chosen = problem.fastest(aim.limits, samples.mse(wanted_db) / factor, slack)
        if chosen is None:
            chosen = problem.best(aim.limits)
        if any((chosen == each.chosen).all() for each in found):
            break
        found.append(tried(chosen))
        factor = found[-1].factor
        if draw is None or 0 <= found[-1].psnr_db - wanted_db <= NEAR_DB:
            break
    good = [each for each in found if each.psnr_db >= wanted_db]
    best = min(good, key=lambda each: each.time) if good else max(found, key=lambda each: each.psnr_db)
    if not good:
        ctx.log.warning(
            "no plan that was tried within the budgets has %.1f dB: the best has %.1f dB", wanted_db, best.psnr_db
        )
    return best.chosen, best.factor


def _wanted(problem: Problem, aim: Aim, tried: Callable[[Chosen], _Tried], ctx: Context) -> tuple[float, float, float]:
    """Return the quality to look for in dB, the first factor on predicted losses, and the slack.

    It is at most what 8-bit weights with float inputs reach as they are, or REST_DB below what they reach in the best
    bases.
    """
    plain = tried(problem.first(_precision))
    if plain.psnr_db >= aim.psnr_db + REST_DB:
        return aim.psnr_db, plain.factor, SLACK
    best = tried(problem.least(lambda option: _precision(option) < 2))
    reach_db = max(plain.psnr_db, best.psnr_db - REST_DB)
    if reach_db >= aim.psnr_db:
        return aim.psnr_db, best.factor, SLACK
    ctx.log.info(
        "8-bit weights with float inputs reach %.1f dB: the plan keeps %.1f dB, not %.1f",
        max(plain.psnr_db, best.psnr_db),
        reach_db,
        aim.psnr_db,
    )
    return reach_db, best.factor, SLACK_BELOW


def _precision(option: Option) -> int:
    """Return the rank of a scheme to compare with: 8-bit weights with float inputs, float, and all others."""
    if not isinstance(option.scheme.input, Float):
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
