"""Sensitivity: the error of the output when one layer alone is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from intaglio.pipeline.files import read_typed, write_typed
from intaglio.pipeline.formats.known import StoredScheme
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.numerics.quality import SampleRange

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.numerics.basis import LayerBalance


@dataclass(frozen=True)
class _Table:
    """The content of sensitivity.json: all of a `Sensitivity` except the bases."""

    buckets: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    layers: tuple[Layer, ...]
    schemes: Mapping[str, Mapping[str, StoredScheme]]
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
    in_basis: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    same_basis: tuple[tuple[str, ...], ...] = ()
    samples: SampleRange = field(kw_only=True)


@dataclass(frozen=True)
class Sensitivity(_Table):
    """Relative squared error of the denoiser's output with one layer quantized: error[layer][scheme][bucket].

    `schemes` has the measured schemes by layer and label. The label of a scheme is its name, with the name of a basis
    if the layer was rounded in another basis: `in_basis[layer][label]` is that name, and `bases[basis][layer]` the
    basis. The empty name stands for the basis that a layer already had in the plan before this step; most layers had
    none. Layers in a set of `same_basis` read the same input, and take the same basis.

    `buckets` are (first step, step past the last) ranges of the trajectory. Float has error zero and is listed too.
    `weights[bucket]` is the mean squared error that the final samples would have if the outputs of the bucket had a
    relative squared error of 1. It is smaller for early buckets, because later steps correct a part of an early error.
    A rounded weight makes errors in the same direction at every step, whose effect no sum over steps predicts. So
    `drift_screened[layer][scheme]` is the error of the final samples, predicted to first order along whole
    trajectories. `drift[layer][scheme]` is the same error, measured by drawing samples, for the pairs that were
    measured.

    `stderr` is the standard error, over samples, of each number in `error`; empty for one sample. `measured` lists the
    schemes in which each layer was rounded alone. The errors of all other schemes are predicted to first
    order (`screened`), and multiplied by the median ratio of measured to predicted errors of the scheme.
    `rank_correlation` is Spearman's, of measured and predicted errors. `apart[layer][scheme]` has the
    error of the `weight` alone and of the `input` alone.

    `groups` is the group of each layer, and `metrics` the metric of each group. `ranked[layer][scheme][bucket]` is the
    layer's error by the metric of its group, if that is not the mean squared error. `samples` is the range of the
    full-precision samples.
    """

    bases: Mapping[str, Mapping[str, LayerBalance]] = field(default_factory=dict, compare=False)

    def basis_of(self, layer: str, label: str) -> str:
        """Return the name of the basis in which the layer was rounded; empty for the one that it had before."""
        return self.in_basis.get(layer, {}).get(label, "")

    def balance_of(self, layer: str, label: str) -> LayerBalance | None:
        """Return the basis in which the layer was rounded; None if its input is rounded as it is."""
        return self.bases.get(self.basis_of(layer, label), {}).get(layer)

    def label_of(self, plan: QuantPlan, layer: str) -> str | None:
        """Return the label of the measurement that has the layer's scheme and basis in the plan.

        If no measurement has this basis, it is one of the same scheme in another basis; None if there is none either.
        """
        basis = plan.balances.get(layer)
        same = [
            label for label, scheme in self.schemes.get(layer, {}).items() if scheme.name == plan.schemes[layer].name
        ]
        keys = {label: known.balance.key for label in same if (known := self.balance_of(layer, label)) is not None}
        exact = [label for label in same if keys.get(label) == (None if basis is None else basis.balance.key)]
        return next(iter([*exact, *same]), None)

    def total(self, layer: str, scheme: str) -> float:
        """Return the mean squared error of the final samples times f, which the metric of the layer's group gives.

        f = c (sum d r) / (sum d), with r = m / e. The sums are over the layer's schemes. For each scheme, d is the
        error of the samples, e is the prediction of d from the squared errors of the outputs, and m is the same
        weighted sum of the metric's errors. The constant c keeps the sum of the group's errors as it was. A metric
        ranks layers, while the squared error chooses among a layer's schemes.
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
        """Write sensitivity.json, and a file for the bases of each name."""
        from intaglio.pipeline.numerics.basis import save_balances

        for name, balances in self.bases.items():
            save_balances(balances, root / f"bases-{name}.safetensors")
        write_typed(root / "sensitivity.json", self, _Table)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        from intaglio.pipeline.numerics.basis import load_balances

        table = read_typed(root / "sensitivity.json", _Table)
        files = {file.stem.removeprefix("bases-"): file for file in sorted(root.glob("bases-*.safetensors"))}
        return cls(**vars(table), bases={name: load_balances(file) for name, file in files.items()})
