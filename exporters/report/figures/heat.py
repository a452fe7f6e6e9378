"""Compute the heat map of sensitivity: the error of each layer, scheme and bucket of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from intaglio.exporters.report.figures.colours import magma_palette
from intaglio.exporters.report.figures.layer_maps import OUTSIDE, Cell, plan_cell, split_name
from intaglio.exporters.report.figures.schemes import in_order
from intaglio.exporters.report.figures.text import SUPERSCRIPT, number
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT

HEAT_LEVELS = 10
"""Colours of the map."""
HEAT_DECADES_MAX = 8
"""Largest number of powers of ten that the colours span."""
HEAT_LABELS_MAX = 6
"""Largest number of labels above the columns of one scheme."""


@dataclass(frozen=True)
class HeatRow:
    """One layer: its scheme in the plan, the PSNR of samples with this layer alone quantized, and its errors.

    `groups` has one cell for each bucket of steps, first of the planned scheme and then of every scheme.
    """

    role: str
    name: str
    scheme: Cell
    samples: Cell
    groups: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class HeatMap:
    """Errors of all layers in all buckets of steps, once as planned and once for every scheme.

    `buckets` are ranges of steps as text; `labels` are (first step, number of buckets that the label spans); `ticks`
    are (place in [0, 1], label) of the legend.
    """

    buckets: tuple[str, ...]
    labels: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[HeatRow, ...]], ...]
    ticks: tuple[tuple[float, str], ...]


def heat_map(sensitivity: Sensitivity, plan: QuantPlan) -> HeatMap:
    """Return the heat map: one logarithmic colour scale for all schemes; an error of zero, as in float, stays blank."""
    schemes = in_order(name for by in sensitivity.error.values() for name in by if name != FLOAT.name)
    errors = [e for by in sensitivity.error.values() for row in by.values() for e in row if 0 < e < math.inf]
    high = math.ceil(math.log10(max(errors, default=1.0)))
    low = max(min(math.floor(math.log10(min(errors, default=0.1))), high - 1), high - HEAT_DECADES_MAX)
    stride = math.ceil(len(sensitivity.buckets) / HEAT_LABELS_MAX)
    starts = range(0, len(sensitivity.buckets), stride)
    labels = tuple((sensitivity.buckets[i][0], min(stride, len(sensitivity.buckets) - i)) for i in starts)
    buckets = tuple(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in sensitivity.buckets)

    def cells(layer: Layer, scheme: str) -> tuple[Cell, ...]:
        row = sensitivity.error[layer.name].get(scheme)
        if row is None:
            return tuple(Cell("h-none", "", "not measured") for _ in buckets)
        # the page adds layer, scheme and steps from the cell's row and column: there can be ten thousands of cells
        return tuple(Cell(_heat_css(e, low, high), "", number(e)) for e in row)

    def samples(layer: Layer, scheme: str) -> Cell:
        error = sensitivity.error_of_samples(layer.name, scheme) if scheme in sensitivity.error[layer.name] else 0.0
        if not 0 < error < math.inf:
            return Cell("", "", "")
        found = "drawn" if scheme in sensitivity.drift.get(layer.name, {}) else "predicted"
        db, sqnr_db = sensitivity.samples.psnr_db(error), sensitivity.samples.sqnr_db(error)
        return Cell("", f"{db:.0f}", f"{layer.name}\n{db:.1f} dB PSNR of the samples (SQNR {sqnr_db:.1f}), {found}")

    def row(layer: Layer) -> HeatRow:
        planned = sensitivity.label_of(plan, layer.name) or plan.schemes[layer.name].name
        *_, role = split_name(layer.name)
        groups = tuple(cells(layer, name) for name in (planned, *schemes))
        return HeatRow(role, layer.name, plan_cell(plan, layer), samples(layer, planned), groups)

    planned = [layer for layer in sensitivity.layers if layer.name in plan.schemes]
    blocks = tuple(
        (f"{stack}.{block}" if stack else OUTSIDE, tuple(map(row, layers)))
        for (stack, block), layers in groupby(planned, lambda layer: split_name(layer.name)[:2])
    )
    ticks = tuple(((d - low) / (high - low), f"10{str(d).translate(SUPERSCRIPT)}") for d in range(low, high + 1))
    return HeatMap(buckets, labels, ("as planned", *schemes), blocks, ticks)


def _heat_css(error: float, low: int, high: int) -> str:
    if error == 0:
        return "h-zero"
    level = HEAT_LEVELS * (math.log10(error) - low) / (high - low) if error < math.inf else HEAT_LEVELS
    return f"h{min(max(int(level), 0), HEAT_LEVELS - 1)}"


def heat_colours() -> tuple[str, ...]:
    """Return one colour for each level, from small to large errors; all are visible on a dark page."""
    palette = magma_palette()
    places = [3 * (30 + 225 * level // (HEAT_LEVELS - 1)) for level in range(HEAT_LEVELS)]
    return tuple("#" + bytes(palette[place : place + 3]).hex() for place in places)
