"""Calls a denoiser: drives its sampler, with guidance, and hands every call to whoever listens.

Shapes: B samples, R = rows of one call (B, or 2 B with guidance: conditional rows first, then null rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from intaglio.pipeline.checkpoint import Factory, input_names

if TYPE_CHECKING:
    from torch import nn

Inputs = Mapping[str, torch.Tensor]
Denoise = Callable[[Inputs], torch.Tensor]
"""Takes the inputs of one call by name, each with R rows; returns the prediction, as many channels as the sample."""


class Scheduler(Protocol):
    """What is used of a diffusers scheduler."""

    init_noise_sigma: float | torch.Tensor
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor: ...
    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any: ...


@dataclass(frozen=True)
class Call:
    """One call of the denoiser on the way from noise to sample: its step, its inputs (R rows each) and its output."""

    step: int
    inputs: Inputs
    output: torch.Tensor


@dataclass(frozen=True)
class Start:
    """Where trajectories begin: noise (B, ...) and, for a class-conditional model, labels (B,)."""

    noise: torch.Tensor
    labels: torch.Tensor | None


class Sampler:
    """Runs a model's scheduler around any implementation of its denoiser: torch, simulated or deployed.

    Deterministic: the same start and the same `denoise` give the same samples.
    """

    def __init__(self, model: Factory, steps: int, guidance: float) -> None:
        self.model, self.steps = model, steps
        self.sample_name, self.timestep_name, labels = input_names(model.module)
        self.label_name = labels if model.classes is not None else None
        self.guidance = guidance if self.label_name else 1.0
        self.model.scheduler.set_timesteps(steps)
        self.timesteps = tuple(float(t) for t in self.model.scheduler.timesteps)

    def start(self, batch: int, generator: torch.Generator) -> Start:
        """Noise and random classes for `batch` samples."""
        noise = torch.randn(batch, *self.model.sample_shape, generator=generator)
        if self.label_name is None or self.model.classes is None:
            return Start(noise, None)
        return Start(noise, torch.randint(self.model.classes, (batch,), generator=generator))

    def rows(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The inputs of one call for samples x (B, ...) at timestep t (a scalar)."""
        inputs = {self.sample_name: x, self.timestep_name: t.reshape(1).expand(len(x))}
        if self.label_name is not None and labels is not None and self.model.classes is not None:
            inputs[self.label_name] = labels
        if self.guidance == 1.0:
            return inputs
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        if self.label_name is not None and labels is not None:
            doubled[self.label_name] = torch.cat([labels, torch.full_like(labels, self.model.classes or 0)])
        return doubled

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """e = e_null + w (e_cond - e_null): (R, ...) -> (B, ...) (Ho and Salimans 2022, Eq. 6)."""
        if self.guidance == 1.0:
            return output
        cond, null = output.chunk(2)
        return null + self.guidance * (cond - null)

    @torch.no_grad()
    def drive(self, denoise: Denoise, start: Start) -> Iterator[Call | torch.Tensor]:
        """Yield every call, and last the samples (B, ...)."""
        scheduler = self.model.scheduler
        scheduler.set_timesteps(self.steps)
        x = start.noise * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps):
            inputs = self.rows(scheduler.scale_model_input(x, t), t, start.labels)
            output = denoise(inputs)
            yield Call(step, inputs, output)
            x = scheduler.step(self.guided(output), t, x).prev_sample
        yield x

    def sample(self, denoise: Denoise, start: Start) -> torch.Tensor:
        """Samples (B, ...)."""
        *_, samples = self.drive(denoise, start)
        assert isinstance(samples, torch.Tensor)  # `drive` ends with the samples
        return samples


def denoise_with(module: nn.Module, model: Factory) -> Denoise:
    """The denoiser as a function of named inputs; a learned variance (extra output channels) is cut off."""
    channels = model.sample_shape[0]

    def denoise(inputs: Inputs) -> torch.Tensor:
        output = module(**inputs)
        if isinstance(output, tuple):
            output = output[0]
        elif not isinstance(output, torch.Tensor):
            output = output.sample
        kept: torch.Tensor = output[:, :channels]
        return kept

    return denoise
