"""The Pareto front of plans: none of them is both smaller and better than another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed, typed_json
from intaglio.pipeline.numerics.quality import SampleRange


@dataclass(frozen=True)
class Point:
    """One plan on the front.

    `costs` are those of the quantizable layers relative to float, by the budget's name, where they are known. `loss` is
    the predicted mean squared error of the final samples. `schemes` are the names of schemes, by layer.
    """

    costs: Mapping[str, float]
    loss: float
    schemes: Mapping[str, str]


@dataclass(frozen=True)
class Front:
    """Points in the order of growing size and falling loss, and the chosen plan.

    The chosen plan need not be one of the points: its size may lie between two of them.
    `samples` is the range of the full-precision samples. `drawn_error_db` is the standard error of the chosen plan's
    PSNR over the samples that were drawn with it, in dB; None where fewer than two were drawn.
    """

    points: tuple[Point, ...]
    chosen: Point
    samples: SampleRange
    drawn_error_db: float | None = None

    def psnr_db(self, point: Point) -> float:
        """Return the predicted PSNR of the final samples, in dB; infinite where nothing is lost."""
        return self.samples.psnr_db(point.loss)

    def sqnr_db(self, point: Point) -> float:
        """Return the predicted SQNR of the final samples, in dB; infinite where nothing is lost."""
        return self.samples.sqnr_db(point.loss)

    def save(self, root: Path) -> None:
        """Write front.json, with one line for each point."""
        lines = ",\n  ".join(typed_json(point, Point, indent=None) for point in self.points)
        chosen = typed_json(self.chosen, Point, indent=None)
        samples = typed_json(self.samples, SampleRange, indent=None)
        error = json.dumps(self.drawn_error_db)
        text = (
            f'{{\n "points": [\n  {lines}\n ],\n "chosen": {chosen},\n "samples": {samples},\n'
            f' "drawn_error_db": {error}\n}}\n'
        )
        (root / "front.json").write_text(text)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read front.json."""
        return read_typed(root / "front.json", cls)
