"""Predict or measure how each layer's rounding changes the output of recorded calls.

Processes share the work, and keep their results in files. Shapes: R rows of a call.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from intaglio.passes.sensitivity.replay import Replay
from intaglio.passes.sensitivity.screen import Forms, Screen
from intaglio.pipeline.contract.metric import Metric, MetricContext
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, MIB, parse_json, read_bytes
from intaglio.pipeline.model.blocks import find_units

if TYPE_CHECKING:
    from pathlib import Path

    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.context import Advance, Context
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise, Inputs

T = TypeVar("T")
MOST_PROGRESS = 512 * MIB
"""Largest size in bytes of one file of measurements."""
Errors = dict[str, dict[str, list[list[float]]]]
"""Errors by layer and label, then by bucket and sample."""


@dataclass(frozen=True)
class Batch:
    """The rows on which every layer is measured, the same ones at every step.

    With guidance, every sample has its conditional and its null row. Without guidance, it has one row or, if `swapped`,
    a second row under the condition of another sample. All first rows come before all second ones.
    """

    sampler: Sampler
    trajectory: Trajectory
    samples: tuple[int, ...]
    swapped: bool = False

    @classmethod
    def of(cls, sampler: Sampler, trajectory: Trajectory, rows: int, *, swapped: bool = False) -> Batch:
        """Choose evenly spaced samples, as many as fill the rows."""
        copies = 2 if swapped else sampler.rows_per_sample
        count = trajectory.outputs.shape[1] // sampler.rows_per_sample
        wanted = min(count, max(1, rows // copies))
        return cls(sampler, trajectory, tuple(range(0, count, count // wanted))[:wanted], swapped)

    @property
    def copies(self) -> int:
        """Number of rows of each sample."""
        return 2 if self.swapped else self.sampler.rows_per_sample

    @property
    def rows(self) -> int:
        """Number of rows in one call."""
        return self.copies * len(self.samples)

    def inputs(self, step: int) -> dict[str, torch.Tensor]:
        """Return the inputs of the call at a step."""
        count = self.trajectory.outputs.shape[1] // self.sampler.rows_per_sample
        inputs = self.trajectory.call(step, self.sampler.rows_of(self.samples, count))
        if not self.swapped:
            return inputs
        other = {name: value.roll(1, 0) for name, value in inputs.items() if name in self.trajectory.conditions}
        return {n: v if n in self.trajectory.shared else torch.cat([v, other.get(n, v)]) for n, v in inputs.items()}

    def row(self, step: int, row: int) -> dict[str, torch.Tensor]:
        """Return the inputs of one row at a step."""
        shared = self.trajectory.shared
        return {n: value if n in shared else value[[row]] for n, value in self.inputs(step).items()}

    def changed(self, step: int, generator: torch.Generator) -> dict[str, Inputs]:
        """Return the inputs of three calls by name.

        They are `plain`; `noise`, where noise replaces the samples; and `conditions`, with other conditions.
        """
        plain = self.inputs(step)
        sample = self.sampler.names.sample
        noise = self.sampler.with_state(plain[sample], torch.randn(plain[sample].shape, generator=generator))
        conditions = {name: plain[name].flip(0) for name in self.trajectory.conditions}
        return {"plain": plain, "noise": {**plain, sample: noise}, "conditions": {**plain, **conditions}}

    def context(self, frame_axis: int) -> MetricContext:
        """Return the facts that metrics may use."""
        partner = torch.arange(self.rows).roll(len(self.samples)) if self.copies == 2 else None
        return MetricContext(partner, frame_axis)

    def by_sample(self, error_R: torch.Tensor) -> list[float]:
        """Return the mean over the rows of each sample: rows of one sample are not independent measurements."""
        means: list[float] = error_R.double().reshape(self.copies, -1).mean(0).tolist()
        return means


class Progress:
    """Keeps the measurements of all processes in files, one line each, so that a resumed run does not repeat them.

    `fits` returns True for a value of these measurements; other values, and damaged lines, are measured again.
    """

    def __init__(self, ctx: Context, kind: str, fits: Callable[[Any], bool]) -> None:
        self._processes = ctx.processes
        self._file = ctx.scratch / f"{kind}.{ctx.processes.index}.jsonl"
        self._done: dict[str, Any] = {}
        for file in sorted(ctx.scratch.glob(f"{kind}.*.jsonl")):
            damaged = 0
            for line in _lines(file):
                try:
                    measured: Any = parse_json(line, source=file.name)
                    name, value = measured
                    if not isinstance(name, str) or not fits(value):
                        raise ValueError(name)
                except (RecipeError, *DAMAGE):  # the run was stopped while writing, or the line is from another run
                    damaged += 1
                else:
                    self._done[name] = value
            if damaged:
                ctx.log.warning(
                    "%s: %d lines are damaged or from another run: measuring them again", file.name, damaged
                )

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def get(self, name: str, measure: Callable[[], T]) -> T:
        """Return the value kept for `name`; without one, measure and keep it."""
        if name not in self._done:
            self._done[name] = measure()
            with self._file.open("a") as file:
                file.write("\n" + json.dumps([name, self._done[name]]) + "\n")
        found: T = self._done[name]
        return found

    def gathered(self) -> dict[str, Any]:
        """Return the values of all processes. Every process must call this."""
        parts = self._processes.gather(self._done)
        return {name: value for part in parts for name, value in part.items()}


@dataclass(frozen=True)
class Study:
    """Predicts and measures errors of a model's layers, each in some forms, at one step of every bucket."""

    ctx: Context
    denoise: Denoise
    rounded: RoundedLayers
    batch: Batch
    steps: Sequence[int]
    forms: Forms
    reuse: bool = True
    repeats: dict[str, bool] = field(default_factory=dict)
    """True, by unit, if a replayed call repeats the recorded output; tested at the first step of the unit."""

    def screen(self, probes: int) -> Errors:
        """Predict the relative squared errors of all layers and forms."""

        def fits(value: Any) -> bool:
            return type(value["energy"]) is float and are_errors(value["errors"], self.forms)

        progress = Progress(self.ctx, "screened", fits)
        screen = Screen(self.rounded, self.denoise, self.forms)
        places = list(itertools.product(range(len(self.steps)), range(self.batch.rows)))

        def predict(bucket: int, row: int) -> dict[str, object]:
            step = self.steps[bucket]
            generators = [self.ctx.torch_rng("probe", bucket, row, i) for i in range(probes)]
            with self.rounded.clock.at(step):
                predicted, output = screen.errors(self.batch.row(step, row), generators)
            return {"energy": float(output.square().sum()), "errors": predicted}

        with self.ctx.progress("screening", len(places)) as advance:
            for bucket, row in places[self.ctx.processes.index :: self.ctx.processes.count]:
                progress.get(f"{bucket}:{row}", partial(predict, bucket, row))
                advance(self.ctx.processes.count)
        done = progress.gathered()
        found: Errors = {name: {label: [] for label in forms} for name, forms in self.forms.items()}
        for bucket in range(len(self.steps)):
            rows = [done[f"{bucket}:{row}"] for row in range(self.batch.rows)]
            energy = sum(row["energy"] for row in rows) / len(rows)
            for name, forms in self.forms.items():
                for label in forms:
                    squared = torch.tensor([row["errors"][name][label] for row in rows], dtype=torch.float64)
                    found[name][label].append(self.batch.by_sample(squared / energy))
        return found

    def measure(
        self,
        wanted: Mapping[str, Sequence[str]],
        metrics: Mapping[str, Mapping[str, Metric]],
        context: MetricContext,
    ) -> dict[str, Errors]:
        """Measure the errors of these layers and labels, by metric name. Leaves the model unchanged."""
        count = len(self.batch.samples)

        def fits(value: Any) -> bool:
            return any(value.keys() == named.keys() for named in metrics.values()) and all(
                len(each) == count and all(type(error) is float for error in each) for each in value.values()
            )

        progress = Progress(self.ctx, "measured", fits)
        units = find_units(self.rounded.module)
        members = {u: [(n, k) for n in wanted if n == u or n.startswith(f"{u}.") for k in wanted[n]] for u in units}
        places = [(b, u) for b in range(len(self.steps)) for u, pairs in members.items() if pairs]
        own = places[self.ctx.processes.index :: self.ctx.processes.count]
        with self.ctx.progress("sensitivity", len(self.steps) * sum(map(len, wanted.values()))) as advance:
            for bucket, group in itertools.groupby(own, key=itemgetter(0)):
                todo = {unit: members[unit] for _, unit in group}
                with self.rounded.clock.at(self.steps[bucket]):
                    self._measure_at(bucket, todo, metrics, context, progress, advance)
        done = progress.gathered()
        found: dict[str, Errors] = {}
        for name, labels in wanted.items():
            for label, metric in itertools.product(labels, metrics[name]):
                errors = [done[_key(bucket, name, label)][metric] for bucket in range(len(self.steps))]
                found.setdefault(metric, {}).setdefault(name, {})[label] = errors
        return found

    def _measure_at(
        self,
        bucket: int,
        todo: Mapping[str, Sequence[tuple[str, str]]],
        metrics: Mapping[str, Mapping[str, Metric]],
        context: MetricContext,
        progress: Progress,
        advance: Advance,
    ) -> None:
        """Measure layers and labels, by unit, at the step of one bucket. The recorded outputs are freed at the end."""
        left = {u: [pair for pair in pairs if _key(bucket, *pair) not in progress] for u, pairs in todo.items()}
        advance(self.ctx.processes.count * (sum(map(len, todo.values())) - sum(map(len, left.values()))))
        if not any(left.values()):
            return
        inputs = self.batch.inputs(self.steps[bucket])
        replay = Replay(self.rounded.module, self.denoise, inputs, reuse=self.reuse)
        if self.reuse and bucket == 0:
            self.ctx.log.info("outputs kept to be replayed: %.1f MB", replay.whole.size_bytes / 1e6)
        for unit, pairs in left.items():
            if not pairs:
                continue
            names = [name for name, _ in pairs] if self.repeats.get(unit, True) else []
            with replay.unit(unit, names, check=unit not in self.repeats) as exact:
                if self.reuse and not exact and unit not in self.repeats:
                    why = (
                        "%s: its layers are measured with the whole model: replaying the modules before it is not exact"
                    )
                    self.ctx.log.warning(why, unit)
                self.repeats[unit] = exact
                for name, label in pairs:
                    compare = partial(self._errors, replay, name, label, metrics[name], context)
                    progress.get(_key(bucket, name, label), compare)
                    advance(self.ctx.processes.count)

    def _errors(
        self, replay: Replay, name: str, label: str, metrics: Mapping[str, Metric], context: MetricContext
    ) -> dict[str, list[float]]:
        """Return the error of each sample, by metric, with this layer rounded."""
        with self.rounded.alone(name, self.forms[name][label]):
            output = replay.call(name)
        compared = {metric: each.compare(output, replay.output, context) for metric, each in metrics.items()}
        return {metric: self.batch.by_sample(error_R) for metric, error_R in compared.items()}


def _lines(file: Path) -> list[str]:
    """Return the lines that are not empty; one invalid line for a file that cannot be read."""
    try:
        text = read_bytes(file, most=MOST_PROGRESS).decode("utf-8", errors="replace")
    except RecipeError:
        return ["unreadable"]
    return [line for line in text.split("\n") if line.strip()]


def are_errors(found: Mapping[str, Any], forms: Mapping[str, Mapping[str, object]]) -> bool:
    """Return True if `found` has one number for each layer and label of `forms`, and nothing else."""
    return found.keys() == forms.keys() and all(
        found[name].keys() == labels.keys() and all(type(each) is float for each in found[name].values())
        for name, labels in forms.items()
    )


def _key(bucket: int, name: str, label: str) -> str:
    return f"{bucket}:{name}:{label}"
