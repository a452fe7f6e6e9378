"""The Pareto front of plans: none of them is both smaller and better than another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed, typed_json
from intaglio.pipeline.numerics.quality import psnr_db


@dataclass(frozen=True)
class Point:
    """One plan on the front.

    `costs` are those of the quantizable layers relative to float, by the budget's name, where they are known. `loss` is
    the predicted mean squared error of the final samples. `schemes` are the names of schemes, by layer.
    """

    costs: Mapping[str, float]
    loss: float
    schemes: Mapping[str, str]

    @property
    def psnr_db(self) -> float:
        """Predicted PSNR of the final samples; infinite where nothing is lost."""
        return psnr_db(self.loss)


@dataclass(frozen=True)
class Front:
    """Points in the order of growing size and falling loss, and the chosen one, which may lie between two of them."""

    points: tuple[Point, ...]
    chosen: Point

    def save(self, root: Path) -> None:
        """Write front.json, with one line for each point."""
        lines = ",\n  ".join(typed_json(point, Point, indent=None) for point in self.points)
        chosen = typed_json(self.chosen, Point, indent=None)
        (root / "front.json").write_text(f'{{\n "points": [\n  {lines}\n ],\n "chosen": {chosen}\n}}\n')

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read front.json."""
        return read_typed(root / "front.json", cls)
