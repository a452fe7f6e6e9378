"""Measure what each layer costs the denoiser's output when it alone is quantized."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field, field_validator

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.estimate import ModelCost
from intaglio.pipeline.keys import MODEL, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.plan import USUAL_SCHEMES, known_schemes, structural_schemes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.checkpoint import Factory
    from intaglio.pipeline.denoiser import Inputs, Sampler
    from intaglio.pipeline.quant.modules import StepClock
    from intaglio.pipeline.quant.spec import LayerScheme
    from intaglio.pipeline.sensitivity import Sensitivity
    from intaglio.pipeline.trajectory import Trajectory

Measured = TypeVar("Measured")

NOISE = 0.02
"""Relative magnitude of the noise that finds what an output error does to the samples; near that of 4-bit weights."""


class MeasureSensitivity(Pass):
    """Relative squared error of the output for each layer, scheme and part of the trajectory, on recorded inputs.

    It screens: where it predicts that samples change visibly, whole trajectories are drawn with that one layer rounded.
    """

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 4
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "scipy")

    buckets: int = Field(5, ge=1, description="parts of the trajectory that are measured apart")
    rows: int = Field(8, ge=1, description="rows of a recorded call that are used")
    schemes: tuple[str, ...] = Field(
        USUAL_SCHEMES, description="schemes to measure, where a layer's shape admits them; every one costs as much time"
    )
    drift_below_db: float = Field(
        50, description="a layer whose predicted PSNR of the samples is below is measured on whole trajectories"
    )
    drift_samples: int = Field(4, ge=1, description="samples drawn for each layer and scheme measured so")
    groups: tuple[int, ...] = Field((64, 32, 128), description="group sizes of 4-bit weights, the preferred first")

    @field_validator("schemes")
    @classmethod
    def _known(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        known_schemes(schemes)
        return schemes

    def forward_rows(self, model: ModelCost) -> int:
        """Every layer in each scheme but float, and whole trajectories: for the buckets' weights, and 4-bit layers."""
        one = model.steps * model.rows_per_sample
        whole = (1 + self.buckets) * one * max(1, self.rows // 2)
        schemes = set(self.schemes) - {"float"}
        drift = sum(name.startswith("w4") for name in schemes) * model.layers * one * self.drift_samples
        return len(schemes) * model.layers * self.buckets * self.rows + whole + drift

    def run(self, state: State, ctx: Context) -> Outputs:
        from intaglio.pipeline.checkpoint import layer_table
        from intaglio.pipeline.denoiser import Sampler
        from intaglio.pipeline.sensitivity import Sensitivity

        checkpoint, trajectory = state[MODEL], state[TRAJECTORY]
        model = checkpoint.open()
        layers = tuple(layer for layer in layer_table(model.module) if layer.name in trajectory.amax)
        schemes = {
            layer.name: {s.name: s for s in structural_schemes(layer, self.groups, self.schemes)} for layer in layers
        }
        count = len(trajectory.timesteps)
        edges = [round(i * count / self.buckets) for i in range(self.buckets + 1)]
        buckets = tuple((a, b) for a, b in itertools.pairwise(edges) if b > a)
        error: dict[str, dict[str, tuple[float, ...]]] = {}
        measured = _Progress(ctx.scratch / "measured.json")
        with ctx.progress("sensitivity", len(layers)) as advance:
            for layer in layers:
                errors = measured.get(
                    layer.name, partial(self._measure, model, layer.name, schemes[layer.name], trajectory, buckets)
                )
                error[layer.name] = {s: tuple(e) for s, e in errors.items()}
                advance()
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        weights = self._bucket_weights(sampler, buckets, ctx)
        screened = Sensitivity(layers, buckets, weights, schemes, error)
        return {SENSITIVITY: replace(screened, drift=self._drift(screened, sampler, trajectory, ctx))}

    def _drift(
        self, screened: Sensitivity, sampler: Sampler, trajectory: Trajectory, ctx: Context
    ) -> dict[str, dict[str, float]]:
        """Squared error of final samples, one layer rounded all the way, where it is predicted to be visible."""
        from scipy.stats import spearmanr

        from intaglio.pipeline.denoiser import clocked, denoise_with
        from intaglio.pipeline.quant.modules import StepClock

        visible = 4 / 10 ** (self.drift_below_db / 10)  # squared error of samples in [-1, 1], whose range is 2
        pairs = [
            (layer.name, scheme)
            for layer in screened.layers
            for scheme in screened.error[layer.name]
            if screened.predicted(layer.name, scheme) > visible
        ]
        model, clock = sampler.model, StepClock(trajectory.timesteps)
        start = sampler.start(self.drift_samples, ctx.torch_rng("drift"))
        denoise = clocked(denoise_with(model.module, model), clock, sampler.names.timestep)
        reference = sampler.sample(denoise, start)

        def measure(name: str, scheme: str) -> float:
            with _rounded(model.module, name, screened.schemes[name][scheme], clock, trajectory):
                return float((sampler.sample(denoise, start) - reference).square().mean())

        drift: dict[str, dict[str, float]] = {}
        measured = _Progress(ctx.scratch / "drift.json")
        with ctx.progress("drift of samples", len(pairs)) as advance:
            for name, scheme in pairs:
                found = measured.get(f"{name}:{scheme}", partial(measure, name, scheme))
                drift.setdefault(name, {})[scheme] = found
                advance()
        if len(pairs) > 2:
            predicted = [screened.predicted(*pair) for pair in pairs]
            rank = spearmanr(predicted, [drift[name][scheme] for name, scheme in pairs]).statistic
            ctx.log.info(
                "drew samples for %d layers and schemes; rank correlation with the prediction %.2f", len(pairs), rank
            )
        return drift

    def _bucket_weights(
        self, sampler: Sampler, buckets: tuple[tuple[int, int], ...], ctx: Context
    ) -> tuple[float, ...]:
        """Squared error of final samples per relative squared error of outputs, from noise put into each bucket."""
        import torch

        from intaglio.pipeline.denoiser import denoise_with

        denoise = denoise_with(sampler.model.module, sampler.model)
        start = sampler.start(max(1, self.rows // 2), ctx.torch_rng("start"))

        def draw(first: int, past: int) -> torch.Tensor:
            noise = ctx.torch_rng("noise")
            calls = itertools.count()

            def noisy(inputs: Inputs) -> torch.Tensor:
                output = denoise(inputs)
                spoilt = output + NOISE * output.square().mean().sqrt() * torch.randn(output.shape, generator=noise)
                return spoilt if first <= next(calls) < past else output

            return sampler.sample(noisy, start)

        with ctx.progress("bucket weights", 1 + len(buckets)) as advance:
            reference = draw(0, 0)
            advance()
            weights = []
            for first, past in buckets:
                weights.append(float((draw(first, past) - reference).square().mean()) / NOISE**2)
                advance()
        return tuple(weights)

    def _measure(
        self,
        model: Factory,
        name: str,
        schemes: Mapping[str, LayerScheme],
        trajectory: Trajectory,
        buckets: tuple[tuple[int, int], ...],
    ) -> dict[str, tuple[float, ...]]:
        """Errors of every scheme of one layer, in each bucket. Leaves the model as it was."""
        import torch

        from intaglio.pipeline.denoiser import denoise_with
        from intaglio.pipeline.quant.modules import StepClock

        clock = StepClock(trajectory.timesteps)
        denoise = denoise_with(model.module, model)
        rows = trajectory.some_rows(self.rows)
        measured: dict[str, tuple[float, ...]] = {}
        for scheme_name, scheme in schemes.items():
            if scheme_name == "float":
                measured[scheme_name] = (0.0,) * len(buckets)
                continue
            errors = []
            with _rounded(model.module, name, scheme, clock, trajectory), torch.no_grad():
                for first, past in buckets:
                    step = (first + past) // 2
                    clock.step = step
                    reference = trajectory.outputs[step, rows]
                    errors.append(_relative_error(denoise(trajectory.call(step, rows)), reference))
            measured[scheme_name] = tuple(errors)
        return measured


@contextlib.contextmanager
def _rounded(
    module: nn.Module, name: str, scheme: LayerScheme, clock: StepClock, trajectory: Trajectory
) -> Iterator[None]:
    """With this one layer as the scheme says."""
    from intaglio.pipeline.quant.modules import quantize_model

    parent, _, child = name.rpartition(".")
    original = module.get_submodule(name)
    quantize_model(module, {name: scheme}, clock, *trajectory.ranges({name: scheme}))
    try:
        yield
    finally:
        setattr(module.get_submodule(parent), child, original)


class _Progress:
    """What was measured so far, in a file that a stopped run finds again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """The value kept for `name`, or else measured now and kept."""
        if name not in self._done:
            self._done[name] = measure()
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(self._done))
            os.replace(part, self._file)
        found: Measured = self._done[name]
        return found


def _relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """sum (y - y_ref)^2 / sum y_ref^2"""
    return float((output - reference).square().sum() / reference.square().sum())
