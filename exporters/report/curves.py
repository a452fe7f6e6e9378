"""Plot samples that are trajectories, such as a robot's actions: the values of each channel over time.

Shapes: B samples, C channels, L points in time, X and Y the axes of a sample in the model's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from intaglio.exporters.report.figures import CHANNEL_COLOURS, MINUS, number

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MOST_CHANNELS = 32
"""Largest number of channels of a trajectory: samples with more on both axes are not drawn as curves."""
MOST_POINTS = 4096
WIDTH, HEIGHT, PAD = 200, 130, 7
"""Pixels of one plot, with its margin, and of the margin."""
SMOOTH = 3
"""Factor by which plots are drawn larger, before they are reduced."""
BROAD, THIN = 7.0, 1.4
"""Widths of the line below and of the line above, in pixels."""


def is_trajectory(shape: Sequence[int]) -> bool:
    """Return True if samples of this shape, without the batch axis, are shown as curves over time."""
    return len(shape) == 2 and min(shape) <= MOST_CHANNELS and 2 <= max(shape) <= MOST_POINTS


def over_time(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of trajectories (B, X, Y) with time as the last axis, (B, C, L), all as the first tensor has it.

    Time is the axis along which neighbouring values of the first tensor differ least, unless its length is 1.
    """
    first = samples[0].float()
    changes = [
        float(first.diff(dim=axis).abs().mean())
        if first.shape[axis] > 1 and first.shape[3 - axis] <= MOST_CHANNELS
        else math.inf
        for axis in (1, 2)
    ]
    return [x.transpose(1, 2) if changes[0] < changes[1] else x for x in samples]


def ends(curves: torch.Tensor) -> tuple[float, float]:
    """Return the ends of an axis for curves: the range of their finite values, with 4% of room on both sides."""
    kept = curves[curves.isfinite()]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 0.0)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def plots(
    lines: Sequence[torch.Tensor],
    span: tuple[float, float],
    columns: int,
    below: torch.Tensor | None = None,
) -> Image:
    """Plot curves (B, C, L) side by side in lines of `columns`; below each line the same samples of further curves.

    All plots have the range `span`, whose ends are written into the first one; values beyond are drawn at its edge.
    `below` (B, C, L) is drawn in broad pale lines below all of them.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    count = len(lines[0])
    rows = -(-count // columns) * len(lines)
    size = columns * WIDTH, rows * HEIGHT
    page = pillow.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), "white")
    pen = ImageDraw.Draw(page)
    for which, curves_BCL in enumerate(lines):
        for i, curves_CL in enumerate(curves_BCL):
            corner = i % columns * WIDTH, (i // columns * len(lines) + which) * HEIGHT
            _frame(pen, corner, span)
            if below is not None:
                _curves(pen, corner, below[i], span, BROAD)
            _curves(pen, corner, curves_CL, span, THIN)
    page = page.resize(size, pillow.Resampling.LANCZOS)
    font, pen = ImageFont.load_default(10), ImageDraw.Draw(page)
    for value, top in zip(reversed(span), (PAD, HEIGHT - PAD - 13), strict=True):
        pen.text((PAD + 3, top), number(value).replace(MINUS, "-"), "#6b7280", font)
    return page


def _place(corner: tuple[int, int], across: float, up: float) -> tuple[float, float]:
    """Return the pixels of a place in a plot, both parts from 0 to 1, `up` from its lower edge."""
    x = corner[0] + PAD + across * (WIDTH - 2 * PAD)
    return SMOOTH * x, SMOOTH * (corner[1] + PAD + (1 - up) * (HEIGHT - 2 * PAD))


def _frame(pen: ImageDraw, corner: tuple[int, int], span: tuple[float, float]) -> None:
    low, high = span
    pen.rectangle([_place(corner, 0, 1), _place(corner, 1, 0)], outline="#d4d7dd", width=SMOOTH)
    if low < 0 < high:
        zero = -low / (high - low)
        pen.line([_place(corner, 0, zero), _place(corner, 1, zero)], "#d4d7dd", SMOOTH)


def _curves(
    pen: ImageDraw, corner: tuple[int, int], curves_CL: torch.Tensor, span: tuple[float, float], width: float
) -> None:
    """Draw the channels of one sample, pale if the lines are broad."""
    low, high = span
    points = curves_CL.shape[1]
    heights = ((curves_CL - low) / ((high - low) or 1.0)).nan_to_num(0.5).clamp(0, 1).tolist()
    for channel, line in enumerate(heights):
        colour: tuple[int, ...] = CHANNEL_COLOURS[channel % len(CHANNEL_COLOURS)]
        if width == BROAD:
            red, green, blue = (round(level + 0.62 * (255 - level)) for level in colour)
            colour = red, green, blue
        places = [_place(corner, i / (points - 1), up) for i, up in enumerate(line)]
        pen.line(places, colour, round(width * SMOOTH), "curve")
