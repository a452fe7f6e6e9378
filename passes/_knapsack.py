"""One option for each layer, the least loss within all budgets: a multiple-choice knapsack of several dimensions.

Shapes: O options of all L layers, those of a layer side by side.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, hstack, vstack

from intaglio.pipeline.errors import StepFailed

Floats = NDArray[np.float64]
Chosen = NDArray[np.intp]
"""The option of each layer, in the order of layers (L)."""
Integral = NDArray[np.int_]
"""1 for what is chosen or not, 0 for what may be in between (O)."""

UNIT = 1000.0
"""What budgets and the least loss are for HiGHS, whose tolerances are absolute, 1e-6: so they are met to 1e-9."""
INFEASIBLE = 2
"""Status of `milp`."""


@dataclass(frozen=True)
class Knapsack:
    """`layer` says whose each option is (O). A limit is for the sum of the chosen options' costs of the same name.

    Of every two sets of options in `equal`, one is chosen from as often as from the other. `gap` is how far from the
    optimum the loss may be, relative to it.
    """

    layer: NDArray[np.intp]
    loss: Floats
    costs: Mapping[str, Floats]
    equal: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    gap: float = 1e-4

    def best(self, limits: Mapping[str, float]) -> Chosen | None:
        """The least loss within the limits; None where nothing is within them."""
        return self._least(self.loss, limits)

    def cheapest(self, cost: str, limits: Mapping[str, float]) -> Chosen | None:
        """The least of this cost within the limits."""
        return self._least(self.costs[cost], limits)

    def nearest(self, limits: Mapping[str, float]) -> Chosen:
        """What is over none of the limits times t, for the smallest t."""
        options = len(self.loss)
        over = csr_array(np.full((len(limits), 1), -UNIT))
        within = LinearConstraint(hstack([self._used(limits), over]), -np.inf, 0)
        bounds = Bounds(0, np.append(np.ones(options), np.inf))
        t = np.append(np.zeros(options), UNIT)
        chosen = self._chosen(self._solve(t, [within], np.append(np.ones(options, int), 0), bounds))
        assert chosen is not None  # any choice is within limits that are far enough away
        return chosen

    def bound(self, limits: Mapping[str, float]) -> float | None:
        """No choice within the limits loses less: the optimum where options may be mixed. None: nothing is within."""
        unit = self._unit(self.loss, limits)
        return None if unit is None else unit * float(self._mixed(self.loss / unit, limits).fun)

    def _least(self, amount: Floats, limits: Mapping[str, float]) -> Chosen | None:
        unit = self._unit(amount, limits)
        if unit is None:
            return None
        return self._chosen(self._solve(amount / unit, self._within(limits), np.ones(len(amount), int)))

    def _unit(self, amount: Floats, limits: Mapping[str, float]) -> float | None:
        """A thousandth of about the least that is possible, where options may be mixed; None: nothing is possible."""
        unit = max(float(amount.max()), 1e-30) / UNIT
        mixed = self._mixed(amount / unit, limits)
        if mixed.status == INFEASIBLE:
            return None
        least = float(mixed.fun) / UNIT
        return unit * least if least > 1e-9 else unit  # below that is rounding: nothing is lost

    def _mixed(self, amount: Floats, limits: Mapping[str, float]) -> OptimizeResult:
        return self._solve(amount, self._within(limits), np.zeros(len(amount), int))

    def _solve(
        self, amount: Floats, within: list[LinearConstraint], integral: Integral, bounds: Bounds | None = None
    ) -> OptimizeResult:
        """The least amount. It may have one more variable than there are options."""
        more = csr_array((self._structure.shape[0], len(amount) - len(self.loss)))
        structure = LinearConstraint(hstack([self._structure, more]), self._often, self._often)
        with _stdout_to_stderr():
            return milp(
                amount,
                integrality=integral,
                bounds=bounds or Bounds(0, 1),
                constraints=[structure, *within],
                options={"mip_rel_gap": self.gap},
            )

    def _within(self, limits: Mapping[str, float]) -> list[LinearConstraint]:
        return [LinearConstraint(self._used(limits), -np.inf, UNIT)] if limits else []

    def _used(self, limits: Mapping[str, float]) -> csr_array:
        return csr_array(np.stack([self.costs[name] / limit * UNIT for name, limit in limits.items()]))

    @cached_property
    def _structure(self) -> csr_array:
        """Rows that say what is chosen how often: one option of each layer, sets of `equal` as often as each other."""
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

    def _chosen(self, result: OptimizeResult) -> Chosen | None:
        if result.x is None:
            if result.status == INFEASIBLE:
                return None
            raise StepFailed(f"no plan found: {result.message}")
        return np.flatnonzero(result.x[: len(self.loss)] > 0.5)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints lines for its developers now and then, where a command's results go."""
    if sys.platform == "win32":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
