"""Time calls by turns, so that a machine that gets busier disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def spent(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    after_round: Callable[[], object] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each call by name. One call of each before these is not counted.

    `clock` returns the time in seconds. With `time.process_time` the time of other jobs is left out.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = clock()
            call()
            found[name].append(clock() - began)
        if after_round is not None:
            after_round()
    return {name: median(each[1:]) for name, each in found.items()}
