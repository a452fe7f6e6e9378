"""Choose the fastest plan that keeps a quality of the final samples, and correct its prediction by drawn samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.formats.schemes import FLOAT, Float
from intaglio.pipeline.numerics.quality import mean_squared_error, psnr_db, standard_error

if TYPE_CHECKING:
    import torch

    from intaglio.passes.assign.budgets import Option, Problem
    from intaglio.passes.assign.knapsack import Chosen
    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.contract.artifact import State
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.call_rows import Start
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise

SLOWER = 0.05
"""A plan may take this share more time if it has fewer bytes: the sum of the layers' times is no more exact."""
SLACK = 0.02
"""A plan may have this share more bytes if its loss is smaller; of drawn plans, also this share more time."""
ROUNDS = 4
"""Largest number of plans with rounded inputs for which samples are drawn."""
ALONE = 6
"""Largest number of layers that are rounded alone if a plan is worse than predicted by more than NOISE_DB."""
NOISE_DB = 0.5
SHORT_DB = 0.25
"""A plan that is at most this much worse than wanted is accepted: the PSNR of other samples differs by more."""
NEAR_DB = 1.5
"""A plan that is at most this much better than wanted is accepted; if it is better, a faster one is searched."""
MORE_DB = 6.0
MORE_BYTES = 1 / 8
"""A plan with MORE_DB more quality may have this share more bytes, and the share SLACK more time.

6 dB halve the error of the samples, as one bit more in each of eight does."""
REST_DB = 3.0
"""Allowance for rounded inputs in dB.

If they add as much squared error as the weights, the PSNR falls by 3 dB."""
SURE_DB = 0.75
"""Standard error of the drawn samples' PSNR, in dB, above which as many samples are drawn again.

They are drawn with the chosen plan alone: a prediction has to hold for samples other than those that chose the plan."""
FEWER = 1
"""Number of parts (batches) of the samples that are drawn when one layer is rounded alone."""


@dataclass(frozen=True)
class Aim:
    """The wanted mean PSNR of the samples in dB, the limits of costs, and the number of samples to draw."""

    psnr_db: float
    limits: Mapping[str, float]
    drawn: int


def reachable_db(plain_db: float, best_db: float) -> float:
    """Return the highest PSNR in dB that can be asked for, judged by two plans with 8-bit weights and float inputs.

    `plain_db`, `best_db`: the PSNR of the samples with 8-bit weights and float inputs, without a change of basis and in
    the best bases. The result is `best_db` - REST_DB, but at least `plain_db`.
    """
    return max(plain_db, best_db - REST_DB)


class Choice(NamedTuple):
    """A plan, the problem with losses as drawn samples corrected them, and the factor on the plan's loss.

    `error_db` is the standard error of the PSNR of its samples in dB; None where fewer than two were drawn.
    """

    chosen: Chosen
    problem: Problem
    factor: float
    error_db: float | None


def drawn_samples(count: int) -> int:
    """Return the number of samples that `choose` draws at most, if it draws `count` with each plan."""
    from intaglio.pipeline.simulation.references import PART

    references, float_inputs, finer, further = 2, 2, 1, 1
    alone = ALONE * min(count, FEWER * PART)
    return (references + float_inputs + ROUNDS + finer + further) * count + (ROUNDS - 1) * alone


class _Tried(NamedTuple):
    """A plan, its time relative to float, the mean PSNR of its samples, and that of each drawn sample, (B,), in dB."""

    chosen: Chosen
    time: float
    psnr_db: float
    psnr_B: torch.Tensor | None

    @property
    def error_db(self) -> float | None:
        """Standard error of the mean PSNR; None if fewer than two samples were drawn."""
        return None if self.psnr_B is None else standard_error(self.psnr_B)

    def factor(self, problem: Problem, table: Sensitivity) -> float:
        """Return the error of the samples relative to the loss that the problem predicts."""
        return table.samples.mse(self.psnr_db) / problem.loss(self.chosen)


def choose(problem: Problem, table: Sensitivity, aim: Aim, state: State, ctx: Context) -> Choice:
    """Return the fastest plan with the wanted quality within the limits.

    Samples are drawn with each plan. Others differ from them, so the plan has to be better than asked by the standard
    error of their PSNR. If no tried plan is, return the tried plan with the highest PSNR. If the samples are worse than
    predicted, samples are also drawn with single layers rounded, those of largest predicted loss, and the losses of
    these layers are corrected. The ratio of measured to predicted error that remains is a factor on
    the next prediction. The search ends with a plan that is about as good as wanted, or that is better and no faster
    than an earlier one. A plan that is better by MORE_DB replaces it if it costs little more, see `_finer`.
    """
    drawing = _Drawing.of(table, aim.drawn, state, ctx)
    wanted = _wanted(problem, table, aim, drawing, ctx)
    factor = wanted.factor
    found: list[_Tried] = []
    for left in reversed(range(ROUNDS)):
        chosen = problem.fastest(aim.limits, table.samples.mse(wanted.psnr_db) / factor, SLOWER, SLACK)
        if chosen is None:
            chosen = problem.best(aim.limits)
        if any((chosen == each.chosen).all() for each in found):
            break
        earlier = min((each.time for each in wanted.kept_by(found)), default=math.inf)
        found.append(_tried(problem, table, chosen, drawing, ctx))
        missing_db = wanted.psnr_db - found[-1].psnr_db
        no_faster = missing_db <= SHORT_DB and found[-1].time > earlier * (1 - SLACK)
        if drawing is None or -NEAR_DB <= missing_db <= SHORT_DB or no_faster or not left:
            break
        factor = found[-1].factor(problem, table)
        if factor > 10 ** (NOISE_DB / 10):
            problem = drawing.corrected(problem, chosen)
            factor = max(1.0, found[-1].factor(problem, table))
    good = wanted.kept_by(found)
    quick = [each for each in good if each.time <= min(one.time for one in good) * (1 + SLACK)]
    best = max(quick or found, key=lambda each: each.psnr_db)
    if best.psnr_db >= wanted.asked_db - SHORT_DB:
        aim = replace(aim, psnr_db=wanted.psnr_db + MORE_DB)
        best = _finer(best, aim, problem, table, drawing, ctx)
    best = _surer(best, problem, drawing, ctx)
    if best.psnr_db < wanted.asked_db - SHORT_DB:
        asked = "no plan that was tried within the budgets has %.1f dB: the best has %.1f dB"
        ctx.log.warning(asked, wanted.asked_db, best.psnr_db)
    return Choice(best.chosen, problem, best.factor(problem, table), best.error_db)


def _finer(
    best: _Tried, aim: Aim, problem: Problem, table: Sensitivity, drawing: _Drawing | None, ctx: Context
) -> _Tried:
    """Return a plan with about the quality of `aim` that costs little more time and bytes than `best`; else `best`."""
    if best.psnr_db >= aim.psnr_db - NEAR_DB:
        return best
    within = dict(aim.limits)
    for name, more in ((problem.time, SLACK), ("size", MORE_BYTES)):
        most = float(problem.knapsack.costs[name][best.chosen].sum()) * (1 + more)
        within[name] = min(most, aim.limits.get(name, math.inf))
    chosen = problem.fastest(within, table.samples.mse(aim.psnr_db) / best.factor(problem, table), SLOWER, SLACK)
    if chosen is None:
        return best
    finer = _tried(problem, table, chosen, drawing, ctx)
    return finer if finer.psnr_db >= aim.psnr_db - NEAR_DB else best


def _tried(problem: Problem, table: Sensitivity, chosen: Chosen, drawing: _Drawing | None, ctx: Context) -> _Tried:
    """Draw samples with a plan, and return their quality; without a model, return the predicted quality."""
    time = float(problem.knapsack.costs[problem.time][chosen].sum())
    tried = _Tried(chosen, time, table.samples.psnr_db(problem.loss(chosen)), None)
    ctx.log.info("tried a plan: predicted %.1f dB from single layers", tried.psnr_db)
    return tried if drawing is None else _drawn(tried, drawing.psnr_db([problem.options[i] for i in chosen]), ctx)


def _drawn(tried: _Tried, psnr_B: torch.Tensor, ctx: Context) -> _Tried:
    """Return the plan with the PSNR of its drawn samples, which replaces the predicted one."""
    drawn = tried._replace(psnr_db=float(psnr_B.mean()), psnr_B=psnr_B)
    error = "" if drawn.error_db is None else f" +- {drawn.error_db:.1f}"
    ctx.log.info("its %d drawn samples have %.1f dB%s", len(psnr_B), drawn.psnr_db, error)
    return drawn


def _surer(tried: _Tried, problem: Problem, drawing: _Drawing | None, ctx: Context) -> _Tried:
    """Draw as many further samples if the plan's PSNR is not known to SURE_DB, and return its quality over all."""
    if drawing is None or tried.psnr_B is None or (tried.error_db or 0.0) <= SURE_DB:
        return tried
    import torch

    psnr_B = drawing.of_starts("prediction", len(tried.psnr_B)).psnr_db([problem.options[i] for i in tried.chosen])
    return _drawn(tried, torch.cat([tried.psnr_B, psnr_B]), ctx)


class _Wanted(NamedTuple):
    """The quality that was asked for and the one to look for, both in dB, and the first factor on predicted losses."""

    asked_db: float
    psnr_db: float
    factor: float

    @classmethod
    def above(cls, asked_db: float, drawn: _Tried, problem: Problem, table: Sensitivity) -> _Wanted:
        """Look for a plan that is better than asked by the standard error of the drawn samples' PSNR."""
        return cls(asked_db, asked_db + (drawn.error_db or 0.0), max(1.0, drawn.factor(problem, table)))

    def kept_by(self, tried: Sequence[_Tried]) -> list[_Tried]:
        """Return the plans that have the quality to look for."""
        return [each for each in tried if each.psnr_db >= self.psnr_db - SHORT_DB]


def _wanted(problem: Problem, table: Sensitivity, aim: Aim, drawing: _Drawing | None, ctx: Context) -> _Wanted:
    """Return the quality to look for: the asked one, or a lower one that 8-bit weights with float inputs reach.

    `reachable_db` computes the lower one.
    """
    plain = _tried(problem, table, problem.first(_precision), drawing, ctx)
    if plain.psnr_db >= aim.psnr_db + REST_DB:
        return _Wanted.above(aim.psnr_db, plain, problem, table)
    best = _tried(problem, table, problem.least(lambda option: _precision(option) == 0), drawing, ctx)
    reach_db = reachable_db(plain.psnr_db, best.psnr_db)
    if reach_db < aim.psnr_db:
        ctx.log.info(
            "8-bit weights with float inputs reach %.1f dB, and rounded inputs may cost %.0f dB: assign looks for"
            " %.1f dB in place of %.1f dB",
            max(plain.psnr_db, best.psnr_db),
            REST_DB,
            reach_db,
            aim.psnr_db,
        )
    return _Wanted.above(min(reach_db, aim.psnr_db), best, problem, table)


def _precision(option: Option) -> int:
    """Return 0 for 8-bit weights with a float input, 1 for float, 2 for any other scheme.

    Plans for comparison take the lowest.
    """
    if not isinstance(option.scheme.input, Float):
        return 2
    return {8: 0, FLOAT.weight_bits: 1}.get(option.scheme.weight_bits, 2)


@dataclass
class _Drawing:
    """Draws samples with plans, all from the same noise. Weights are rounded to the nearest code."""

    sampler: Sampler
    rounded: RoundedLayers
    denoise: Denoise
    parts: list[Start]
    references: list[torch.Tensor]
    peak: float
    ctx: Context

    @classmethod
    def of(cls, table: Sensitivity, samples: int, state: State, ctx: Context) -> _Drawing | None:
        """Draw the samples of full precision; None without a model or without samples to draw."""
        if not samples or MODEL not in state or TRAJECTORY not in state:
            return None
        from intaglio.passes.sensitivity.rounded import RoundedLayers
        from intaglio.pipeline.model.calls import clocked, denoise_with
        from intaglio.pipeline.model.sampler import Sampler
        from intaglio.pipeline.simulation.references import CHOICE

        checkpoint = state[MODEL]
        model = checkpoint.open()
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        rounded = RoundedLayers(model.module, state[TRAJECTORY], table.bases)
        denoise = clocked(denoise_with(model.module, model), rounded.clock, sampler.names.timestep)
        return cls(sampler, rounded, denoise, [], [], table.samples.peak, ctx).of_starts(CHOICE, samples)

    def of_starts(self, label: str, samples: int) -> _Drawing:
        """Draw the samples of full precision from the starts of this label, and return a drawing of these samples."""
        from intaglio.pipeline.simulation.references import draw_starts, full_precision_samples

        parts = draw_starts(self.sampler, samples, self.ctx, label)
        references = [full_precision_samples(self.sampler, self.denoise, part, self.ctx) for part in parts]
        return replace(self, parts=parts, references=references)

    def psnr_db(self, options: Sequence[Option]) -> torch.Tensor:
        """Return the PSNR in dB of each sample, (B,), that is drawn with these options."""
        return psnr_db(self._errors(options, self.parts), self.peak)

    def corrected(self, problem: Problem, chosen: Chosen) -> Problem:
        """Draw samples for the plan's layers with the largest losses, one layer at a time, and correct these losses.

        Raise a layer's loss if the drawn error is larger, and return the new problem.
        """
        loss = problem.knapsack.loss.copy()
        worst = sorted(chosen, key=lambda i: -loss[i])[:ALONE]
        with self.ctx.progress("layers alone", len(worst)) as advance:
            for i in worst:
                errors = self._errors([problem.options[i]], self.parts[:FEWER])
                loss[i] = max(float(loss[i]), float(errors.mean()))
                advance()
        return replace(problem, knapsack=replace(problem.knapsack, loss=loss))

    def _errors(self, options: Sequence[Option], parts: Sequence[Start]) -> torch.Tensor:
        """Return the mean squared error of each sample, (B,), with these layers rounded."""
        import torch

        from intaglio.passes.sensitivity.forms import Form

        with contextlib.ExitStack() as stack:
            for option in options:
                if option.scheme != FLOAT:
                    stack.enter_context(self.rounded.alone(option.layer.name, Form(option.scheme, option.basis)))
            drawn = [self.sampler.sample(self.denoise, part) for part in parts]
        return torch.cat([mean_squared_error(y, x) for y, x in zip(drawn, self.references, strict=False)])
