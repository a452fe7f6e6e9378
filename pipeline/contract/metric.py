"""How far an output is from full precision's: what layers are ranked by.

A metric is an entry point of the group `intaglio.metrics`. Shapes: R rows of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MetricContext:
    """What a metric may know of the rows beside their outputs.

    `partner` (R,) is, for each row, the row with the same sample and timestep under another condition, or under none;
    None where rows have no such partner. `frame_axis` is the one of frames where outputs have five axes.
    """

    partner: torch.Tensor | None = None
    frame_axis: int = 2


class Metric(Protocol):
    """Zero for equal outputs. Deterministic."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Whether outputs like these have what it looks at."""

    def compare(self, output: torch.Tensor, reference: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """The error of each row, (R,)."""
