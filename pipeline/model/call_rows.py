"""Make the inputs of a denoiser's calls: draw starts of trajectories, and join noise, timestep and conditions.

Shapes: B samples, R rows of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.inputs import CLASS_LABELS
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.model.types import Inputs


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


class CallRows:
    """Makes the inputs of a model's calls: rows with conditions and, with guidance, then the rows without them."""

    def __init__(self, model: DenoiserModel, guidance: float) -> None:
        self.model, self.names = model, model.names
        self._part = None if model.form is None else model.form.part
        self._conditions, self._null = model.conditions, model.null
        if model.classes is not None and not model.conditions:
            self._conditions = {CLASS_LABELS: torch.arange(model.classes)}
            self._null = {CLASS_LABELS: torch.tensor([model.classes])}
        self.guidance = guidance if self._null else 1.0

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


def timesteps_of(t: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return one timestep for each frame or token, (R, ...), from those of the rows (R,) and their factors (R, ...)."""
    return (t.reshape(-1, *[1] * (factors.ndim - 1)) * factors).to(t.dtype)
