"""Combine two estimates of the rounding error: predicted for all layers, measured for some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from intaglio.passes.sensitivity.forms import Form, parts_of
from intaglio.pipeline.formats.schemes import FLOAT

if TYPE_CHECKING:
    from intaglio.passes.sensitivity.screen import Forms
    from intaglio.passes.sensitivity.study import Errors
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.contract.metric import Metric

MSE = "mse"
"""Name of the metric that every layer has, and that is predicted."""
Pair = tuple[str, str]
"""Names of a layer and of one of its forms."""
Table = dict[str, dict[str, tuple[float, ...]]]


@dataclass
class Estimates:
    """Errors of layers by form, bucket and sample; `filled` puts them into the table.

    `metrics` has the metrics of each layer, the mean squared error first. `add` adds measured errors, which replace
    predicted ones.
    """

    table: Sensitivity
    forms: Forms
    metrics: Mapping[str, Mapping[str, Metric]]
    predicted: Errors
    measured: dict[str, Errors] = field(default_factory=lambda: {MSE: {}})

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every layer in every scheme but float."""
        return [(name, s) for name, by in self.table.schemes.items() for s in by if s != FLOAT.name]

    def add(self, errors: Mapping[str, Errors]) -> None:
        """Add measured errors, by metric."""
        for metric, found in errors.items():
            for name, by in found.items():
                self.measured.setdefault(metric, {}).setdefault(name, {}).update(by)

    def expected(self, pair: Pair) -> float:
        """Return the predicted squared error of the samples; 0 without a prediction."""
        name, label = pair
        return self._total(self.predicted[name][label]) if self.predicted else 0.0

    @property
    def both(self) -> dict[Pair, tuple[float, float]]:
        """Predicted and measured squared error of the samples, for each pair that has both."""
        found = {(n, s): by[s] for n, by in self.measured[MSE].items() for s in by if s in self.table.schemes[n]}
        totals = {pair: (self.expected(pair), self._total(found[pair])) for pair in self.pairs if pair in found}
        return {pair: (expected, total) for pair, (expected, total) in totals.items() if expected}

    def usual_ratios(self) -> dict[str, float]:
        """Return the median ratio of measured to predicted error, by scheme."""
        both = self.both
        return {
            scheme: median(total / expected for (_, s), (expected, total) in both.items() if s == scheme)
            for scheme in sorted({s for _, s in both})
        }

    def disagreeing(self, factor: float) -> set[str]:
        """Return the layers whose measured errors disagree with the predicted ones.

        A ratio of measured to predicted error is then more than `factor` times above or below its scheme's median.
        """
        usual = self.usual_ratios()
        ratios = {pair: total / expected / usual[pair[1]] for pair, (expected, total) in self.both.items()}
        return {name for (name, _), ratio in ratios.items() if not 1 / factor <= ratio <= factor}

    def rank_correlation(self) -> float | None:
        """Return Spearman's rank correlation of predicted and measured errors; None for fewer than three pairs."""
        from scipy.stats import spearmanr

        both = self.both.values()
        if len(both) < 3:
            return None
        return float(spearmanr([expected for expected, _ in both], [total for _, total in both]).statistic)

    def filled(self) -> Sensitivity:
        """Return the table with all errors."""
        zero = (0.0,) * len(self.table.buckets)
        usual = self.usual_ratios()
        errors = {(n, label): self._errors(n, label, usual) for n, forms in self.forms.items() for label in forms}
        known = {pair: _means(samples) for pair, samples in errors.items() if samples}
        spread = {
            pair: _standard_errors(samples) for pair, samples in errors.items() if samples and len(samples[0]) > 1
        }
        apart: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
        for name, scheme in self.pairs:
            if self.table.basis_of(name, scheme):
                continue
            labels = {form: (name, label) for label, form in self.forms[name].items()}
            parts = {part: Form(each) for part, each in parts_of(self.table.schemes[name][scheme]).items()}
            if all(form.scheme == FLOAT or labels.get(form) in known for form in parts.values()):
                apart.setdefault(name, {})[scheme] = {
                    part: zero if form.scheme == FLOAT else known[labels[form]] for part, form in parts.items()
                }
        return replace(
            self.table,
            error={n: {s: known.get((n, s), zero) for s in by} for n, by in self.table.schemes.items()},
            stderr=self._by_layer({pair: spread[pair] for pair in self.pairs if pair in spread}),
            screened=self._by_layer({(n, s): _means(self.predicted[n][s]) for n, s in self.pairs if self.predicted}),
            measured={
                n: tuple(s for s in by if s in self.measured[MSE].get(n, {})) for n, by in self.table.schemes.items()
            },
            apart=apart,
            metrics={self.table.groups[name]: tuple(by)[-1] for name, by in self.metrics.items()},
            ranked=self._by_layer(
                {
                    (n, s): _means(self.measured[metric][n][s])
                    for n, s in self.pairs
                    for metric in self.metrics[n]
                    if metric != MSE
                }
            ),
            rank_correlation=self.rank_correlation(),
        )

    def _errors(self, name: str, label: str, usual: Mapping[str, float]) -> list[list[float]]:
        """Return measured errors, or predicted ones times the scheme's usual ratio; empty if there are neither."""
        measured = self.measured[MSE].get(name, {})
        if label in measured or not self.predicted:
            return measured.get(label, [])
        ratio = usual.get(label.partition(":")[0], 1.0)
        return [[ratio * error for error in samples] for samples in self.predicted[name][label]]

    def _total(self, errors: Sequence[Sequence[float]]) -> float:
        return sum(w * mean(samples) for w, samples in zip(self.table.weights, errors, strict=True))

    @staticmethod
    def _by_layer(values: Mapping[Pair, tuple[float, ...]]) -> Table:
        table: Table = {}
        for (name, label), value in values.items():
            table.setdefault(name, {})[label] = value
        return table


def _means(errors: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(mean(samples) for samples in errors)


def _standard_errors(errors: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(stdev(samples) / len(samples) ** 0.5 for samples in errors)
