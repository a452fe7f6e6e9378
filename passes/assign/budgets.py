"""State the choice of schemes as a knapsack: costs of options relative to float, and advice if none fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intaglio.passes.assign.knapsack import Chosen, Knapsack
from intaglio.pipeline.artifacts.front import Point
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.cost import activation_bytes
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme

UNITS = {"size": "bytes", "latency": "µs", "bops": "bit operations"}
"""Unit of each budget's costs."""


@dataclass(frozen=True)
class Option:
    """Scheme that a layer can have. `measured` is the name under which its error is known."""

    layer: Layer
    measured: str
    scheme: LayerScheme


@dataclass(frozen=True)
class Problem:
    """Options in the order of layers; `whole` is the cost of all layers in float, by budget, in its UNITS."""

    options: Sequence[Option]
    knapsack: Knapsack
    whole: Mapping[str, float]

    def best(self, limits: Mapping[str, float]) -> Chosen:
        """Return the plan with the least loss within the limits. Raises RecipeError, with the nearest, if none fits."""
        chosen = self.knapsack.best(limits)
        if chosen is None:
            raise RecipeError(*self._why_not(limits))
        return chosen

    def front(self, limits: Mapping[str, float], count: int) -> list[Chosen]:
        """Return plans for evenly spaced sizes, from the smallest to that of the least loss, if they gain something."""
        if not count:
            return []
        loss, size = self.knapsack.loss, self.knapsack.costs["size"]
        largest, smallest = self.best(limits), self.knapsack.cheapest("size", limits)
        assert smallest is not None  # `largest` is within the limits
        found: list[Chosen] = []
        for limit in np.linspace(size[smallest].sum(), size[largest].sum(), count)[:-1]:
            one = self.knapsack.best({**limits, "size": float(limit)})
            found.append(smallest if one is None else one)
        front: list[Chosen] = []
        for one in sorted([*found, largest], key=lambda plan: (size[plan].sum(), loss[plan].sum())):
            if not front or loss[one].sum() < loss[front[-1]].sum():
                front.append(one)
        return front

    def point(self, chosen: Chosen) -> Point:
        """Return the costs and the loss of a plan."""
        picked = [self.options[i] for i in chosen]
        return Point(
            {name: float(cost[chosen].sum()) for name, cost in self.knapsack.costs.items()},
            float(self.knapsack.loss[chosen].sum()),
            {option.layer.name: option.scheme.name for option in picked},
        )

    def schemes(self, chosen: Chosen) -> dict[str, LayerScheme]:
        """Return the chosen schemes by layer name."""
        return {self.options[i].layer.name: self.options[i].scheme for i in chosen}

    def _why_not(self, limits: Mapping[str, float]) -> Iterator[str]:
        """Yield a line for each budget that cannot be met, or one for all that cannot be met together."""
        least = {}
        for name in limits:
            cheapest = self.knapsack.cheapest(name, {})
            assert cheapest is not None  # every layer has an option
            least[name] = float(self.knapsack.costs[name][cheapest].sum())
        alone = [name for name, limit in limits.items() if least[name] > limit]
        for name in alone:
            wanted, smallest = (self._in_units(name, share) for share in (limits[name], least[name]))
            yield (
                f"assign.budget.{name}: {limits[name]:g} of float is {wanted}, but the least of all legal plans is"
                f" {smallest}: allow at least {_up(least[name]):g}, or schemes with fewer bits"
            )
        if len(limits) > 1:
            nearest = self.knapsack.nearest(limits)
            costs = {name: float(self.knapsack.costs[name][nearest].sum()) for name in limits}
            factor = _up(max(costs[name] / limit for name, limit in limits.items()))
            each = ", ".join(f"{name} {limit:g} (at least {_up(least[name]):g})" for name, limit in limits.items())
            relaxed = " and ".join(f"{name} {_up(limit * factor):g}" for name, limit in limits.items())
            cause = "" if alone else f"{each} can be met one by one, but not together: "
            yield f"assign.budget: {cause}all of them times {factor:g} can, the least such factor: {relaxed}"

    def _in_units(self, name: str, share: float) -> str:
        amount = share * self.whole[name]
        return f"{f'{amount:,.0f}' if amount >= 1000 else f'{amount:.3g}'} {UNITS[name]}"


def _up(share: float) -> float:
    """Round up to three decimals, ignoring errors of float64."""
    return math.ceil(share * 1000 - 1e-6) / 1000


def within_activation(options: Sequence[Option], rows: Mapping[str, float], limit: float) -> list[Option]:
    """Return options whose layer reads and writes at most `limit` of the largest in float; `rows` by layer name.

    Raises RecipeError for layers that are left without an option.
    """
    most = max(activation_bytes(option.layer, FLOAT, rows[option.layer.name]) for option in options)
    share = [activation_bytes(o.layer, o.scheme, rows[o.layer.name]) / most for o in options]
    least: dict[str, float] = {}
    for option, cost in zip(options, share, strict=True):
        least[option.layer.name] = min(cost, least.get(option.layer.name, cost))
    if above := [name for name, cost in least.items() if cost > limit]:
        raise RecipeError(
            f"assign.budget.activation: {limit:g} of {most:,.0f} bytes a sample is {limit * most:,.0f}, but"
            f" {', '.join(above)} take more in every legal scheme: allow at least {_up(max(least.values())):g}, or"
            " schemes that round inputs, and outputs of convolutions"
        )
    return [option for option, cost in zip(options, share, strict=True) if cost <= limit]


def build_problem(
    options: Sequence[Option],
    loss: Sequence[float],
    costs: Mapping[str, Sequence[float]],
    whole: Mapping[str, float],
    same_input: Sequence[Sequence[str]],
    gap: float,
) -> Problem:
    """Build the knapsack. `loss` and `costs` are of each option, in the unit of `whole`.

    Layers of a set in `same_input` get one input format. Raises RecipeError if they have none in common.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(option.layer.name for option in options))}
    knapsack = Knapsack(
        np.array([place[option.layer.name] for option in options]),
        np.array(loss, float),
        {name: np.array(cost, float) / whole[name] for name, cost in costs.items()},
        tuple(_alike(options, same_input)),
        gap,
    )
    return Problem(options, knapsack, whole)


def _alike(
    options: Sequence[Option], same_input: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield, for neighbours in each set and every input format, the options of both that have the format."""
    by_layer: dict[str, dict[object, list[int]]] = {}
    for i, option in enumerate(options):
        by_layer.setdefault(option.layer.name, {}).setdefault(option.scheme.input, []).append(i)
    problems = []
    for names in same_input:
        formats = [by_layer[name] for name in names]
        if not set.intersection(*map(set, formats)):
            each = (
                f"{n} ({', '.join(options[i].scheme.name for s in by_layer[n].values() for i in s)})" for n in names
            )
            problems.append(
                f"assign.same_input: {', '.join(each)} read one tensor and have no format of it in common: name more"
                " schemes, or keep all of them in float"
            )
        for some, others in itertools.pairwise(formats):
            yield from ((some.get(form, []), others.get(form, [])) for form in dict.fromkeys([*some, *others]))
    if problems:
        raise RecipeError(*problems)
