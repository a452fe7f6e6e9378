"""Compute plots: the front of plans, the loss of the training and its samples, the PSNR of every sample, and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from intaglio.exporters.report.figures.schemes import in_order
from intaglio.exporters.report.figures.text import MINUS, TIMES, number
from intaglio.pipeline.artifacts.front import Front, Point
from intaglio.pipeline.artifacts.quantized import Adapter

CURVE_POINTS_MAX = 1000
"""Largest number of points of the loss that are drawn."""


@dataclass(frozen=True)
class Dot:
    """A dot at its place in [0, 1] of the plot, y downwards, and the tip shown under the pointer."""

    left: float
    top: float
    tip: str


@dataclass(frozen=True)
class DotFigure:
    """PSNR over the size of plans, or over updates, with one chosen dot.

    `points` is the text of an SVG polyline; ticks are (place, label).
    """

    points: str
    dots: tuple[Dot, ...]
    chosen: Dot | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def front_figure(front: Front) -> DotFigure | None:
    """Return the plot of all plans with a finite PSNR, or None where there are fewer than two of them."""
    drawn = [(i, point) for i, point in enumerate(front.points) if point.loss > 0]
    if len(drawn) < 2:
        return None
    shown = [front.chosen] * (front.chosen.loss > 0) + [point for _, point in drawn]
    low_size, high_size = _padded([point.costs["size"] for point in shown])
    low_db, high_db = _padded([front.psnr_db(point) for point in shown])

    def left(size: float) -> float:
        return (size - low_size) / (high_size - low_size)

    def top(psnr_db: float) -> float:
        return (high_db - psnr_db) / (high_db - low_db)

    def dot(point: Point, title: str) -> Dot:
        db = front.psnr_db(point)
        quality = f"{number(db)} dB (SQNR {number(front.sqnr_db(point))})"
        return Dot(left(point.costs["size"]), top(db), f"{title}\n{quality}\n{_point_tip(point)}")

    dots = tuple(dot(point, f"point {i}") for i, point in drawn)
    return DotFigure(
        points=" ".join(f"{one.left:.4f},{one.top:.4f}" for one in dots),
        dots=dots,
        chosen=dot(front.chosen, "the plan") if front.chosen.loss > 0 else None,
        x_ticks=tuple((left(v), _tick_label(v)) for v in _ticks(low_size, high_size)),
        y_ticks=tuple((top(v), _tick_label(v)) for v in _ticks(low_db, high_db)),
    )


def drawn_figure(adapter: Adapter) -> DotFigure | None:
    """Return the PSNR of the samples drawn during a training, the kept state chosen; None for fewer than two states."""
    known = {each.update: adapter.psnr_db(each) for each in adapter.drawn if 0 < each.mse < math.inf}
    if len(known) < 2:
        return None
    (low, high), end = _padded(tuple(known.values())), max(known)

    def dot(update: int, title: str) -> Dot:
        db = known[update]
        return Dot(update / end, (high - db) / (high - low), f"{title}: {number(db, 4)} dB")

    dots = tuple(dot(update, f"after {update} updates" if update else "start") for update in known)
    kept = adapter.kept.update
    return DotFigure(
        points=" ".join(f"{one.left:.4f},{one.top:.4f}" for one in dots),
        dots=dots,
        chosen=dot(kept, "kept") if kept in known else None,
        x_ticks=tuple((v / end, f"{v:,.0f}") for v in _ticks(0, end) if v == int(v)),
        y_ticks=tuple(((high - v) / (high - low), _tick_label(v)) for v in _ticks(low, high)),
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis, with 6% of room beyond the values on each side."""
    pad = 0.06 * (max(values) - min(values)) or 0.5
    return min(values) - pad, max(values) + pad


def _point_tip(point: Point) -> str:
    """Return the tip of one plan: its costs, and how many layers have each scheme."""
    costs = (f"{name} {number(cost)}" for name, cost in point.costs.items())
    names = list(point.schemes.values())
    schemes = (f"{names.count(name)} {name}" for name in in_order(names))
    return "\n".join((*costs, ", ".join(schemes)))


@dataclass(frozen=True)
class Curve:
    """The loss of the training. `points` and `mean` are texts of SVG polylines in [0, 1], y downwards.

    Ticks are (place, label); `first` and `last` are the mean at both ends.
    """

    points: str
    mean: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    logarithmic: bool
    first: float
    last: float


def curve(loss: Sequence[float]) -> Curve | None:
    """Return the loss, and its mean over a twentieth of the training around each point; None without a training."""
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
    """Return a number without trailing zeros: `0.005`."""
    return (
        f"{v:,.10g}".replace("-", MINUS)
        if v == 0 or 1e-4 <= abs(v) < 1e6
        else number(v, 2).replace(f".0{TIMES}", TIMES)
    )


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Return four to eight round numbers between low and high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.99)
    return tuple(i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return the powers of ten between 10^low and 10^high, and 2 and 5 times them where there are fewer than three."""
    for parts in ((1,), (1, 2, 5)):
        every = [m * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for m in parts]
        ticks = tuple(v for v in every if low <= math.log10(v) <= high)
        if len(ticks) >= 3:
            break
    return ticks


@dataclass(frozen=True)
class Lane:
    """The samples of one implementation: a dot for each at its place in [0, 1], and their mean."""

    title: str
    dots: tuple[Dot, ...]
    mean: str
    mean_sqnr: str
    mean_left: float


@dataclass(frozen=True)
class Strip:
    """PSNR of every sample in dB, a lane for each implementation.

    `total` is the number of samples of one lane; ticks are (place, label).
    """

    lanes: tuple[Lane, ...]
    total: int
    ticks: tuple[tuple[float, str], ...]


def strip(psnr_db: Mapping[str, Sequence[float]], sqnr_db: Mapping[str, Sequence[float]]) -> Strip | None:
    """Return the strip of the samples' PSNR, by the titles of the lanes; None where there are no samples.

    The SQNR of each sample is in its tip.
    """
    every = [db for lane in psnr_db.values() for db in lane]
    if not every:
        return None
    low, high = _padded(every)

    def left(db: float) -> float:
        return (db - low) / (high - low)

    def dots(psnr: Sequence[float], sqnr: Sequence[float]) -> tuple[Dot, ...]:
        tips = (f"{number(db, 4)} dB (SQNR {number(s, 4)})" for db, s in zip(psnr, sqnr, strict=True))
        return tuple(Dot(left(psnr[i]), 0.5, f"sample {i + 1}: {tip}") for i, tip in enumerate(tips))

    lanes = (
        Lane(
            title,
            dots(lane, sqnr_db[title]),
            number(fmean(lane), 4),
            number(fmean(sqnr_db[title]), 4),
            left(fmean(lane)),
        )
        for title, lane in psnr_db.items()
    )
    return Strip(tuple(lanes), len(every) // len(psnr_db), tuple((left(v), _tick_label(v)) for v in _ticks(low, high)))


def log_shares(errors: Mapping[str, float]) -> dict[str, float]:
    """Return lengths of bars on a logarithmic scale: 1 for the largest error, 0.01 or more for others, 0 for none."""
    drawn = [math.log10(e) for e in errors.values() if 0 < e < math.inf]
    if not drawn:
        return dict.fromkeys(errors, 0.0)
    low, high = min(math.floor(min(drawn)), max(drawn) - 1), max(drawn)

    def share(error: float) -> float:
        if not error > 0:
            return 0.0
        return max((math.log10(error) - low) / (high - low), 0.01) if error < math.inf else 1.0

    return {name: share(error) for name, error in errors.items()}
