"""Draw samples with a scheduler: call the denoiser along a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.call_rows import CallRows, Start
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.form_search import formed
from intaglio.pipeline.model.scheduler import (
    SeededScheduler,
    check_scheduler,
    find_stepping,
    scheduled,
    set_schedule,
    timesteps,
)
from intaglio.pipeline.model.types import Denoise, Inputs

SMALL = 1e-2
"""Standard deviation of the change that `influence` makes to an output: samples respond to it linearly."""


SAME_TIMESTEP = 1e-3
"""Distance up to which recorded timesteps are those of the schedule, relative to the largest."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser on the way from noise to sample: its step, its inputs and its output (R rows)."""

    step: int
    inputs: Inputs
    output: torch.Tensor


class Sampler(CallRows):
    """Runs a model's scheduler around any implementation of its denoiser: torch, simulated or deployed.

    It is deterministic: the same start and the same `denoise` give the same samples, even if the scheduler adds noise
    (`SeededScheduler`). The model's own scheduler is never stepped. Without null rows there is no guidance.
    """

    def __init__(self, model: DenoiserModel, steps: int, guidance: float) -> None:
        check_scheduler(model.scheduler)
        super().__init__(formed(model, steps), guidance)
        model, self.steps = self.model, steps
        self._variance = model.form is not None and model.form.variance
        self._ready = scheduled(model.scheduler, steps, model.schedule)
        set_schedule(model.scheduler, steps, model.schedule)
        like = torch.randn(1, *model.state_shape, generator=torch.Generator().manual_seed(0))
        self._stepping = find_stepping(self._ready, like, steps)
        self._own = self._own_steps()
        self.timesteps = tuple(float(self._timestep(t)) for t in timesteps(self._ready)[self._own])

    @property
    def first_timestep(self) -> torch.Tensor:
        """The scheduler's first timestep, a scalar."""
        return timesteps(self._ready)[0]

    def _own_steps(self) -> slice:
        """Return the positions of the model's own timesteps in the schedule.

        Raises RecipeError if they are no steps of this schedule.
        """
        schedule = [float(t) for t in timesteps(self._ready)[: self._stepping.count]]
        if not (own := self.model.times):
            return slice(len(schedule))
        near = SAME_TIMESTEP * max(schedule)
        first = next((at for at, t in enumerate(schedule) if abs(t - own[0]) <= near), len(schedule))
        found = schedule[first : first + len(own)]
        if len(found) < len(own) or any(abs(a - b) > near for a, b in zip(found, own, strict=True)):
            shown = ", ".join(f"{t:g}" for t in own[:3]) + (", ..." if len(own) > 3 else "")
            raise RecipeError(
                f"model: its conditions were recorded at {len(own)} timesteps ({shown}) that are no steps of"
                f" sampling_steps: {self.steps}: record with num_inference_steps={self.steps}"
            )
        return slice(first, first + len(own))

    def state(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of samples or outputs (R, ...) that the scheduler moves: all of it unless more is joined."""
        part = self._part
        return x if part is None or x.shape[part.axis + 1] == part.size else part.of(x)

    def _read(self, output: torch.Tensor) -> torch.Tensor:
        """Return the part of outputs (R, ...) that the scheduler reads."""
        read = self.model.read(output)
        read = read if self._variance else self.state(read)
        return read if self.model.output_scale == 1.0 else read * self.model.output_scale

    @property
    def rows_per_sample(self) -> int:
        """Number of rows in a call for each sample: 2 with guidance, else 1."""
        return 1 if self.guidance == 1.0 else 2

    def rows_of(self, samples: Sequence[int], count: int) -> list[int]:
        """Return the positions of these samples, out of `count`, among the rows of a call."""
        return [sample + part * count for part in range(self.rows_per_sample) for sample in samples]

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """Return e = e_null + w (e_cond - e_null): (R, ...) -> (B, ...) (Ho and Salimans 2022, Eq. 6)."""
        if self.guidance == 1.0:
            return output
        cond, null = output.chunk(2)
        guided = null + self.guidance * (cond - null)
        if self._variance:  # only the noise is guided, as in diffusers
            channels = self.model.state_shape[0]
            guided = torch.cat([guided[:, :channels], cond[:, channels:]], 1)
        return guided

    def with_state(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return samples (R, ...) that have what the scheduler moves from `other` (R, ...), and the rest from x."""
        part = self._part
        return other if part is None else part.joined(part.of(other), part.rest(x))

    @torch.no_grad()
    def drive(self, denoise: Denoise, start: Start) -> Iterator[Call | torch.Tensor]:
        """Yield every call, and last the samples (B, ...)."""
        yield from self.followed(denoise, start)

    def followed(self, denoise: Denoise, start: Start) -> Iterator[Call | torch.Tensor]:
        """Drive as `drive` does, with gradients of the samples where torch records them."""
        scheduler = self._scheduler(start.noise)
        x = start.noise * scheduler.first_scale if self.model.start is None else start.noise
        for step, t in enumerate(scheduler.timesteps):
            inputs = self.rows(scheduler.scaled(x, t), t, start)
            output = denoise(inputs)
            yield Call(step, inputs, output)
            x = scheduler.step(self._read(self.guided(output)), t, x)
        yield x

    def _scheduler(self, noise: torch.Tensor) -> SeededScheduler:
        """Return the model's scheduler at its first step, for samples that begin with this noise (B, ...)."""
        fresh = scheduled(self.model.scheduler, self.steps, self.model.schedule)
        return SeededScheduler(fresh, noise, self._stepping, self._own)

    @torch.no_grad()
    def influence(self, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[float]:
        """Return the sensitivity of the final samples to a small change of the output, one number for each step.

        `x` (B, ...) is the start of the trajectories, or the samples of their first call; `outputs` (B, ...) are the
        denoiser's outputs at each step. The denoiser is not called, so changes of later outputs are left out. For DDIM
        the result is the step's |d sigma|.
        """
        x, outputs = self.state(x), [self._read(output) for output in outputs]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        if self._variance:  # it is not changed
            noise = torch.cat([noise, torch.zeros_like(noise)], 1)

        def end(changed: int | None) -> torch.Tensor:
            scheduler, at = self._scheduler(x), x
            for step, (t, output) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
                at = scheduler.step(output + SMALL * noise if step == changed else output, t, at)
            return at

        there = end(None)
        return [float((end(step) - there).norm() / (SMALL * noise).norm()) for step in range(len(outputs))]

    def sample(self, denoise: Denoise, start: Start) -> torch.Tensor:
        """Return the samples (B, ...) at the end of the trajectories."""
        *_, samples = self.drive(denoise, start)
        assert isinstance(samples, torch.Tensor)  # `drive` ends with the samples
        return samples


class OneCall:
    """Scheduler of a model that is called once, such as a decoder: its output is the sample."""

    timesteps = torch.zeros(1)

    @dataclass(frozen=True)
    class Output:
        """Return value of `step`, as in diffusers."""

        prev_sample: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, **schedule: float) -> None:
        """Do nothing: there is one timestep for any number of steps."""

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Output:
        """Return the model's output as the sample."""
        return self.Output(model_output)
