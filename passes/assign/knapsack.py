"""Solve a multiple-choice knapsack: one option for each layer, the least loss within all budgets.

Shapes: O options of all L layers, those of a layer side by side.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, hstack, vstack

from intaglio.pipeline.errors import StepFailed

Floats = NDArray[np.float64]
Chosen = NDArray[np.intp]
"""Chosen option of each layer, in the order of layers (L)."""

UNIT = 1000.0
"""Number to which budgets and the least loss are scaled for HiGHS.

HiGHS has absolute tolerances of 1e-6, so budgets are met to 1e-9 relative."""
CORES = (300, 1000)
"""Numbers of options, besides one for each layer, that the first two attempts use.

The last attempt uses all that can be better."""
INFEASIBLE = 2
"""Status of `milp` and `linprog` for a problem without a solution."""


class _Mixed(NamedTuple):
    """Optimum of the relaxed problem, which may mix options, and each option's reduced cost (O), both in `unit`."""

    unit: float
    least: float
    reduced: Floats


@dataclass(frozen=True)
class Knapsack:
    """Knapsack in which `layer` is each option's layer (O). A limit bounds the sum of the chosen options' costs.

    For each pair of option sets in `equal`, equally many options are chosen from both. `gap` is the largest relative
    distance of the loss from the optimum.
    """

    layer: NDArray[np.intp]
    loss: Floats
    costs: Mapping[str, Floats]
    equal: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    gap: float = 1e-4

    def with_cost(self, name: str, amount: Floats) -> Knapsack:
        """Return the knapsack with one more cost of each option (O)."""
        return replace(self, costs={**self.costs, name: amount})

    def best(self, limits: Mapping[str, float]) -> Chosen | None:
        """Return the choice with the least loss within the limits; None if there is none."""
        return self._least(self.loss, limits)

    def cheapest(self, cost: str, limits: Mapping[str, float]) -> Chosen | None:
        """Return the choice with the least cost of this name within the limits; None if there is none."""
        return self._least(self.costs[cost], limits)

    def bound(self, limits: Mapping[str, float]) -> float | None:
        """Return a lower bound of the loss within the limits, from the relaxed problem; None if there is no choice."""
        mixed = self._mixed(self.loss, limits)
        return None if mixed is None else mixed.least * mixed.unit

    def nearest(self, limits: Mapping[str, float]) -> Chosen:
        """Find the smallest t with which a choice fits into all limits multiplied by t, and return this choice."""
        options = len(self.loss)
        often = np.append(self._often, np.full(len(limits), -np.inf)), np.append(self._often, np.zeros(len(limits)))
        t = csr_array(np.append(np.zeros(len(self._often)), np.full(len(limits), -UNIT))[:, None])
        chosen = self._solve(
            np.append(np.zeros(options), UNIT),
            LinearConstraint(hstack([vstack([self._structure, self._used(limits)]), t]), *often),
            np.append(np.ones(options, int), 0),
            Bounds(0, np.append(np.ones(options), np.inf)),
        )
        assert chosen is not None  # any choice is within limits that are far enough away
        return chosen

    def _least(self, amount: Floats, limits: Mapping[str, float]) -> Chosen | None:
        """Return the choice with the least amount: solve first with the options of lowest reduced cost.

        The result shows which other options could still be better: using an option costs at least its reduced cost.
        """
        mixed = self._mixed(amount, limits)
        if mixed is None:
            return None
        rows = vstack([self._structure, self._used(limits)]).tocsc()
        often = np.append(self._often, np.full(len(limits), -np.inf)), np.append(self._often, [UNIT] * len(limits))
        ranked = np.sort(mixed.reduced)
        chosen, found = None, np.inf
        for more in (*CORES, len(amount)):
            reach = min(ranked[min(int(self.layer[-1]) + more, len(amount) - 1)], found - mixed.least)
            core = np.flatnonzero(mixed.reduced <= reach)
            within = LinearConstraint(rows[:, core], *often)
            picked = self._solve(amount[core] / mixed.unit, within, np.ones(len(core), int), Bounds(0, 1))
            if picked is not None and amount[core[picked]].sum() / mixed.unit < found:
                chosen, found = core[picked], amount[core[picked]].sum() / mixed.unit
            if chosen is not None and found - mixed.least <= max(reach, self.gap * found):
                break
        return chosen

    def _mixed(self, amount: Floats, limits: Mapping[str, float]) -> _Mixed | None:
        """Solve the relaxed problem, twice: the optimum's size sets the precision. None if there is no solution."""
        unit = max(float(amount.max()), 1e-30) / UNIT
        for _ in range(2):
            with _silenced():
                relaxed = linprog(  # type: ignore[call-overload]  # its stubs know no sparse matrices
                    amount / unit,
                    A_ub=self._used(limits),
                    b_ub=np.full(len(limits), UNIT),
                    A_eq=self._structure,
                    b_eq=self._often,
                    bounds=(0, None),
                )
            if relaxed.status == INFEASIBLE:
                return None
            found = _Mixed(unit, float(relaxed.fun), relaxed.lower.marginals)
            if found.least < 1e-9 * UNIT:  # the optimum is zero, up to rounding
                break
            unit *= found.least / UNIT
        return found

    def _solve(
        self, amount: Floats, within: LinearConstraint, integral: NDArray[np.int_], bounds: Bounds
    ) -> NDArray[np.intp] | None:
        """Return the choice with the least amount; None if nothing is within the limits."""
        with _silenced():
            result = milp(
                amount,
                integrality=integral,
                bounds=bounds,
                constraints=within,
                options={"mip_rel_gap": self.gap / 2},
            )
        if result.x is None:
            if result.status == INFEASIBLE:
                return None
            raise StepFailed(f"no plan found: {result.message}")
        return np.flatnonzero((result.x > 0.5) & (integral > 0))

    def _used(self, limits: Mapping[str, float]) -> csr_array:
        shares = [self.costs[name] / limit * UNIT for name, limit in limits.items()]
        return csr_array(np.array(shares).reshape(len(limits), len(self.loss)))

    @cached_property
    def _structure(self) -> csr_array:
        """Rows of constraints: one option of each layer, and equal counts for both sets in `equal`."""
        options = len(self.loss)
        one_each = coo_array((np.ones(options), (self.layer, np.arange(options))))
        balance = np.zeros((len(self.equal), options))
        for row, (some, others) in zip(balance, self.equal, strict=True):
            row[list(some)] += 1
            row[list(others)] -= 1
        return csr_array(vstack([one_each, csr_array(balance)]))

    @property
    def _often(self) -> Floats:
        return np.append(np.ones(int(self.layer[-1]) + 1), np.zeros(len(self.equal)))


@contextmanager
def _silenced() -> Iterator[None]:
    """Drop lines that HiGHS prints: stdout is for a command's results, and they tell a user nothing."""
    if sys.platform == "win32":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
