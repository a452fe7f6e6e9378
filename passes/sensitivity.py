"""Measure what each layer costs the denoiser's output when it alone is quantized."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.estimate import ModelCost
from intaglio.pipeline.keys import MODEL, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.plan import SCHEME_NAMES, USUAL_SCHEMES, structural_schemes

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.checkpoint import Factory
    from intaglio.pipeline.denoiser import Inputs, Sampler
    from intaglio.pipeline.quant.spec import LayerScheme
    from intaglio.pipeline.trajectory import Trajectory

NOISE = 0.02
"""Relative magnitude of the noise that finds what an output error does to the samples; near that of 4-bit weights."""


class MeasureSensitivity(Pass):
    """Relative squared error of the output for each layer, scheme and part of the trajectory, on recorded inputs."""

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    buckets: int = Field(5, ge=1, description="parts of the trajectory that are measured apart")
    rows: int = Field(8, ge=1, description="rows of a recorded call that are used")
    schemes: tuple[str, ...] = Field(
        USUAL_SCHEMES, description="schemes to measure, where a layer's shape admits them; every one costs as much time"
    )
    groups: tuple[int, ...] = Field((64, 32, 128), description="group sizes of 4-bit weights, the preferred first")

    @field_validator("schemes")
    @classmethod
    def _known(cls, schemes: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(schemes) - set(SCHEME_NAMES)):
            raise ValueError(f"unknown schemes {', '.join(unknown)}: there is {', '.join(SCHEME_NAMES)}")
        return schemes

    def forward_rows(self, model: ModelCost) -> int:
        """Every layer in each scheme but float, and whole trajectories for the buckets' weights."""
        whole = (1 + self.buckets) * model.steps * max(1, self.rows // 2) * model.rows_per_sample
        schemes = len(set(self.schemes) - {"float"})
        return schemes * model.layers * self.buckets * self.rows + whole

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
        progress_file = ctx.scratch / "measured.json"
        error: dict[str, dict[str, tuple[float, ...]]] = (
            json.loads(progress_file.read_text()) if progress_file.exists() else {}
        )
        with ctx.progress("sensitivity", len(layers)) as advance:
            advance(len(error))
            for layer in layers:
                if layer.name in error:
                    continue
                error[layer.name] = self._measure(model, layer.name, schemes[layer.name], trajectory, buckets)
                part = progress_file.with_suffix(".part")
                part.write_text(json.dumps(error))
                os.replace(part, progress_file)
                advance()
        error = {layer.name: {s: tuple(e) for s, e in error[layer.name].items()} for layer in layers}
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        weights = self._bucket_weights(sampler, buckets, ctx)
        return {SENSITIVITY: Sensitivity(layers, buckets, weights, schemes, error)}

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
        from intaglio.pipeline.quant.modules import StepClock, quantize_model

        clock = StepClock(trajectory.timesteps)
        denoise = denoise_with(model.module, model)
        parent, _, child = name.rpartition(".")
        original = model.module.get_submodule(name)
        rows = slice(None, None, max(1, trajectory.outputs.shape[1] // self.rows))
        measured: dict[str, tuple[float, ...]] = {}
        for scheme_name, scheme in schemes.items():
            if scheme_name == "float":
                measured[scheme_name] = (0.0,) * len(buckets)
                continue
            quantize_model(model.module, {name: scheme}, clock, *trajectory.ranges({name: scheme}))
            errors = []
            with torch.no_grad():
                for first, past in buckets:
                    step = (first + past) // 2
                    clock.step = step
                    reference = trajectory.outputs[step, rows]
                    errors.append(_relative_error(denoise(trajectory.call(step, rows)), reference))
            setattr(model.module.get_submodule(parent), child, original)
            measured[scheme_name] = tuple(errors)
        return measured


def _relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """sum (y - y_ref)^2 / sum y_ref^2"""
    return float((output - reference).square().sum() / reference.square().sum())
