"""Find other bases of layers' inputs, in which `sensitivity` also predicts the errors of every scheme."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from intaglio.passes.balance import BalanceLayers
from intaglio.passes.basis_search import Amounts, candidates, groups_of, nearest, with_ranges
from intaglio.pipeline.formats.schemes import FLOAT, Float, RoundedWeight
from intaglio.pipeline.model.layer_types import LayerModule

if TYPE_CHECKING:
    from intaglio.passes.sensitivity.forms import BasisName
    from intaglio.passes.sensitivity.rounded import Bases
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.model.types import Denoise
    from intaglio.pipeline.numerics.basis import Balance

BALANCE = BalanceLayers()
"""Default options of the pass `balance`, whose candidates and smallest gain are used here."""
COMPARED = Amounts(steps=2, rows=2, tokens=BALANCE.tokens)
"""Amounts of the recorded calls that are used to compare candidates."""
RANGE_ROWS = 8
"""Rows of a recorded call from which ranges in a basis are taken, at every step."""


class FoundBases(NamedTuple):
    """Bases of layers by name, and the sets of layers that read the same input and so take the same basis."""

    bases: Bases
    same: tuple[tuple[str, ...], ...]


def find_bases(
    names: Collection[BasisName],
    module: nn.Module,
    schemes: Mapping[str, Mapping[str, LayerScheme]],
    denoise: Denoise,
    trajectory: Trajectory,
    ctx: Context,
) -> FoundBases:
    """Find the best basis of each name for every input, if it gains at least `gain_db` of `balance`.

    Layers are compared in their first scheme that rounds the input. `scaled` scales each channel (SmoothQuant, Xiao et
    al. 2023, Eq. 3), `rotated` rotates blocks of channels as well (QuaRot, Ashkboos et al. 2024, section 3).
    """
    compared = {name: first for name, by in schemes.items() if (first := _first(by)) is not None}
    layers = {n: m for n in compared if isinstance(m := module.get_submodule(n), LayerModule)}
    if not names or not layers:
        return FoundBases({}, ())
    groups = groups_of(layers, denoise, trajectory, COMPARED, ctx)
    chosen: dict[str, dict[str, tuple[Balance, float]]] = {name: {} for name in names}
    with ctx.progress("bases", len(groups)) as advance:
        for group in groups:
            parts = {name: (layers[name], compared[name]) for name in group.names}
            block = BALANCE.block if "rotated" in names else 1
            every = list(candidates(parts, group.x, BALANCE.exponents, block, ctx))
            for name, bases in chosen.items():
                best = nearest(parts, group.x, [basis for basis in every if (basis.block > 1) == (name == "rotated")])
                if best is not None and best[1] >= BALANCE.gain_db:
                    bases |= dict.fromkeys(group.names, best)
            advance()
    rows = trajectory.some_rows(RANGE_ROWS)
    calls = (trajectory.call(step, rows) for step in range(len(trajectory.timesteps)))
    found = with_ranges(list(chosen.values()), layers, denoise, calls)
    moved = {name for bases in found for name in bases}
    same = tuple(group.names for group in groups if len(group.names) > 1 and moved.issuperset(group.names))
    ctx.log.info("bases: %s", ", ".join(f"{n} {len(by)} of {len(layers)} layers" for n, by in chosen.items()))
    return FoundBases({name: by for name, by in zip(chosen, found, strict=True) if by}, same)


def _first(schemes: Mapping[str, LayerScheme]) -> LayerScheme | None:
    """Return the first scheme that rounds the input, else the first that rounds the weight; None without any."""
    rounded = [s for s in schemes.values() if s != FLOAT and isinstance(s.weight, RoundedWeight)]
    return next((s for s in rounded if not isinstance(s.input, Float)), rounded[0] if rounded else None)
