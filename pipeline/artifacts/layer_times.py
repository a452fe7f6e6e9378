"""Measured time of each layer of a model alone, in each scheme that it may get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed, write_typed


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one call of a layer with the rows of one sample, on the machine that measured it.

    `seconds[layer][scheme]` is this time; `float` is one of the schemes. `element_s` is the time in which one number of
    an input is multiplied by the scale of its channel.
    """

    seconds: Mapping[str, Mapping[str, float]]
    element_s: float

    def save(self, root: Path) -> None:
        """Write layer_times.json."""
        write_typed(root / "layer_times.json", self, LayerTimes)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read layer_times.json."""
        found = read_typed(root / "layer_times.json", LayerTimes)
        return cls(found.seconds, found.element_s)
