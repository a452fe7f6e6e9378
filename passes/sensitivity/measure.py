"""Measure the error of the denoiser's output when a single layer is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator

from intaglio.passes.sensitivity.estimates import MSE
from intaglio.passes.sensitivity.forms import BasisName, Form, forms_of, parts_of
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.entry_points import METRICS as METRICS_GROUP
from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.formats.known import USUAL_SCHEMES, SchemeName, known_schemes
from intaglio.pipeline.formats.layer import GROUPS, Layer, structural_schemes
from intaglio.pipeline.formats.schemes import FEW_BITS, FLOAT
from intaglio.pipeline.formats.target import OpKind, schemes_of_kind
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    from torch import nn

    from intaglio.passes.sensitivity.drift import Drawn
    from intaglio.passes.sensitivity.estimates import Estimates, Pair
    from intaglio.passes.sensitivity.rounded import Bases, RoundedLayers
    from intaglio.passes.sensitivity.study import Study
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.metric import Metric
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise

DRAWN = 0.05
"""Share of layers, measured on emoji-dit, for which samples are drawn in a 4-bit scheme.

Only the time estimate uses it."""
Group = Literal["visual", "content", "temporal"]
METRICS: Mapping[Group, str] = {"visual": MSE, "content": "condition-swap", "temporal": "temporal"}


Schemes: TypeAlias = "Mapping[str, dict[str, LayerScheme]]"
"""Schemes of each layer, by the layer's and the scheme's name."""
Forms: TypeAlias = "Mapping[str, dict[str, Form]]"
"""Forms of each layer, by the layer's name and the form's label; float is among them."""
_Predicted: TypeAlias = tuple[dict[str, dict[str, float]], list[float]]
"""Two predictions, both empty if not known.

The first is the squared error of the samples with one layer rounded at every step, by layer and label. The second is,
for each call, the squared error of the samples divided by the relative squared error of the call's output."""


class MeasureSensitivity(Pass):
    """Measure the relative squared error of the output for each layer, scheme and part of the trajectory.

    A few backward passes on recorded inputs predict this error for all layers at once. Then some layers are rounded,
    one at a time, and the model is computed again from the rounded layer on. If the two estimates of a layer disagree,
    its other schemes are measured too. Backward passes through whole trajectories predict the error of the samples. If
    a layer's predicted error is large, samples are drawn with only this layer rounded.

    Every scheme is predicted without a basis, and in each of `bases` that reduces the error; `assign` chooses between
    them. If the step follows a plan with balanced layers, these layers are rounded in the plan's bases only.
    """

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 13
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY})
    random: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "scipy")
    efforts = tuple(
        {"rows": 2, "buckets": buckets, "samples": samples, "drift_samples": 4}
        for buckets, samples in ((3, 8), (3, 8), (2, 4), (1, 2))
    )

    buckets: int = Field(3, ge=1, description="parts of the trajectory that are measured separately")
    rows: int = Field(4, ge=1, description="rows of a recorded call that are used")
    schemes: tuple[SchemeName, ...] | Mapping[OpKind, tuple[SchemeName, ...]] = Field(
        USUAL_SCHEMES,
        description="names of the schemes to measure, one list or one for each kind of layer; schemes that a layer's"
        " shape does not admit are skipped; the time grows with their number",
    )
    bases: tuple[BasisName, ...] = Field(
        ("scaled",),
        description="other bases in which all schemes are measured: scaled (a factor for each input channel), rotated"
        " (blocks of channels are rotated too); each takes as long as the schemes",
    )
    probes: int = Field(
        1,
        ge=0,
        description="backward passes per row that predict output errors for all layers at once; 0: no prediction, each"
        " layer is rounded alone",
    )
    samples: int = Field(
        8,
        ge=0,
        description="number of samples whose error is predicted, for all layers at once; each takes one backward pass"
        " through its trajectory; 0: predict from the errors of outputs alone",
    )
    direct: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of layers and schemes that are rounded alone, evenly spaced in order of predicted errors",
    )
    agree: float = Field(
        3.0,
        gt=1,
        description="each ratio of measured to predicted error is compared with the median ratio of its scheme; if they"
        " differ by more than this factor, all schemes of the layer are measured",
    )
    apart: Literal["no", "screened", "measured"] = Field(
        "no",
        description="how to find the errors of the weight alone and of the input alone: no (not at all), screened"
        " (predicted), measured (at three times the cost)",
    )
    metrics: Mapping[Group, str] = Field(
        METRICS,
        description="metric that ranks the layers of each group: content (layers that read conditions alone), temporal"
        " (layers that read tokens along frames), visual (all others). Metrics are mse, structure, edges,"
        " condition-swap, temporal, and those of plug-ins. If a metric does not apply to the model's outputs, mse is"
        " used. If the metric is not mse, all layers of the group are measured",
    )
    frame_axis: int = Field(2, ge=1, le=2, description="axis of the frames in samples of five axes")
    drift_below_db: float = Field(
        20,
        description="layers whose predicted PSNR of the samples is below this are measured on whole trajectories; 20 dB"
        " more if samples is 0, or if the sampler gives no gradient",
    )
    drift_samples: int = Field(4, ge=1, description="samples that are drawn to measure a layer on whole trajectories")
    groups: tuple[int, ...] = Field(GROUPS, description="group sizes of 4-bit weights, the preferred first")

    @field_validator("metrics")
    @classmethod
    def _every_group(cls, metrics: Mapping[Group, str]) -> Mapping[Group, str]:
        return {**METRICS, **metrics}

    def plugins(self) -> Iterable[tuple[str, str]]:
        """Return the entry points of the metrics."""
        return [(METRICS_GROUP, name) for name in self.metrics.values()]

    def check(self, target: Target) -> None:
        """Check the names of the metrics. Raises RecipeError for unknown ones."""
        from intaglio.pipeline.runs.registry import find_metric

        problems = []
        for group, name in self.metrics.items():
            try:
                find_metric(name)
            except IntaglioError as e:
                problems.append(f"sensitivity.metrics.{group}: {e}")
        if problems:
            raise RecipeError(*problems)

    def forward_rows(self, model: ModelCost) -> int:
        """Return how many rows the model computes.

        Rows are computed for predictions, for calls repeated from a layer on, and for samples of some layers in 4 bits.
        A backward pass counts as two forward passes: it computes gradients with respect to inputs and to weights.
        """
        one = model.steps * model.rows_per_sample
        whole = 0 if self.samples else (1 + self.buckets) * one * max(1, self.rows // 2)
        layer = Layer(name="", op="linear", shape=(64, 1280), bias=True)
        schemes = set(self._named(layer)) - {FLOAT.name}
        usual = structural_schemes(layer, self.groups, self._named(layer))
        every = [Form(s, basis) for basis in ("", *self.bases) for s in usual]
        forms = forms_of({form.label: form for form in every}, parts=self.apart != "no")
        measured = len(forms if self.apart == "measured" else schemes) * model.layers
        share = self.direct if self.probes else 1.0
        screening = (1 + 2 * self.probes) if self.probes else 0  # gradients with respect to inputs and to weights
        # 2 calls are added: one of the whole model, and one that records all blocks
        a_bucket = screening + 2 + share * measured * model.from_layer
        drawn = DRAWN * sum(known_schemes()[name].weight_bits <= FEW_BITS for name in schemes) * model.layers
        drift = (drawn + (drawn > 0)) * one * self.drift_samples
        along = (2 + 2) * one * self.samples
        found = self._rows_for_bases(model) if self.bases else 0
        return round(self.rows * (4 + self.buckets * a_bucket + model.from_units - 1) + whole + along + drift + found)

    def _rows_for_bases(self, model: ModelCost) -> int:
        """Return the rows from which bases are found; a candidate takes about four passes over the compared ones."""
        from intaglio.passes.sensitivity.bases import BALANCE, COMPARED, RANGE_ROWS

        compared = COMPARED.steps * COMPARED.rows
        candidates = 1 + len(BALANCE.exponents) * len(self.bases)
        return RANGE_ROWS * model.steps + compared * (1 + 4 * candidates)

    def holds_weights(self) -> bool:
        """Return True: rounded weights are kept between calls."""
        return True

    def run(self, state: State, ctx: Context) -> Outputs:
        """Predict the error of every pair of a layer and a scheme, and measure some of them."""
        from intaglio.passes.sensitivity.bases import find_bases
        from intaglio.passes.sensitivity.buckets import bucket_weights, split, sums
        from intaglio.passes.sensitivity.drift import Drawn, measure_drift
        from intaglio.passes.sensitivity.rounded import RoundedLayers
        from intaglio.pipeline.artifacts.sensitivity import Sensitivity
        from intaglio.pipeline.model.calls import clocked, denoise_with
        from intaglio.pipeline.model.sampler import Sampler

        checkpoint, trajectory = state[MODEL], state[TRAJECTORY]
        model = checkpoint.open()
        model.module.requires_grad_(False)
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        layers, schemes = self._layers(model.module, trajectory)
        buckets = split(len(trajectory.timesteps), self.buckets)
        denoise = denoise_with(model.module, model)
        given = state[PLAN].balances if PLAN in state else {}
        found = find_bases(() if given else self.bases, model.module, schemes, denoise, trajectory, ctx)
        bases = {"": given} if given else found.bases
        rounded, forms = RoundedLayers(model.module, trajectory, bases), _forms(schemes, found.bases)
        study, groups = self._study(ctx, sampler, denoise, rounded, forms, buckets)
        at_its_step = clocked(denoise, rounded.clock, sampler.names.timestep)
        start = sampler.start(max(self.samples, self.drift_samples), ctx.torch_rng("drift"))
        drawn = Drawn(ctx, sampler, at_its_step, start, rounded)
        errors, by_call = self._along(drawn, forms)
        rows = max(1, self.rows // 2)
        weights = sums(by_call, buckets) if by_call else bucket_weights(sampler, buckets, rows, ctx)
        empty = Sensitivity(
            buckets,
            weights,
            layers,
            {name: {label: form.scheme for label, form in by.items()} for name, by in forms.items()},
            {},
            groups=groups,
            drift_screened=errors,
            in_basis={n: named for n, by in forms.items() if (named := {k: f.basis for k, f in by.items() if f.basis})},
            same_basis=found.same,
            bases=bases,
            samples=trajectory.samples,
        )
        table = self._measured(empty, study)
        drawn = replace(drawn, start=start.part(slice(self.drift_samples)))
        return {SENSITIVITY: replace(table, drift=measure_drift(table, drawn, self.drift_below_db))}

    def _layers(self, module: nn.Module, trajectory: Trajectory) -> tuple[tuple[Layer, ...], Schemes]:
        """Return the layers that the recorded calls reach, and the schemes to measure, by layer and scheme name."""
        from intaglio.pipeline.model.layers import layer_table

        layers = tuple(layer for layer in layer_table(module) if layer.name in trajectory.amax)
        return layers, {
            layer.name: {s.name: s for s in structural_schemes(layer, self.groups, self._named(layer))}
            for layer in layers
        }

    def _named(self, layer: Layer) -> Sequence[SchemeName]:
        """Return the names of the schemes to measure for a layer of this kind."""
        return schemes_of_kind(self.schemes, layer.op)

    def _study(
        self,
        ctx: Context,
        sampler: Sampler,
        denoise: Denoise,
        rounded: RoundedLayers,
        forms: Forms,
        buckets: Sequence[tuple[int, int]],
    ) -> tuple[Study, dict[str, str]]:
        """Return the study at the middle step of each bucket, and the group of each layer."""
        from intaglio.passes.sensitivity.groups import layer_groups
        from intaglio.passes.sensitivity.study import Batch, Study

        module, trajectory = rounded.module, rounded.trajectory
        steps = [(first + past) // 2 for first, past in buckets]
        calls = Batch.of(sampler, trajectory, self.rows).changed(steps[0], ctx.torch_rng("other noise"))
        sample = calls["plain"][sampler.names.sample]
        frames = (len(sample), sample.shape[self.frame_axis]) if sample.ndim == 5 else None
        groups = layer_groups(module, denoise, calls, list(forms), frames)
        swapped = sampler.rows_per_sample == 1 and "content" in groups.values() and self.metrics["content"] != MSE
        batch = Batch.of(sampler, trajectory, self.rows, swapped=swapped)
        rounding = {name: forms_of(by, parts=self.apart != "no") for name, by in forms.items()}
        return Study(ctx, denoise, rounded, batch, steps, rounding), groups

    def _along(self, drawn: Drawn, known: Forms) -> _Predicted:
        """Predict errors of samples, with one backward pass per trajectory; empty if the sampler gives no gradient."""
        from intaglio.passes.sensitivity.screen import Screen
        from intaglio.passes.sensitivity.study import Progress, are_errors

        ctx, forms = drawn.ctx, {name: forms_of(by, parts=False) for name, by in known.items()}
        screen = Screen(drawn.rounded, drawn.denoise, forms)
        calls = len(drawn.sampler.timesteps)

        def fits(value: Any) -> bool:
            errors, weights = value
            return are_errors(errors, forms) and len(weights) == calls and all(type(each) is float for each in weights)

        progress, processes = Progress(ctx, "drift-screened", fits), ctx.processes

        def predict(sample: int) -> _Predicted:
            start = drawn.start.part(slice(sample, sample + 1))
            return screen.errors_of_samples(drawn.sampler, start, ctx.torch_rng("drift probe", sample))

        try:
            with ctx.progress("screening samples", self.samples) as advance:
                for sample in range(self.samples)[processes.index :: processes.count]:
                    progress.get(str(sample), partial(predict, sample))
                    advance(processes.count)
        except RuntimeError as e:
            ctx.log.warning(
                "this sampler gives no gradient (%s): the errors of samples are predicted from the errors of single"
                " calls",
                e,
            )
        done = progress.gathered()
        found = [done[str(sample)] for sample in range(self.samples) if str(sample) in done]
        if not found or len(found) < self.samples:
            return {}, []
        every, weights = zip(*found, strict=True)
        errors = {n: {label: fmean(each[n][label] for each in every) for label in by} for n, by in forms.items()}
        return errors, [fmean(each) for each in zip(*weights, strict=True)]

    def _measured(self, table: Sensitivity, study: Study) -> Sensitivity:
        """Return the table with output errors: predicted for all, measured for some and where predictions are off."""
        from intaglio.passes.sensitivity.estimates import Estimates

        metrics, context = self._metrics(table.groups, study), study.batch.context(self.frame_axis)
        estimates = Estimates(table, study.forms, metrics, study.screen(self.probes) if self.probes else {})
        first = self._first(estimates)
        estimates.add(study.measure(self._labels(first, study), metrics, context))
        disagreeing = estimates.disagreeing(self.agree)
        second = {(name, scheme) for name, scheme in estimates.pairs if name in disagreeing} - first
        estimates.add(study.measure(self._labels(second, study), metrics, context))
        filled = estimates.filled()
        study.ctx.log.info(
            "measured: %d of %d pairs of layer and scheme, %d of them because the prediction for another scheme of the"
            " layer was wrong%s",
            len(first | second),
            len(estimates.pairs),
            len(second),
            "" if (rank := filled.rank_correlation) is None else f"; rank correlation with predictions {rank:.3f}",
        )
        return filled

    def _metrics(self, groups: Mapping[str, str], study: Study) -> dict[str, dict[str, Metric]]:
        """Return the metrics of each layer: the mean squared error, and the metric of its group if that applies."""
        import torch

        from intaglio.pipeline.runs.registry import find_metric

        context = study.batch.context(self.frame_axis)
        with torch.no_grad():
            reference = study.denoise(study.batch.inputs(study.steps[0]))
        found: dict[str, dict[str, Metric]] = {}
        for group, name in sorted(self.metrics.items()):
            metric = find_metric(name)
            applies = metric.applies(reference, context)
            if group in groups.values() and not applies:
                study.ctx.log.info("%s layers are ranked by %s: %s does not apply here", group, MSE, name)
            found[group] = {MSE: find_metric(MSE)} | ({name: metric} if applies else {})
        return {layer: found[group] for layer, group in groups.items()}

    def _first(self, estimates: Estimates) -> set[Pair]:
        """Choose the pairs that are always measured.

        They are all pairs without a prediction or ranked by another metric than mse, and an evenly spaced part of all
        pairs, against which predictions are checked.
        """
        expected = {pair: estimates.expected(pair) for pair in estimates.pairs}
        ordered = sorted(expected, key=lambda pair: (-expected[pair], pair))
        unknown = {pair for pair in ordered if expected[pair] == 0 or len(estimates.metrics[pair[0]]) > 1}
        count = math.ceil(self.direct * len(ordered))
        return {*(ordered[i * len(ordered) // count] for i in range(count)), *unknown}

    def _labels(self, chosen: set[Pair], study: Study) -> dict[str, list[str]]:
        """Return the labels to measure for each layer: the chosen schemes, and their parts if these are measured."""
        wanted: dict[str, list[str]] = {}
        for name, forms in study.forms.items():
            schemes = [scheme for scheme in forms if (name, scheme) in chosen]
            measured = [forms[s] for s in schemes if self.apart == "measured" and not forms[s].basis]
            parts = [Form(part) for form in measured for part in parts_of(form.scheme).values()]
            if labels := [label for label, form in forms.items() if label in schemes or form in parts]:
                wanted[name] = labels
        return wanted


def _forms(schemes: Schemes, bases: Bases) -> dict[str, dict[str, Form]]:
    """Return every scheme of a layer in the basis that the layer has, and in the others, where float is left out."""
    found = {}
    for name, by in schemes.items():
        others = [basis for basis, layers in bases.items() if name in layers]
        forms = [Form(scheme) for scheme in by.values()]
        forms += [Form(scheme, basis) for basis in others for scheme in by.values() if scheme != FLOAT]
        found[name] = {form.label: form for form in forms}
    return found
