"""Choose how much a first recipe computes, so that it ends in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.runs.effort import SIMULATED, at_level, other_steps_s
from intaglio.pipeline.runs.registry import find_pass

if TYPE_CHECKING:
    from intaglio.exporters.starter.found import Found

STEPS = ("calibrate", "sensitivity", "assign", "distill", "verify")
"""Steps whose amounts are chosen."""
MOST_OPERATIONS = 2.4e13
"""Largest number of operations of a recipe without --minutes: some minutes on two CPU cores."""
MOST_TRAINING = 2e13
"""Largest number of operations of the training in a recipe without --minutes; larger trainings are left out."""
MOST_CALLS = 640
"""Largest number of denoiser calls, with one sample, that `verify` makes with each implementation."""
MOST_VERIFIED = 6e11
"""Largest number of operations that `verify` takes for each implementation."""


@dataclass(frozen=True)
class Effort:
    """Amounts of a recipe: samples, parts of trajectories and updates. Without `screened`, there is no sensitivity."""

    calibrated: int
    screened: int | None
    buckets: int
    drawn: int
    updates: int
    verified: int

    def more_than(self, other: Effort) -> str:
        """Return what this effort has in addition to a smaller one, in words."""
        gained = []
        if other.screened is None and self.screened is not None:
            gained.append("formats chosen layer by layer for a quality")
        elif self.drawn > other.drawn:
            gained.append("formats chosen by more samples")
        if other.updates == 0 and self.updates != 0:
            gained.append("training")
        if self.verified > other.verified:
            gained.append("more verified samples")
        return ", ".join(gained)


def _efforts() -> Iterator[Effort]:
    """Yield the efforts of the passes, the largest first; those beyond the last level of `sensitivity` leave it out."""
    tables = {name: find_pass(name, Path()).pass_class.efforts for name in STEPS}
    levels = max(map(len, tables.values()))
    for level in range(levels):
        at: dict[str, Any] = {name: at_level(table, level) for name, table in tables.items()}
        screened, updates = at["sensitivity"], at["distill"]["updates"]
        yield Effort(
            at["calibrate"]["samples"],
            None if level >= len(tables["sensitivity"]) else screened["samples"],
            screened["buckets"],
            at["assign"]["drawn"],
            updates,
            at["verify"]["samples"],
        )


EFFORTS = tuple(_efforts())
"""Efforts from the largest to the smallest."""


USUAL_MINUTES = 30.0
"""Limit in minutes without --minutes. The time is estimated from CORE_OPERATIONS; the smallest recipe may exceed it."""
CORE_OPERATIONS = 5e10
"""Operations in a second of one core of a CPU, which are assumed where no call is timed."""


def limited(found: Found, rows: Callable[[Effort], Iterator[tuple[str, int]]]) -> Found:
    """Return `found` with a limit of USUAL_MINUTES, if the usual recipe would take longer on this machine's cores.

    No call is timed for it. With a GPU, and with a limit that the user gave, it stays as it is.
    """
    import torch

    if found.cost is None or found.minutes is not None or torch.cuda.is_available():
        return found
    threads = torch.get_num_threads()
    cost = replace(found.cost, seconds_per_row=found.cost.operations_per_row / (CORE_OPERATIONS * threads))
    slow = replace(found, cost=cost, minutes=USUAL_MINUTES, assumed_threads=threads)
    return slow if seconds_of(slow, rows(choose_effort(found, rows))) > 60 * USUAL_MINUTES else found


def choose_effort(found: Found, rows: Callable[[Effort], Iterator[tuple[str, int]]]) -> Effort:
    """Return the largest effort that ends in the wanted time, or the smallest one; `rows` gives the rows of steps.

    Without a wanted time, it is the largest whose training takes at most MOST_TRAINING and whose other steps take at
    most MOST_OPERATIONS, or the smallest one that has the step `sensitivity`.
    """
    if found.cost is None:
        return EFFORTS[0]
    if found.minutes is not None:
        most_s = 60 * found.minutes
        return next((each for each in EFFORTS if seconds_of(found, rows(each)) <= most_s), EFFORTS[-1])
    usual = [each for each in EFFORTS if each.screened is not None]
    for effort in usual:
        steps = dict(rows(effort))
        training = steps.pop("distill", 0) * found.cost.operations_per_row
        others = sum(steps.values()) * found.cost.operations_per_row
        if training <= MOST_TRAINING and others <= MOST_OPERATIONS:
            return effort
    return usual[-1]


def seconds_of(found: Found, rows: Iterator[tuple[str, int]]) -> float:
    """Return the estimated seconds of a recipe on this machine; the cost of the model has to be timed."""
    assert found.cost is not None  # callers have checked this
    calls_s = SIMULATED * found.cost.seconds_per_row * sum(count for _, count in rows)
    return calls_s + other_steps_s(len(found.layers), found.parameters, len(found.targets))


def verified(found: Found, most: int) -> int:
    """Return how many samples `verify` draws: at most this number, fewer if its calls are many or costly."""
    if found.cost is None:
        return most
    calls = found.sampling.steps * found.cost.rows_per_sample
    fit = min(MOST_CALLS // calls, int(MOST_VERIFIED // (calls * found.cost.operations_per_row)))
    return max(min(8, most), min(most, fit))
