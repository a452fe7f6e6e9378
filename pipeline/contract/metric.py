"""Define metrics, which measure the error of an output against full precision and rank layers by it.

A metric is an entry point of the group `intaglio.metrics`. Shapes: R rows of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MetricContext:
    """Facts about the rows that a metric may use besides their outputs.

    `partner` (R,) is, for each row, the row with the same sample and timestep under another condition, or under none;
    None if rows have no such partner. `frame_axis` is the axis of frames in outputs with five axes.
    """

    partner: torch.Tensor | None = None
    frame_axis: int = 2


class Metric(Protocol):
    """Error of outputs against a reference: zero for equal outputs, and deterministic."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True if the metric is defined for outputs like these."""

    def compare(self, output: torch.Tensor, reference: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return the error of each row, (R,)."""
