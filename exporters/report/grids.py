"""Lay samples out for comparison: sheets of pictures with maps of their errors, or plots of trajectories.

Shapes: B samples, C channels, F frames, H W pixels, L points in time; N pictures in R rows of K.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intaglio.exporters.report.curves import ends, is_trajectory, over_time, plots
from intaglio.exporters.report.figures import MINUS, magma_palette
from intaglio.exporters.report.pictures import Colours, as_image, frames, lines, png

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

CURVE_COLUMNS = 4
"""Plots of trajectories in a line."""
SHEET_PIXELS_MAX = 384 * 384
"""Pixels of one sheet. Five sheets stay below 3 MB as text even where they are noise, which PNG cannot compress."""


@dataclass(frozen=True)
class Drawn:
    """Samples (B, C, H, W), clips (B, C, F, H, W) or trajectories (B, C, L) or (B, L, C) of one implementation."""

    title: str
    note: str
    samples: torch.Tensor


@dataclass(frozen=True)
class Sheet:
    """All pictures of one implementation in one PNG image, as a data URI."""

    title: str
    note: str
    image: str


@dataclass(frozen=True)
class ErrorMap:
    """Absolute difference of two sheets, times `gain`; `largest` is the largest difference of all samples' values.

    `span` is the range of all samples of the first implementation.
    """

    title: str
    gain: int
    largest: float
    span: tuple[float, float]
    image: str


@dataclass(frozen=True)
class SampleFigure:
    """Sheets of the same layout.

    The page shows two of them on top of each other; `pair` holds the positions of the two that it shows first.
    """

    sheets: tuple[Sheet, ...]
    errors: tuple[ErrorMap, ...]
    pair: tuple[int, int]
    columns: int
    rows: int
    shown: int
    total: int
    frames: int
    pixels: tuple[int, int]
    """Width and height of a picture."""
    channels: int
    reduced: int
    """Pixels of a picture, along each axis, that became one pixel of the page."""

    @property
    def latent(self) -> bool:
        """True where the samples are latents, which a decoder makes images from."""
        return self.channels not in (1, 3)


@dataclass(frozen=True)
class CurvePair:
    """Plots of two implementations on top of each other, and of their difference, as data URIs.

    `largest` is the largest difference in all samples; plots of the difference range from minus to plus this value.
    """

    below: str
    above: str
    image: str
    errors: str
    largest: float

    @property
    def difference(self) -> str:
        """Name of the difference."""
        return f"{self.above} {MINUS} {self.below}"


@dataclass(frozen=True)
class CurveFigure:
    """Plots of trajectories. `span` is the range of every plot: that of the first implementation, with some room."""

    curves: tuple[CurvePair, ...]
    shown: int
    total: int
    channels: int
    points: int
    span: tuple[float, float]


def laid_out(
    drawn: Mapping[str, Drawn], pairs: Sequence[tuple[str, str]], count: int, pixels_max: int = SHEET_PIXELS_MAX
) -> SampleFigure | CurveFigure | None:
    """Lay out samples as pictures or as trajectories; None where they are neither. Arguments: see `sample_figure`."""
    if drawn and all(is_trajectory(each.samples.shape[1:]) for each in drawn.values()):
        return curve_figure(drawn, pairs, count)
    return sample_figure(drawn, pairs, count, pixels_max)


def curve_figure(drawn: Mapping[str, Drawn], pairs: Sequence[tuple[str, str]], count: int) -> CurveFigure:
    """Plot the first `count` trajectories of each pair: the first implementation below, the second above."""
    every = over_time([each.samples.float() for each in drawn.values()])
    found = dict(zip(drawn, every, strict=True))
    total, channels, points = every[0].shape
    span, shown, curves = ends(every[0]), min(count, total), []
    columns = min(CURVE_COLUMNS, shown)
    for one, other in pairs:
        error_BCL = (found[other] - found[one]).nan_to_num(0.0)
        largest = float(error_BCL.abs().max())
        image = plots([found[other][:shown]], span, columns, below=found[one][:shown])
        errors = plots([error_BCL[:shown]], (-largest, largest), columns)
        curves.append(CurvePair(drawn[one].title, drawn[other].title, _png(image), _png(errors), largest))
    return CurveFigure(tuple(curves), shown, total, channels, points, span)


def sample_figure(
    drawn: Mapping[str, Drawn], pairs: Sequence[tuple[str, str]], count: int, pixels_max: int = SHEET_PIXELS_MAX
) -> SampleFigure | None:
    """Lay out the first `count` samples of each implementation; None where samples are no images.

    A sheet has at most `pixels_max` pixels: larger ones show fewer or smaller samples. `pairs` are the implementations
    whose difference is shown, second minus first; the page first shows those of the first pair.
    """
    if not drawn or any(each.samples.ndim not in (4, 5) for each in drawn.values()):
        return None
    first = next(iter(drawn.values())).samples
    total, channels, *length, height, width = first.shape
    clip = math.prod(length)
    reduced = math.ceil(math.sqrt(clip * height * width / pixels_max))
    shown = min(total, count, max(pixels_max * reduced**2 // (clip * height * width), 1))
    columns = clip if length else _columns(shown)
    shown = shown if length else shown // columns * columns
    found = {key: frames(each.samples[:shown].float()) for key, each in drawn.items()}
    colour = Colours(next(iter(found.values())))
    low, high = first.aminmax()
    span = float(low), float(high)
    names, errors = list(drawn), []
    for one, other in pairs:
        largest = float((drawn[other].samples.float() - drawn[one].samples.float()).abs().max())
        error_N1HW = (colour.scaled(found[other]) - colour.scaled(found[one])).abs().mean(1, keepdim=True)
        title = f"{drawn[other].title} {MINUS} {drawn[one].title}"
        errors.append(_error_map(error_N1HW, title, largest, span, reduced, columns))
    return SampleFigure(
        sheets=tuple(
            Sheet(drawn[key].title, drawn[key].note, _png(as_image(_tiled(_pooled(colour(x), reduced), columns))))
            for key, x in found.items()
        ),
        errors=tuple(errors),
        pair=(names.index(pairs[0][0]), names.index(pairs[0][1])) if pairs else (0, len(names) - 1),
        columns=columns,
        rows=shown * clip // columns,
        shown=shown,
        total=total,
        frames=clip,
        pixels=(width, height),
        channels=channels,
        reduced=reduced,
    )


def _columns(count: int) -> int:
    """Return the number of columns with the fewest samples in an incomplete last row.

    If there are several such numbers, the layout that is nearest to a square is taken.
    """
    square = math.ceil(math.sqrt(count))
    return max(
        range(square, max(square, min(count, 8)) + 1), key=lambda columns: (count // columns * columns, -columns)
    )


def _tiled(x_NCHW: torch.Tensor, columns: int) -> torch.Tensor:
    """Put pictures side by side in rows: (N, C, H, W) -> (C, R H, K W)."""
    return lines(x_NCHW, columns).permute(1, 0, 2, 3).flatten(1, 2)


def _error_map(
    error_N1HW: torch.Tensor, title: str, largest: float, span: tuple[float, float], reduced: int, columns: int
) -> ErrorMap:
    """Return the map of an error, times the largest power of two up to 4096 that leaves 99% of it below white."""
    from PIL.Image import fromarray

    error_1HW = _tiled(_pooled(error_N1HW, reduced, keep_peaks=True), columns)
    bright = float(error_1HW.quantile(0.99))
    gain = 2 ** min(max(math.floor(math.log2(1 / bright)), 0), 12) if bright > 0 else 1
    image = fromarray(((gain * error_1HW[0]).clamp(0, 1) * 255).round().byte().numpy())
    image.putpalette(magma_palette())
    return ErrorMap(title, gain, largest, span, _png(image))


def _pooled(x_NCHW: torch.Tensor, reduced: int, *, keep_peaks: bool = False) -> torch.Tensor:
    from torch.nn.functional import avg_pool2d, max_pool2d

    if reduced == 1:
        return x_NCHW
    return max_pool2d(x_NCHW, reduced) if keep_peaks else avg_pool2d(x_NCHW, reduced)


def _png(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
