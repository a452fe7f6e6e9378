"""Choose how much the steps of a recipe compute, so that a run ends in time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import JsonValue

from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.runs.binding import Chain, bind
from intaglio.pipeline.runs.registry import find_pass

if TYPE_CHECKING:
    from intaglio.pipeline.contract.artifact import AnyKey
    from intaglio.pipeline.model.cost import ModelCost
    from intaglio.pipeline.runs.store import Store

SIMULATED = 1.6
"""Time of a denoiser row in a step of a recipe, relative to one in full precision, on average."""
A_LAYER_S, A_PARAMETER_S, START_S = 0.25, 1.2e-7, 20.0
"""Seconds of the steps that make no calls: per layer and per parameter for each target, and once for the recipe."""

Amounts: TypeAlias = Mapping[str, JsonValue]
"""Value of each option that was chosen or given, by `step.option`."""


@dataclass(frozen=True)
class Effort:
    """A recipe with amounts that were chosen, and its estimated time."""

    recipe: Recipe
    amounts: Amounts
    seconds: float

    @property
    def minutes(self) -> int:
        """Estimated time in whole minutes, rounded up."""
        return math.ceil(self.seconds / 60)


@dataclass(frozen=True)
class Choice:
    """The effort that was taken, the larger ones, the shortest first, and the amounts that the recipe gives."""

    minutes: float
    taken: Effort
    more: Sequence[Effort]
    given: Amounts
    repeated: bool = False
    """An earlier run with the same time made this choice."""

    def lines(self) -> Iterator[str]:
        """Yield what was chosen, what the recipe gives, and what more time would change."""
        chosen = " ".join(f"--set {name}={value}" for name, value in self.taken.amounts.items())
        amounts = f"with {chosen}" if chosen else "with the recipe's own amounts"
        yield f"estimated time on this machine: {_in_minutes(self.taken.minutes)}, {amounts}"
        if self.repeated:
            yield "an earlier run with the same --minutes chose these amounts, so its stored steps are used again"
        elif self.taken.seconds > 60 * self.minutes:
            yield f"these are the smallest amounts; they take longer than the {_in_minutes(self.minutes)} of --minutes"
        if self.given:
            given = ", ".join(f"{name}={value}" for name, value in self.given.items())
            yield f"amounts that the recipe gives are not changed: {given}"
        for effort in self.more:
            changed = [f"{n}={v}" for n, v in effort.amounts.items() if v != self.taken.amounts[n]]
            yield f"with --minutes {effort.minutes}, the run would use {', '.join(changed)}"


def _in_minutes(number: float) -> str:
    return f"{number:g} minute{'' if number == 1 else 's'}"


def choose_effort(recipe: Recipe, minutes: float, base: Path, store: Store | None = None) -> Choice:
    """Return the largest amounts with which a run of the recipe ends in this time, or the smallest ones.

    A call of the model is timed for it. Amounts are those of `Pass.efforts`; an option that the recipe gives stays. The
    store keeps the choice, and the same recipe with the same minutes gets it again, even if the machine is faster or
    slower then: so an interrupted run continues. The estimate counts steps that are in the store.
    """
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.cost import measure_cost

    bind(recipe, base=base)  # its problems first
    tables = {step.name: find_pass(step.uses, base).pass_class.efforts for step in recipe.steps}
    given: dict[str, JsonValue] = {}
    for step in recipe.steps:
        known = {option for level in tables[step.name] for option in level}
        given |= {f"{step.name}.{option}": step.options[option] for option in step.options if option in known}
    levels = range(max(1, *map(len, tables.values())))
    amounts = [_amounts(tables, given, level) for level in levels]
    checkpoint = Checkpoint.resolve(recipe.model, base)
    cost, parameters = measure_cost(checkpoint), checkpoint.parameter_count()
    efforts: list[Effort] = []
    for each in amounts:
        changed = _changed(recipe, each)
        seconds = estimated_s(bind(changed, base=base), cost, parameters)
        if not efforts or each != efforts[-1].amounts:
            efforts.append(Effort(changed, each, seconds))
    asked = json.dumps([recipe.to_yaml(), minutes, parameters])
    earlier = None if store is None else store.choice(asked)
    place = next((i for i, each in enumerate(efforts) if each.amounts == earlier), None)
    repeated = place is not None
    if place is None:
        place = next((i for i, each in enumerate(efforts) if each.seconds <= 60 * minutes), len(efforts) - 1)
        if store is not None:
            store.choose(asked, efforts[place].amounts)
    return Choice(minutes, efforts[place], efforts[:place][::-1], given, repeated)


def other_steps_s(layers: int, parameters: int, targets: int) -> float:
    """Return the estimated seconds of the steps that make no calls of the denoiser."""
    return START_S + (A_LAYER_S * layers + A_PARAMETER_S * parameters) * targets


def estimated_s(chains: Iterable[Chain], cost: ModelCost, parameters: int) -> float:
    """Return the estimated seconds of a run, with a timed `cost`. Steps that read no target run once for all."""
    from intaglio.pipeline.artifacts.keys import TARGET

    rows: dict[tuple[str, str], int] = {}
    chains = list(chains)
    for chain in chains:
        own: set[AnyKey] = {TARGET}
        for step in chain.steps:
            differs = bool(step.requires & own)
            own = own | step.provides if differs else own - step.provides
            rows[step.name, chain.target.name if differs else ""] = step.configured.forward_rows(cost) or 0
    calls_s = SIMULATED * cost.seconds_per_row * sum(rows.values())
    return calls_s + other_steps_s(cost.layers, parameters, len(chains))


def at_level(table: Sequence[Mapping[str, JsonValue]], level: int) -> Mapping[str, JsonValue]:
    """Return the amounts of a level of `Pass.efforts`; the last ones of a pass with fewer levels."""
    return table[min(level, len(table) - 1)]


def _amounts(tables: Mapping[str, Sequence[Mapping[str, JsonValue]]], given: Amounts, level: int) -> Amounts:
    """Return the amounts of a level that the recipe does not give; a step with fewer levels has its last one."""
    found = {
        f"{step}.{option}": value
        for step, table in tables.items()
        if table
        for option, value in at_level(table, level).items()
    }
    return {name: value for name, value in found.items() if name not in given}


def _changed(recipe: Recipe, amounts: Amounts) -> Recipe:
    for name, value in amounts.items():
        step, _, option = name.rpartition(".")
        recipe = recipe.with_option(step, (option,), value)
    return recipe
