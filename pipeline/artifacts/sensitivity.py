"""Sensitivity: the error of the output when one layer alone is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed, write_typed
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import LayerScheme


@dataclass(frozen=True)
class Sensitivity:
    """Relative squared error of the denoiser's output with one layer quantized: error[layer][scheme][bucket].

    `buckets` are (first step, step past the last) ranges of the trajectory. Float has error zero and is listed too.
    `weights` is, for each bucket, the mean squared error of the final samples that a relative squared error of one in
    the bucket's outputs would make: an error early on is partly corrected by the steps that follow, a late one is not.
    A rounded weight pushes every step the same way, which no sum over steps predicts: `drift_screened[layer][scheme]`
    is the error of the final samples to first order along whole trajectories, and `drift[layer][scheme]` that measured
    on them, where it was.

    `stderr` is the standard error of each of those means, over samples; empty where there was one sample. `measured`
    lists the schemes that each layer was rounded alone in; errors of others are `screened` ones, the first-order
    prediction, times what the measured ones of the scheme are to theirs in the median. `rank_correlation` is
    Spearman's, of the two. `apart[layer][scheme]` has the error of the `weight` alone and of the `input` alone.

    `groups` is the group of each layer, `metrics` that of each group, and `ranked[layer][scheme][bucket]` its error
    where it is another one than the mean squared error.
    """

    buckets: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    layers: tuple[Layer, ...]
    schemes: Mapping[str, Mapping[str, LayerScheme]]
    """Measured schemes by layer name and scheme name."""
    error: Mapping[str, Mapping[str, tuple[float, ...]]]
    drift: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stderr: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    screened: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    measured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    apart: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    ranked: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    drift_screened: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rank_correlation: float | None = None

    def total(self, layer: str, scheme: str) -> float:
        """Return the mean squared error of the final samples, times the factor f of the layer by its group's metric.

        f = c (sum d r) / (sum d), r = m / e, summed over the layer's schemes: d is the error of the samples, e what the
        mean squared error of outputs predicts of it, m the same sum over buckets of the metric's errors; c keeps the
        group's whole error what it was. A metric ranks layers, while the squared error chooses among a layer's schemes.
        """
        return self.error_of_samples(layer, scheme) * self._factors.get(layer, 1.0)

    @cached_property
    def _factors(self) -> dict[str, float]:
        """Factor f of `total`, for each layer that a metric other than the mean squared error ranks."""
        squared, moved = {}, {}
        for layer, by in self.ranked.items():
            squared[layer] = sum(self.error_of_samples(layer, scheme) for scheme in by)
            moved[layer] = sum(
                self.error_of_samples(layer, scheme) * self._weighed(errors) / predicted
                for scheme, errors in by.items()
                if (predicted := self.predicted_by_outputs(layer, scheme))
            )
        factors: dict[str, float] = {}
        for group in {self.groups[layer] for layer in self.ranked}:
            layers = [layer for layer in self.ranked if self.groups[layer] == group and squared[layer]]
            kept = sum(squared[layer] for layer in layers) / (sum(moved[layer] for layer in layers) or 1.0)
            factors |= {layer: kept * moved[layer] / squared[layer] for layer in layers}
        return factors

    def error_of_samples(self, layer: str, scheme: str) -> float:
        """Return the mean squared error of the final samples: the measured one, or else the predicted one."""
        measured = self.drift.get(layer, {}).get(scheme)
        return self.predicted(layer, scheme) if measured is None else measured

    def predicted(self, layer: str, scheme: str) -> float:
        """Return the predicted mean squared error of the samples: by their gradients, or else by output errors."""
        along = self.drift_screened.get(layer, {}).get(scheme)
        return self.predicted_by_outputs(layer, scheme) if along is None else along

    def predicted_by_outputs(self, layer: str, scheme: str) -> float:
        """Return the mean squared error of the final samples that the errors of the buckets' outputs predict."""
        return self._weighed(self.error[layer][scheme])

    def _weighed(self, errors: tuple[float, ...]) -> float:
        return sum(w * e for w, e in zip(self.weights, errors, strict=True))

    def save(self, root: Path) -> None:
        """Write sensitivity.json."""
        write_typed(root / "sensitivity.json", self, Sensitivity)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read sensitivity.json."""
        return read_typed(root / "sensitivity.json", cls)
