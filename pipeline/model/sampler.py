"""Draws samples with a scheduler: the calls of a denoiser along a trajectory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.scheduler import SeededScheduler, adds_noise
from intaglio.pipeline.model.types import Denoise, Inputs

if TYPE_CHECKING:
    pass


SMALL = 1e-2
"""Standard deviation of a change that a sampler answers linearly: outputs are near 1."""


CLASS_LABELS = "class_labels"
"""The condition of a class-conditional model."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser on the way from noise to sample: its step, its inputs and its output (R rows)."""

    step: int
    inputs: Inputs
    output: torch.Tensor


@dataclass(frozen=True)
class Start:
    """Where trajectories begin: noise (B, ...), drawn conditions (B, ...) by name, and what guidance takes for them."""

    noise: torch.Tensor
    conditions: Inputs
    null: Inputs

    def part(self, samples: slice) -> Start:
        """Some of the trajectories."""
        conditions, null = ({n: rows[samples] for n, rows in each.items()} for each in (self.conditions, self.null))
        return Start(self.noise[samples], conditions, null)


class Sampler:
    """Runs a model's scheduler around any implementation of its denoiser: torch, simulated or deployed.

    Deterministic: the same start and the same `denoise` give the same samples, also where the scheduler adds noise
    (`SeededScheduler`). The model's own scheduler is never stepped. Without null rows there is no guidance.
    """

    def __init__(self, model: DenoiserModel, steps: int, guidance: float) -> None:
        self.model, self.steps = model, steps
        self.names = model.names
        self._conditions, self._null = model.conditions, model.null
        if model.classes is not None and not model.conditions:
            self._conditions = {CLASS_LABELS: torch.arange(model.classes)}
            self._null = {CLASS_LABELS: torch.tensor([model.classes])}
        self.guidance = guidance if self._null else 1.0
        self.model.scheduler.set_timesteps(steps, **model.schedule)
        self.timesteps = tuple(float(self._timestep(t)) for t in self.model.scheduler.timesteps)
        self._adds_noise: bool | None = None

    def _timestep(self, t: torch.Tensor) -> torch.Tensor:
        """As the denoiser takes it."""
        return t if self.model.timestep_scale == 1.0 else t * self.model.timestep_scale

    @property
    def condition_rows(self) -> int:
        """How many rows of conditions there are to draw from: classes, or what was recorded; 0 without conditions."""
        return len(next(iter(self._conditions.values()), ()))

    def start(self, batch: int, generator: torch.Generator, rows: Sequence[int] = ()) -> Start:
        """Noise and conditions for `batch` samples: random ones, or these rows of them in turn."""
        noise = torch.randn(batch, *self.model.sample_shape, generator=generator)
        if not self._conditions:
            return Start(noise, {}, {})
        if rows:
            drawn = torch.tensor(rows)[torch.arange(batch) % len(rows)]
        else:
            drawn = torch.randint(self.condition_rows, (batch,), generator=generator)
        conditions = {name: table[drawn] for name, table in self._conditions.items()}
        null = {name: table[drawn if len(table) > 1 else drawn * 0] for name, table in self._null.items()}
        return Start(noise, conditions, null)

    def rows(self, x: torch.Tensor, t: torch.Tensor, start: Start) -> dict[str, torch.Tensor]:
        """The inputs of one call for samples x (B, ...) at timestep t (a scalar) of the scheduler."""
        inputs = {self.names.sample: x}
        if self.names.timestep is not None:
            inputs[self.names.timestep] = self._timestep(t).reshape(1).expand(len(x))
        inputs |= start.conditions
        if self.guidance != 1.0:
            inputs = {name: torch.cat([value, start.null.get(name, value)]) for name, value in inputs.items()}
        return inputs | dict(self.model.shared)

    @property
    def rows_per_sample(self) -> int:
        """Two with guidance."""
        return 1 if self.guidance == 1.0 else 2

    def rows_of(self, samples: Sequence[int], count: int) -> list[int]:
        """Where these of `count` samples are among the rows of a call."""
        return [sample + part * count for part in range(self.rows_per_sample) for sample in samples]

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """e = e_null + w (e_cond - e_null): (R, ...) -> (B, ...) (Ho and Salimans 2022, Eq. 6)."""
        if self.guidance == 1.0:
            return output
        cond, null = output.chunk(2)
        return null + self.guidance * (cond - null)

    @torch.no_grad()
    def drive(self, denoise: Denoise, start: Start) -> Iterator[Call | torch.Tensor]:
        """Yield every call, and last the samples (B, ...)."""
        yield from self.followed(denoise, start)

    def followed(self, denoise: Denoise, start: Start) -> Iterator[Call | torch.Tensor]:
        """As `drive`, with gradients of the samples where torch records them."""
        scheduler = self._scheduler(start.noise)
        x = start.noise * scheduler.first_scale
        for step, t in enumerate(scheduler.timesteps):
            inputs = self.rows(scheduler.scaled(x, t), t, start)
            output = denoise(inputs)
            yield Call(step, inputs, output)
            x = scheduler.step(self.guided(output), t, x)
        yield x

    def _scheduler(self, noise: torch.Tensor) -> SeededScheduler:
        """The model's scheduler at its first step, for samples that begin with this noise (B, ...)."""
        fresh = copy.deepcopy(self.model.scheduler)
        fresh.set_timesteps(self.steps, **self.model.schedule)
        if self._adds_noise is None:
            self._adds_noise = adds_noise(fresh, noise[:1])
        return SeededScheduler(fresh, noise, apart=self._adds_noise)

    @torch.no_grad()
    def influence(self, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[float]:
        """How far samples move, relative to a small change of the guided output at a step: one number a step.

        `x` (B, ...) is where the trajectories begin, `outputs` (B, ...) what the denoiser gives at each step; it is not
        called, so that what the change does to later outputs is left out. Of DDIM it is the step's |d sigma|.
        """
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

        def end(changed: int | None) -> torch.Tensor:
            scheduler, at = self._scheduler(x), x
            for step, (t, output) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
                at = scheduler.step(output + SMALL * noise if step == changed else output, t, at)
            return at

        there = end(None)
        return [float((end(step) - there).norm() / (SMALL * noise).norm()) for step in range(len(outputs))]

    def sample(self, denoise: Denoise, start: Start) -> torch.Tensor:
        """Samples (B, ...)."""
        *_, samples = self.drive(denoise, start)
        assert isinstance(samples, torch.Tensor)  # `drive` ends with the samples
        return samples


class OneCall:
    """The scheduler of a model that is called once, such as a decoder: its output is the sample."""

    timesteps = torch.zeros(1)

    @dataclass(frozen=True)
    class Output:
        """What `step` returns in diffusers."""

        prev_sample: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, **schedule: float) -> None:
        """There is one, whatever is asked for."""

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Output:
        """The end."""
        return self.Output(model_output)
