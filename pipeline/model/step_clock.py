"""Tells layers with one scale for each denoising step which step it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class StepClock:
    """The denoising step that a call belongs to, found from its timestep and shared by all layers of a model.

    Indexed by timestep and never by counting calls: split guidance, second-order solvers and partial trajectories work.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self.timesteps = timesteps
        self.step = 0

    def index(self, timestep: float) -> int:
        """The step whose timestep is nearest."""
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))

    def set(self, timestep: float) -> None:
        """Every layer that reads this clock computes at the step nearest to `timestep` from now on."""
        self.step = self.index(timestep)
