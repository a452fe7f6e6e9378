"""Tell layers that have one scale for each denoising step which step a call belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class StepClock:
    """The denoising step of the call that is running, shared by all layers of a model.

    `with clock.at(step):` sets the step for the calls inside. Outside of it there is no step, so that no layer reads
    the step of an earlier call. The step is found from the timestep and never by counting calls, so split guidance,
    second-order solvers and partial trajectories work too.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self.timesteps = timesteps
        self._step: int | None = None

    @property
    def step(self) -> int:
        """Index of the step that is set. Raises RuntimeError outside of `at`."""
        if self._step is None:
            raise RuntimeError("no denoising step is set: call the quantized model inside `with clock.at(step):`")
        return self._step

    @property
    def now(self) -> int | None:
        """Index of the step that is set, None outside of `at`."""
        return self._step

    def index(self, timestep: float) -> int:
        """Return the step whose timestep is nearest."""
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))

    @contextlib.contextmanager
    def at(self, step: int | None) -> Iterator[None]:
        """Set the step, or None, for the calls inside. Raises IndexError for a step without an entry in the tables."""
        if step is not None and not 0 <= step < len(self.timesteps):
            raise IndexError(f"step {step} of {len(self.timesteps)}")
        before, self._step = self._step, step
        try:
            yield
        finally:
            self._step = before


def number(timestep: Any) -> float:
    """Return the timestep of a call: a number, or a tensor's value of the largest magnitude.

    If a denoiser takes one timestep for each frame or token, that of a frame or token which is given, not drawn, is 0.
    """
    import torch

    values = torch.as_tensor(timestep).reshape(-1)
    return float(values[values.abs().argmax()])
