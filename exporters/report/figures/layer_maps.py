"""Compute maps of all layers, one cell for each layer: their schemes, and the gain of balanced ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.exporters.report.figures.schemes import scheme_code, scheme_css
from intaglio.exporters.report.figures.text import short_size
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import Layer

OUTSIDE = "Outside the blocks"


@dataclass(frozen=True)
class Cell:
    """One coloured square: its CSS class, its text, the tip shown under the pointer, and a second line of text."""

    css: str
    text: str
    tip: str
    note: str = ""


@dataclass(frozen=True)
class BitMap:
    """Layers of one stack of blocks: a row for each role, a column for each block; None where there is no layer."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def split_name(name: str) -> tuple[str, str, str]:
    """Split a layer's name into its stack, block and role; both are empty for a layer outside a numbered stack.

    >>> split_name("transformer_blocks.3.attn1.to_q")
    ('transformer_blocks', '3', 'attn1.to_q')
    """
    match name.split(".", 2):
        case [stack, block, role] if block.isdecimal():
            return stack, block, role
        case _:
            return "", "", name


def bit_maps(plan: QuantPlan) -> tuple[BitMap, ...]:
    """Return maps of the schemes and bytes of all layers."""
    return _maps(plan, {layer.name: plan_cell(plan, layer) for layer in plan.layers})


def gain_maps(plan: QuantPlan, graph: Graph) -> tuple[BitMap, ...]:
    """Return maps of the balanced layers: their gain, and whether their channel scales need a multiplication."""
    return _maps(plan, {x.name: _gain_cell(plan, x, graph) for x in plan.layers if x.name in plan.balances})


def _maps(plan: QuantPlan, cells_of: Mapping[str, Cell]) -> tuple[BitMap, ...]:
    """Return one map for every stack of blocks, then one for the layers outside; roles in the order of the plan."""
    stacks: dict[str, dict[str, dict[str, Cell]]] = {}
    for layer in plan.layers:
        stack, block, role = split_name(layer.name)
        cells = stacks.setdefault(stack, {}).setdefault(role, {})
        if layer.name in cells_of:
            cells[block] = cells_of[layer.name]
    maps = []
    for stack, roles in sorted(stacks.items(), key=lambda item: not item[0]):
        columns = sorted({block for cells in roles.values() for block in cells}, key=lambda block: int(block or 0))
        rows = tuple((role, tuple(cells.get(block) for block in columns)) for role, cells in roles.items() if cells)
        if rows:
            maps.append(BitMap(stack or OUTSIDE, tuple(columns), rows))
    return tuple(maps)


def plan_cell(plan: QuantPlan, layer: Layer) -> Cell:
    """Return the cell of one layer: the colour and code of its scheme, and its bytes."""
    scheme = plan.schemes[layer.name]
    why = f": {plan.reasons[layer.name]}" if layer.name in plan.reasons else ""
    tip = f"{layer.name}\n{scheme.name}{why}\nN = {layer.n}, K = {layer.k}\n{plan.layer_bytes(layer):,} bytes"
    return Cell(scheme_css(scheme), scheme_code(scheme), tip, short_size(plan.layer_bytes(layer)))


def _gain_cell(plan: QuantPlan, layer: Layer, graph: Graph) -> Cell:
    basis = plan.balances[layer.name]
    rotated, folded = basis.balance.block > 1, graph.is_folded(layer.name)
    how = f"scaled, rotated in blocks of {basis.balance.block}" if rotated else "scaled"
    cost = (
        "the scales are folded into the operator before the layer"
        if folded
        else "the scales are a multiplication before it"
    )
    gain = "a given basis" if basis.gain_db is None else f"the error of the output is {basis.gain_db:.1f} dB smaller"
    text = ("r" if rotated else "s") + ("" if folded else "*")
    note = "" if basis.gain_db is None else f"{basis.gain_db:.1f}"
    return Cell("b-rotated" if rotated else "b-scaled", text, f"{layer.name}\n{how}\n{cost}\n{gain}", note)
