"""Choose how much a first recipe computes, so that it ends in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.exporters.starter.starter import Found

MOST_OPERATIONS = 2.2e13
"""Largest number of operations of a recipe without --minutes: some minutes on two CPU cores."""
MOST_TRAINING = 2e13
"""Largest number of operations of the training in a recipe without --minutes; larger trainings are left out."""
MOST_CALLS = 640
"""Largest number of denoiser calls, with one sample, that `verify` makes with each implementation."""
MOST_VERIFIED = 6e11
"""Largest number of operations that `verify` takes for each implementation."""
SIMULATED = 1.6
"""Time of a denoiser row in a step of a recipe, relative to one in full precision, on average."""
A_LAYER_S, A_PARAMETER_S, START_S = 0.25, 1.2e-7, 20.0
"""Seconds of the steps that make no calls: for each layer, each parameter, and each recipe, for one target."""


@dataclass(frozen=True)
class Effort:
    """Amounts of a recipe: samples, rows and updates. `screened` of None is a recipe without sensitivity."""

    calibrated: int
    screened: int | None
    buckets: int
    drawn: int
    updates: int | None
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


EFFORTS = (
    Effort(16, 8, 3, 16, None, 32),
    Effort(16, 8, 3, 16, 0, 32),
    Effort(8, 4, 2, 16, 0, 8),
    Effort(8, 2, 1, 8, 0, 8),
    Effort(4, None, 0, 0, 0, 2),
)
"""Efforts from the largest to the smallest; `updates` of None stands for the default of `distill`."""


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
    *usual, _ = EFFORTS
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
    others_s = A_LAYER_S * len(found.layers) + A_PARAMETER_S * found.parameters
    return START_S + calls_s + others_s * len(found.targets)


def verified(found: Found, most: int) -> int:
    """Return how many samples `verify` draws: at most this number, fewer if its calls are many or costly."""
    if found.cost is None:
        return most
    calls = found.sampling.steps * found.cost.rows_per_sample
    fit = min(MOST_CALLS // calls, int(MOST_VERIFIED // (calls * found.cost.operations_per_row)))
    return max(min(8, most), min(most, fit))
