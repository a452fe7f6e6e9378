"""Formulate the choice of schemes as a knapsack: costs of options relative to float, and advice if none fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import numpy as np

from intaglio.passes.assign.knapsack import Chosen, Knapsack
from intaglio.pipeline.artifacts.front import Point
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.cost import activation_bytes
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme

if TYPE_CHECKING:
    from intaglio.pipeline.numerics.basis import LayerBalance

K = TypeVar("K")
UNITS = {"size": "bytes", "latency": "µs", "bops": "bit operations", "work": "multiplications"}
"""Unit of each budget's costs."""


@dataclass(frozen=True)
class Option:
    """One option of a layer: a scheme, and the name of the basis in which the input is rounded.

    `measured` is the label under which its error is known.
    """

    layer: Layer
    measured: str
    scheme: LayerScheme
    balance: LayerBalance | None = None
    basis: str = ""

    @property
    def block(self) -> int | None:
        """Channels that are rotated together in the basis; None if the input is rounded as it is."""
        return None if self.balance is None else self.balance.balance.block


class Alike(NamedTuple):
    """Sets of layers that take the same input format, and sets that take the same basis."""

    input: Sequence[Sequence[str]] = ()
    basis: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Problem:
    """Options in the order of layers; `whole` is the cost of all layers in float, by budget, in its UNITS."""

    options: Sequence[Option]
    knapsack: Knapsack
    whole: Mapping[str, float]

    def best(self, limits: Mapping[str, float]) -> Chosen:
        """Return the plan with the least loss within the limits.

        Raises RecipeError if no plan fits; the message has the smallest limits that work.
        """
        chosen = self.knapsack.best(limits)
        if chosen is None:
            raise RecipeError(*self._why_not(limits))
        return chosen

    @property
    def time(self) -> str:
        """Name of the cost that stands for time: the latency where it is known, else the work."""
        return "latency" if "latency" in self.knapsack.costs else "work"

    def loss(self, chosen: Chosen) -> float:
        """Return the summed loss of a plan, above zero."""
        return max(float(self.knapsack.loss[chosen].sum()), 1e-30)

    def first(self, rank: Callable[[Option], int]) -> Chosen:
        """Take each layer's option with the lowest rank, the first one if several have it, and return this plan."""
        places = _places(self.options, rank)
        return np.array([by[min(by)][0] for by in places.values()], np.intp)

    def least(self, wanted: Callable[[Option], bool]) -> Chosen:
        """Return the plan with the least loss that uses only wanted options.

        A layer without a wanted option may use its others.
        """
        has = {option.layer.name for option in self.options if wanted(option)}
        refused = np.array([option.layer.name in has and not wanted(option) for option in self.options])
        most = float(self.knapsack.loss.sum()) + 1.0
        chosen = replace(self.knapsack, loss=np.where(refused, most, self.knapsack.loss)).best({})
        assert chosen is not None  # there are no limits
        return chosen

    def fastest(self, limits: Mapping[str, float], most_loss: float, slower: float, slack: float) -> Chosen | None:
        """Return a fast and small plan within the limits whose loss is at most `most_loss`; None if there is none.

        First the shortest time is found, then the least size of all plans that exceed it by at most the share `slower`.
        Among the plans that exceed this size by at most the share `slack` as well, the one with the least loss is
        returned.
        """
        knapsack, time = self.knapsack, self.time
        lossy = replace(knapsack.with_cost("loss", knapsack.loss), gap=max(knapsack.gap, slack / 4))
        within = {**limits, "loss": most_loss}
        chosen: Chosen | None = None
        for cost, share in ((time, slower), ("size", slack)):
            chosen = lossy.cheapest(cost, within)
            if chosen is None:
                return None
            least = float(lossy.costs[cost][chosen].sum()) * (1 + share)
            within[cost] = min(within.get(cost, math.inf), least)
        return lossy.best(within)

    def front(self, limits: Mapping[str, float], count: int) -> list[Chosen]:
        """Return plans for evenly spaced sizes, up to that of the least loss.

        Leave out a plan that has no less loss than a smaller one.
        """
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

    def point(self, chosen: Chosen, factor: float = 1.0) -> Point:
        """Return a plan's costs and loss; `factor` is the error of drawn samples divided by the predicted loss."""
        picked = [self.options[i] for i in chosen]
        return Point(
            {name: float(cost[chosen].sum()) for name, cost in self.knapsack.costs.items()},
            factor * float(self.knapsack.loss[chosen].sum()),
            {option.layer.name: option.scheme.name for option in picked},
        )

    def schemes(self, chosen: Chosen) -> dict[str, LayerScheme]:
        """Return the chosen schemes by layer name."""
        return {self.options[i].layer.name: self.options[i].scheme for i in chosen}

    def balances(self, chosen: Chosen) -> dict[str, LayerBalance]:
        """Return the bases of the chosen options by layer name; a layer in float has none."""
        picked = [self.options[i] for i in chosen]
        return {o.layer.name: o.balance for o in picked if o.balance is not None and o.scheme != FLOAT}

    def _why_not(self, limits: Mapping[str, float]) -> Iterator[str]:
        """Yield a line for each budget that no plan meets.

        With several budgets, also yield a line with the smallest common factor on them that works.
        """
        least = {}
        for name in limits:
            cheapest = self.knapsack.cheapest(name, {})
            assert cheapest is not None  # every layer has an option
            least[name] = float(self.knapsack.costs[name][cheapest].sum())
        alone = [name for name, limit in limits.items() if least[name] > limit]
        for name in alone:
            wanted, smallest = (self._in_units(name, share) for share in (limits[name], least[name]))
            yield (
                f"assign.budget.{name}: {limits[name]:g} of float is {wanted}, but every legal plan needs {smallest} or"
                f" more: set at least {_up(least[name]):g}, or allow schemes with fewer bits"
            )
        if len(limits) > 1:
            nearest = self.knapsack.nearest(limits)
            costs = {name: float(self.knapsack.costs[name][nearest].sum()) for name in limits}
            factor = _up(max(costs[name] / limit for name, limit in limits.items()))
            each = ", ".join(f"{name} {limit:g} (at least {_up(least[name]):g})" for name, limit in limits.items())
            relaxed = " and ".join(f"{name} {_up(limit * factor):g}" for name, limit in limits.items())
            cause = "" if alone else f"{each} can be met one by one, but not together: "
            yield f"assign.budget: {cause}multiply all limits by {factor:g}, the smallest factor that works: {relaxed}"

    def _in_units(self, name: str, share: float) -> str:
        amount = share * self.whole[name]
        return f"{f'{amount:,.0f}' if amount >= 1000 else f'{amount:.3g}'} {UNITS[name]}"


def _up(share: float) -> float:
    """Round up to three decimals, ignoring errors of float64."""
    return math.ceil(share * 1000 - 1e-6) / 1000


def within_activation(options: Sequence[Option], rows: Mapping[str, float], limit: float) -> list[Option]:
    """Return the options with which a layer moves at most `limit` times the bytes of the largest layer in float.

    These are the bytes that the layer reads and writes; `rows` has the rows of each layer by name. Raises RecipeError
    for layers that are left without an option.
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
    alike: Alike,
    gap: float,
) -> Problem:
    """Build the knapsack.

    `loss` and `costs` have one number for each option; each cost has the unit of its entry in `whole`.
    Raises RecipeError if layers that take the same input format have none in common.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(option.layer.name for option in options))}
    knapsack = Knapsack(
        np.array([place[option.layer.name] for option in options]),
        np.array(loss, float),
        {name: np.array(cost, float) / whole[name] for name, cost in costs.items()},
        (*_same_input(options, alike.input), *_same_basis(options, alike.basis)),
        gap,
    )
    return Problem(options, knapsack, whole)


Equal: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Two sets of options; a plan takes the same number from both."""


def _same_input(options: Sequence[Option], groups: Sequence[Sequence[str]]) -> Iterator[Equal]:
    """Yield, for neighbours in each group and every input format, the options of both that have the format."""
    by_layer = _places(options, lambda option: option.scheme.input)
    problems = []
    for names in groups:
        formats = [by_layer[name] for name in names]
        if not set.intersection(*map(set, formats)):
            each = (
                f"{n} ({', '.join(options[i].scheme.name for s in by_layer[n].values() for i in s)})" for n in names
            )
            problems.append(
                f"assign.same_input: {', '.join(each)} read the same tensor, but no input format is possible for all"
                " of them: name more schemes, or keep all of these layers in float"
            )
        yield from _neighbours(formats)
    if problems:
        raise RecipeError(*problems)


def _same_basis(options: Sequence[Option], groups: Sequence[Sequence[str]]) -> Iterator[Equal]:
    """Yield, for neighbours in each group and every basis, the options of both that have the basis.

    A layer that can only stay in float takes any basis.
    """
    by_layer = _places(options, lambda option: option.basis)
    quantizable = {option.layer.name for option in options if option.scheme != FLOAT}
    for names in groups:
        yield from _neighbours([by_layer[name] for name in names if name in quantizable])


def _places(options: Sequence[Option], key: Callable[[Option], K]) -> dict[str, dict[K, list[int]]]:
    """Return the places of options by layer name and key."""
    found: dict[str, dict[K, list[int]]] = {}
    for i, option in enumerate(options):
        found.setdefault(option.layer.name, {}).setdefault(key(option), []).append(i)
    return found


def _neighbours(places: Sequence[Mapping[K, list[int]]]) -> Iterator[Equal]:
    """Yield, for neighbours and every key of either, the places of both with the key."""
    for some, others in itertools.pairwise(places):
        yield from ((some.get(key, []), others.get(key, [])) for key in dict.fromkeys([*some, *others]))
