"""Draw samples with a scheduler: call the denoiser along a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.call_form import formed
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.scheduler import (
    SeededScheduler,
    check_scheduler,
    find_stepping,
    scheduled,
    set_schedule,
    timesteps,
)
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.model.types import Denoise, Inputs

SMALL = 1e-2
"""Standard deviation of the change that `influence` makes to an output: samples respond to it linearly."""


SAME_TIMESTEP = 1e-3
"""Distance up to which recorded timesteps are those of the schedule, relative to the largest."""

CLASS_LABELS = "class_labels"
"""Name of the condition of a class-conditional model."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser on the way from noise to sample: its step, its inputs and its output (R rows)."""

    step: int
    inputs: Inputs
    output: torch.Tensor


@dataclass(frozen=True)
class Start:
    """Start of trajectories: noise (B, ...), drawn conditions (B, ...) by name, and the null rows for guidance.

    The noise has the shape of what the scheduler moves; a condition with the sample's name is joined to it.
    """

    noise: torch.Tensor
    conditions: Inputs
    null: Inputs

    def part(self, samples: slice) -> Start:
        """Return some of the trajectories."""
        conditions, null = ({n: rows[samples] for n, rows in each.items()} for each in (self.conditions, self.null))
        return Start(self.noise[samples], conditions, null)


class Sampler:
    """Runs a model's scheduler around any implementation of its denoiser: torch, simulated or deployed.

    It is deterministic: the same start and the same `denoise` give the same samples, even if the scheduler adds noise
    (`SeededScheduler`). The model's own scheduler is never stepped. Without null rows there is no guidance.
    """

    def __init__(self, model: DenoiserModel, steps: int, guidance: float) -> None:
        check_scheduler(model.scheduler)
        self.model, self.steps = formed(model, steps), steps
        model = self.model
        self.names = model.names
        self._part = None if model.form is None else model.form.part
        self._variance = model.form is not None and model.form.variance
        self._conditions, self._null = model.conditions, model.null
        if model.classes is not None and not model.conditions:
            self._conditions = {CLASS_LABELS: torch.arange(model.classes)}
            self._null = {CLASS_LABELS: torch.tensor([model.classes])}
        self.guidance = guidance if self._null else 1.0
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

    def _timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Return the scheduler's timestep in the denoiser's scale."""
        model = self.model
        if model.form is not None and model.form.float_timestep:
            t = t.float()
        t = t if model.timestep_scale == 1.0 else t * model.timestep_scale
        return t + model.timestep_offset if model.timestep_offset else t

    @property
    def condition_rows(self) -> int:
        """Number of rows of conditions to draw from: classes or recorded rows; 0 without conditions."""
        recorded = self.model.start
        return len(next(iter(self._conditions.values()), () if recorded is None else recorded))

    def start(self, batch: int, generator: torch.Generator, rows: Sequence[int] = ()) -> Start:
        """Draw noise and conditions for `batch` samples: random rows, or the given `rows` in turn.

        A denoiser that begins with recorded samples gets those of the same rows in place of noise.
        """
        noise = torch.randn(batch, *self.model.state_shape, generator=generator)
        conditions, null = {}, {}
        if self.condition_rows:
            if rows:
                drawn = torch.tensor(rows)[torch.arange(batch) % len(rows)]
            else:
                drawn = torch.randint(self.condition_rows, (batch,), generator=generator)
            conditions = {name: table[drawn] for name, table in self._conditions.items()}
            null = {name: table[drawn if len(table) > 1 else drawn * 0] for name, table in self._null.items()}
            noise = noise if self.model.start is None else self.model.start[drawn].reshape(noise.shape)
        if self._part is not None and self.names.sample not in conditions:
            shape = self._part.rest_shape(self.model.sample_shape)
            conditions[self.names.sample] = torch.randn(batch, *shape, generator=generator)
        return Start(noise, conditions, null)

    def rows(self, x: torch.Tensor, t: torch.Tensor, start: Start) -> dict[str, torch.Tensor]:
        """Return the inputs of one call for samples x (B, ...) at the scheduler's timestep t (a scalar)."""
        inputs = {self.names.sample: x}
        if self.names.timestep is not None:
            inputs[self.names.timestep] = self._timestep(t).reshape(1).expand(len(x))
        conditions = {name: self._now(name, value, t) for name, value in start.conditions.items()}
        rest = conditions.pop(self.names.sample, None)
        factors = conditions.pop(self.names.timestep or "", None)
        if self.names.timestep is not None and factors is not None:
            inputs[self.names.timestep] = timesteps_of(inputs[self.names.timestep], factors)
        inputs |= conditions
        if self.guidance != 1.0:
            null = {name: self._now(name, value, t) for name, value in start.null.items()}
            null_rest = null.pop(self.names.sample, rest)
            null.pop(self.names.timestep or "", None)
            inputs = {name: torch.cat([value, null.get(name, value)]) for name, value in inputs.items()}
            rest = rest if rest is None or null_rest is None else torch.cat([rest, null_rest])
        if self._part is not None and rest is not None:
            inputs[self.names.sample] = self._part.joined(inputs[self.names.sample], rest)
        return inputs | dict(self.model.shared)

    def _now(self, name: str, rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return a condition (B, ...) at the scheduler's timestep t, from (B, T, ...) if it differs between steps."""
        if name not in self.model.steps:
            return rows
        return rows[:, StepClock(self.model.steps[name]).index(float(self._timestep(t)))]

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


def timesteps_of(t: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return one timestep for each frame or token, (R, ...), from those of the rows (R,) and their factors (R, ...)."""
    return (t.reshape(-1, *[1] * (factors.ndim - 1)) * factors).to(t.dtype)


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
