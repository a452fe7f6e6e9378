"""Turns plans, errors and losses into figures: plain values that a template only has to lay out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from intaglio.pipeline.artifacts.front import Front, Point
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.formats.layer import SCHEME_NAMES, Layer, illegal, structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT, IntInput, IntOutput, IntWeight, LayerScheme, PerToken
from intaglio.pipeline.formats.target import Target

HEAT_LEVELS = 10
HEAT_DECADES_MAX = 8
HEAT_LABELS_MAX = 6
CURVE_POINTS_MAX = 1000
OUTSIDE = "Outside the blocks"

MAGMA = ("000004", "180f3d", "440f76", "721f81", "9e2f7f", "cd4071", "f1605d", "fd9668", "feca8d", "fcfdbf")
"""Ten equally spaced colours of matplotlib's magma: dark is small; also without colour vision."""


# numbers

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def number(quantity: float | None, digits: int = 3) -> str:
    """Rounded to significant digits: `0.0312`, `3.1×10⁻⁷`; a dash for what was not measured."""
    if quantity is None:
        return DASH
    if math.isnan(quantity):
        return "not a number"
    if math.isinf(quantity):
        return "∞" if quantity > 0 else f"{MINUS}∞"
    if quantity == 0:
        return "0"
    mantissa, exponent = f"{quantity:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        text = f"{float(f'{mantissa}e{power}'):,.{max(digits - 1 - power, 0)}f}"
    else:
        text = f"{mantissa}{TIMES}10{str(power).translate(_SUPERSCRIPT)}"
    return text.replace("-", MINUS)


def amount(quantity: float | None) -> str:
    """As `number`, but whole where it is whole: `48`."""
    if quantity is not None and abs(quantity) < 1e6 and quantity == int(quantity):
        return f"{int(quantity):,}".replace("-", MINUS)
    return number(quantity)


def size(size_bytes: float | None) -> str:
    """In decimal units: `3.31 MB`."""
    if size_bytes is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{number(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} bytes"


def short_size(size_bytes: float) -> str:
    """At most four characters: `66k`, `1.2M`."""
    power = next((p for p in (3, 2, 1) if size_bytes >= 999.5 * 1000 ** (p - 1)), 0)
    scaled = size_bytes / 1000**power
    return f"{scaled:.{int(power > 1 and scaled < 9.95)}f}{['', 'k', 'M', 'G'][power]}"


def percent(share: float) -> str:
    """Write a share as a percentage: `0.256` becomes `25.6%`."""
    return f"{100 * share:.1f}%"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# schemes


@dataclass(frozen=True)
class SchemeRow:
    """Part of the model with one scheme. `css` names its colour, `code` stands in a cell."""

    name: str
    css: str
    code: str
    meaning: str
    layers: int
    weight_share: float
    size_bytes: int


def scheme_css(scheme: LayerScheme) -> str:
    """CSS class of a scheme: a colour for its bits, two for those of W8A8."""
    match scheme.weight, scheme.input:
        case IntWeight(bits=8), IntInput(bits=8, granularity=granularity):
            return f"s-w8a8_{'token' if isinstance(granularity, PerToken) else 'step'}"
        case IntWeight(bits=4), _:
            return f"s-w4a{scheme.input_bits}"
        case IntWeight() | IntInput(), _:
            return "s-other"
        case _:
            return "s-float"


def scheme_code(scheme: LayerScheme) -> str:
    """At most two characters: weight bits, then t or s for a scale a token or a step, T or S at 4 bits; f for float."""
    match scheme.weight, scheme.input:
        case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=granularity):
            unit = "t" if isinstance(granularity, PerToken) else "s"
            return f"{bits}{unit if input_bits == 8 else unit.upper()}"
        case IntWeight(bits=bits), _:
            return str(bits)
        case _:
            return "f"


def scheme_meaning(scheme: LayerScheme) -> str:
    """One phrase for the legend."""
    match scheme.weight, scheme.input:
        case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=granularity):
            unit = "token" if isinstance(granularity, PerToken) else "denoising step"
            shifted = " around the middle of its range" if scheme.input.shifted else ""
            output = ", 8-bit output" if isinstance(scheme.output, IntOutput) else ""
            return f"{bits}-bit weight, {input_bits}-bit input with one scale per {unit}{shifted}{output}"
        case IntWeight(bits=bits), _:
            return f"{bits}-bit weight, float input"
        case _:
            return "not quantized"


def scheme_rows(plan: QuantPlan) -> tuple[SchemeRow, ...]:
    """The schemes in use, in the order of their names' list."""
    parameters = sum(layer.n * layer.k for layer in plan.layers)
    rows = []
    for name in _in_order(scheme.name for scheme in plan.schemes.values()):
        layers = [layer for layer in plan.layers if plan.schemes[layer.name].name == name]
        one = plan.schemes[layers[0].name]
        rows.append(
            SchemeRow(
                name,
                scheme_css(one),
                scheme_code(one),
                scheme_meaning(one),
                len(layers),
                sum(layer.n * layer.k for layer in layers) / parameters,
                sum(map(plan.layer_bytes, layers)),
            )
        )
    return tuple(rows)


def float_rows(plan: QuantPlan, target: Target) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Layers that stay in float, by the reason: each reason with the names that it holds for."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        if plan.schemes[layer.name] != FLOAT:
            continue
        others = [scheme for scheme in structural_schemes(layer, names=SCHEME_NAMES) if scheme != FLOAT]
        legal = any(illegal(layer, scheme, target) is None for scheme in others)
        reason = plan.reasons.get(
            layer.name, "so planned" if legal else f"{target.name} has no other form for its shape"
        )
        found.setdefault(reason, []).append(layer.name)
    return tuple((reason, tuple(names)) for reason, names in found.items())


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    known = {name: place for place, name in enumerate(SCHEME_NAMES)}
    return tuple(sorted(set(names), key=lambda name: (known.get(name, len(known)), name)))


# bit map


@dataclass(frozen=True)
class Cell:
    """One coloured square: CSS class, the characters in it, what it says when asked, and a second line."""

    css: str
    text: str
    tip: str
    note: str = ""


@dataclass(frozen=True)
class BitMap:
    """Roles x blocks of one stack of blocks; None where a block has no such layer."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def split_name(name: str) -> tuple[str, str, str]:
    """Stack, block and role: `transformer_blocks.3.attn1.to_q` -> `transformer_blocks`, `3`, `attn1.to_q`.

    A layer outside a numbered stack has an empty stack and block.
    """
    match name.split(".", 2):
        case [stack, block, role] if block.isdecimal():
            return stack, block, role
        case _:
            return "", "", name


def bit_maps(plan: QuantPlan) -> tuple[BitMap, ...]:
    """Schemes and bytes of all layers."""
    return _maps(plan, {layer.name: _plan_cell(plan, layer) for layer in plan.layers})


def gain_maps(plan: QuantPlan, graph: Graph) -> tuple[BitMap, ...]:
    """Map the gain of balanced layers, and whether their channel scales cost anything in the graph."""
    return _maps(plan, {x.name: _gain_cell(plan, x, graph) for x in plan.layers if x.name in plan.balances})


def _maps(plan: QuantPlan, cells_of: Mapping[str, Cell]) -> tuple[BitMap, ...]:
    """One map for every stack of blocks, and a last one for the layers outside; roles in the order of the plan."""
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


def _plan_cell(plan: QuantPlan, layer: Layer) -> Cell:
    scheme = plan.schemes[layer.name]
    why = f": {plan.reasons[layer.name]}" if layer.name in plan.reasons else ""
    tip = f"{layer.name}\n{scheme.name}{why}\nN = {layer.n}, K = {layer.k}\n{plan.layer_bytes(layer):,} bytes"
    return Cell(scheme_css(scheme), scheme_code(scheme), tip, short_size(plan.layer_bytes(layer)))


def _gain_cell(plan: QuantPlan, layer: Layer, graph: Graph) -> Cell:
    basis = plan.balances[layer.name]
    rotated, folded = basis.balance.block > 1, graph.is_folded(layer.name)
    how = f"scaled, rotated in blocks of {basis.balance.block}" if rotated else "scaled"
    cost = "the scales are in what precedes it" if folded else "the scales are a multiplication in front of it"
    gain = "a given basis" if basis.gain_db is None else f"{basis.gain_db:.1f} dB nearer to its output"
    text = ("r" if rotated else "s") + ("" if folded else "*")
    note = "" if basis.gain_db is None else f"{basis.gain_db:.1f}"
    return Cell("b-rotated" if rotated else "b-scaled", text, f"{layer.name}\n{how}\n{cost}\n{gain}", note)


# heat map


@dataclass(frozen=True)
class HeatRow:
    """One layer: its scheme in the plan, what samples lose by it, and for every column group one cell a bucket."""

    role: str
    name: str
    scheme: Cell
    samples: Cell
    groups: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class HeatMap:
    """Layers x buckets, once as planned and once for every scheme.

    `buckets` are their ranges of steps; `labels` are (first step, buckets it stands over); `ticks` are (place in
    [0, 1], label) of the legend.
    """

    buckets: tuple[str, ...]
    labels: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[HeatRow, ...]], ...]
    ticks: tuple[tuple[float, str], ...]


def heat_map(sensitivity: Sensitivity, plan: QuantPlan) -> HeatMap:
    """Colours on a logarithmic scale, the same for all schemes; an error of zero (float) stays blank."""
    schemes = _in_order(name for by in sensitivity.error.values() for name in by if name != FLOAT.name)
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
        psnr_db = 10 * math.log10(4 / error)  # samples lie in [-1, 1]
        return Cell("", f"{psnr_db:.0f}", f"{layer.name}\n{psnr_db:.1f} dB PSNR of the samples, {found}")

    def row(layer: Layer) -> HeatRow:
        planned = plan.schemes[layer.name]
        *_, role = split_name(layer.name)
        groups = tuple(cells(layer, name) for name in (planned.name, *schemes))
        return HeatRow(role, layer.name, _plan_cell(plan, layer), samples(layer, planned.name), groups)

    planned = [layer for layer in sensitivity.layers if layer.name in plan.schemes]
    blocks = tuple(
        (f"{stack}.{block}" if stack else OUTSIDE, tuple(map(row, layers)))
        for (stack, block), layers in groupby(planned, lambda layer: split_name(layer.name)[:2])
    )
    ticks = tuple(((d - low) / (high - low), f"10{str(d).translate(_SUPERSCRIPT)}") for d in range(low, high + 1))
    return HeatMap(buckets, labels, ("as planned", *schemes), blocks, ticks)


def _heat_css(error: float, low: int, high: int) -> str:
    if error == 0:
        return "h-zero"
    level = HEAT_LEVELS * (math.log10(error) - low) / (high - low) if error < math.inf else HEAT_LEVELS
    return f"h{min(max(int(level), 0), HEAT_LEVELS - 1)}"


def heat_colours() -> tuple[str, ...]:
    """One for each level, from small to large; none so dark that it drowns in a dark page."""
    palette = magma_palette()
    places = [3 * (30 + 225 * level // (HEAT_LEVELS - 1)) for level in range(HEAT_LEVELS)]
    return tuple("#" + bytes(palette[place : place + 3]).hex() for place in places)


# front


@dataclass(frozen=True)
class Dot:
    """One plan at its place in [0, 1] of the plot, y downwards, and what it says when asked."""

    left: float
    top: float
    tip: str


@dataclass(frozen=True)
class FrontFigure:
    """Predicted quality over size. Points as an SVG polyline takes them; ticks are (place, label)."""

    points: str
    dots: tuple[Dot, ...]
    chosen: Dot | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def front_figure(front: Front) -> FrontFigure | None:
    """None where there are fewer than two points to draw; where nothing is lost there is no finite PSNR to draw."""
    drawn = [(i, point) for i, point in enumerate(front.points) if point.loss > 0]
    if len(drawn) < 2:
        return None
    shown = [front.chosen] * (front.chosen.loss > 0) + [point for _, point in drawn]
    low_size, high_size = _padded([point.costs["size"] for point in shown])
    low_db, high_db = _padded([point.psnr_db for point in shown])

    def left(size: float) -> float:
        return (size - low_size) / (high_size - low_size)

    def top(psnr_db: float) -> float:
        return (high_db - psnr_db) / (high_db - low_db)

    def dot(point: Point, title: str) -> Dot:
        return Dot(left(point.costs["size"]), top(point.psnr_db), f"{title}\n{_point_tip(point)}")

    dots = tuple(dot(point, f"point {i}") for i, point in drawn)
    return FrontFigure(
        points=" ".join(f"{one.left:.4f},{one.top:.4f}" for one in dots),
        dots=dots,
        chosen=dot(front.chosen, "the plan") if front.chosen.loss > 0 else None,
        x_ticks=tuple((left(v), _tick_label(v)) for v in _ticks(low_size, high_size)),
        y_ticks=tuple((top(v), _tick_label(v)) for v in _ticks(low_db, high_db)),
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis with some room beyond the values."""
    pad = 0.06 * (max(values) - min(values)) or 0.5
    return min(values) - pad, max(values) + pad


def _point_tip(point: Point) -> str:
    costs = (f"{name} {number(cost)}" for name, cost in point.costs.items())
    names = list(point.schemes.values())
    schemes = (f"{names.count(name)} {name}" for name in _in_order(names))
    return "\n".join((f"{number(point.psnr_db)} dB", *costs, ", ".join(schemes)))


# curve


@dataclass(frozen=True)
class Curve:
    """Points in [0, 1] of the plot, y downwards, as an SVG polyline takes them. Ticks are (place, label)."""

    points: str
    mean: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    logarithmic: bool
    first: float
    last: float


def curve(loss: Sequence[float]) -> Curve | None:
    """The loss and its mean over a twentieth of the training around each point; None where nothing was trained."""
    drawn = [(step, y) for step, y in enumerate(loss, start=1) if math.isfinite(y)]
    if len(drawn) < 2:
        return None
    kept = sorted({*range(0, len(drawn), math.ceil(len(drawn) / CURVE_POINTS_MAX)), len(drawn) - 1})
    half = len(drawn) // 40
    mean = [fmean(y for _, y in drawn[max(i - half, 0) : i + half + 1]) for i in kept]
    smallest, largest = min(y for _, y in drawn), max(y for _, y in drawn)
    logarithmic = smallest > 0 and largest / smallest > 10
    scale = math.log10 if logarithmic else float
    pad = 0.06 * (scale(largest) - scale(smallest)) or 0.5
    low, high = scale(smallest) - pad, scale(largest) + pad

    def height(y: float) -> float:
        return (high - scale(y)) / (high - low)

    def polyline(ys: Iterable[float]) -> str:
        return " ".join(f"{drawn[i][0] / len(loss):.4f},{height(y):.4f}" for i, y in zip(kept, ys, strict=True))

    return Curve(
        points=polyline(drawn[i][1] for i in kept),
        mean=polyline(mean) if half else "",
        x_ticks=tuple((v / len(loss), f"{v:,.0f}") for v in _ticks(0, len(loss)) if v == int(v)),
        y_ticks=tuple((height(v), _tick_label(v)) for v in (_log_ticks if logarithmic else _ticks)(low, high)),
        logarithmic=logarithmic,
        first=mean[0],
        last=mean[-1],
    )


def _tick_label(v: float) -> str:
    """Without trailing zeros: `0.005`."""
    return (
        f"{v:,.10g}".replace("-", MINUS)
        if v == 0 or 1e-4 <= abs(v) < 1e6
        else number(v, 2).replace(f".0{TIMES}", TIMES)
    )


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to eight round numbers between low and high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.99)
    return tuple(i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten between 10^low and 10^high, with 2 and 5 times them where there are fewer than three."""
    for parts in ((1,), (1, 2, 5)):
        every = [m * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for m in parts]
        ticks = tuple(v for v in every if low <= math.log10(v) <= high)
        if len(ticks) >= 3:
            break
    return ticks


# strip


@dataclass(frozen=True)
class Lane:
    """One dot for each sample at its place in [0, 1], and their mean."""

    title: str
    dots: tuple[Dot, ...]
    mean: str
    mean_left: float


@dataclass(frozen=True)
class Strip:
    """PSNR of every sample, a lane for each implementation; ticks are (place, label)."""

    lanes: tuple[Lane, ...]
    total: int
    ticks: tuple[tuple[float, str], ...]


def strip(psnr_db: Mapping[str, Sequence[float]]) -> Strip | None:
    """Lay out a strip of PSNR values by the titles of its lanes; None without values."""
    every = [db for lane in psnr_db.values() for db in lane]
    if not every:
        return None
    low, high = _padded(every)

    def left(db: float) -> float:
        return (db - low) / (high - low)

    lanes = (
        Lane(
            title,
            tuple(Dot(left(db), 0.5, f"sample {i}: {number(db, 4)} dB") for i, db in enumerate(lane, start=1)),
            number(fmean(lane), 4),
            left(fmean(lane)),
        )
        for title, lane in psnr_db.items()
    )
    return Strip(tuple(lanes), len(every) // len(psnr_db), tuple((left(v), _tick_label(v)) for v in _ticks(low, high)))


# bars


def log_shares(errors: Mapping[str, float]) -> dict[str, float]:
    """Lengths of bars: one for the largest error, a hundredth or more for the smallest; zero for none."""
    drawn = [math.log10(e) for e in errors.values() if 0 < e < math.inf]
    if not drawn:
        return dict.fromkeys(errors, 0.0)
    low, high = min(math.floor(min(drawn)), max(drawn) - 1), max(drawn)

    def share(error: float) -> float:
        if not error > 0:
            return 0.0
        return max((math.log10(error) - low) / (high - low), 0.01) if error < math.inf else 1.0

    return {name: share(error) for name, error in errors.items()}


# colours


def magma_palette() -> list[int]:
    """256 colours, as an image with a palette takes them."""
    anchors = [tuple(bytes.fromhex(colour)) for colour in MAGMA]
    palette = []
    for level in range(256):
        place, within = divmod(level * (len(anchors) - 1), 255)
        near, far = anchors[place], anchors[min(place + 1, len(anchors) - 1)]
        palette += [round(a + (b - a) * within / 255) for a, b in zip(near, far, strict=True)]
    return palette
