"""Say which layers lose most of a plan's quality, and what float inputs there would cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from intaglio.pipeline.formats.cost import work
from intaglio.pipeline.formats.schemes import W8A16, Float

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.artifacts.workload import Workload
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Target

ROLES = 2
"""Largest number of roles of layers that are named."""
SHARE = 0.1
"""Least share of the predicted loss for which a role is named."""


def largest_losses(table: Sensitivity, plan: QuantPlan, workload: Workload, target: Target) -> list[str]:
    """Return a clause for each role of layers with rounded inputs that makes a large part of the predicted loss.

    The role of a layer is the last part of its name that is not a number, such as `to_q`.
    """
    losses = {
        layer: table.total(layer.name, label)
        for layer in plan.layers
        if (label := table.label_of(plan, layer.name)) is not None
    }
    whole = sum(losses.values())
    roles: dict[str, list[Layer]] = {}
    for layer in losses:
        if not isinstance(plan.schemes[layer.name].input, Float):
            roles.setdefault(_role(layer.name), []).append(layer)
    share = {role: sum(losses[layer] for layer in layers) / whole for role, layers in roles.items() if whole}
    worst = sorted((role for role in share if share[role] >= SHARE), key=lambda role: -share[role])[:ROLES]
    return [
        f"{role}, in {len(roles[role])} layers, makes {share[role]:.0%} of the predicted loss"
        f" (w8a16 there would add {_more(roles[role], plan, workload, target):.0%} to the time)"
        for role in worst
    ]


def _role(name: str) -> str:
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _more(layers: list[Layer], plan: QuantPlan, workload: Workload, target: Target) -> float:
    """Return how much longer the plan takes if these layers have float inputs, relative to its time."""

    def times(of: list[Layer], scheme: LayerScheme | None = None) -> Iterator[float]:
        for layer in of:
            planned, balance = plan.schemes[layer.name], plan.balances.get(layer.name)
            one = scheme or planned
            block = None if balance is None else balance.balance.block
            in_codes = target.multiplies_codes(layer.op, one)
            yield work(layer, one, workload.rows.get(layer.name, 0.0), block, in_codes=in_codes)

    return (sum(times(layers, W8A16)) - sum(times(layers))) / sum(times(list(plan.layers)))
