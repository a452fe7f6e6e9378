"""Draw samples with the quantized model, to choose the trained state whose samples are nearest to full precision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.calls import clocked
from intaglio.pipeline.simulation.model import full_precision

if TYPE_CHECKING:
    from intaglio.passes.distill.objective import Task


class DrawnSamples:
    """Compares samples of the quantized model with those that full precision drew from the same starts.

    The starts are new: no update is trained on them. Every process draws its share; with more processes than
    samples, some draw nothing.
    """

    def __init__(self, task: Task) -> None:
        """Draw the samples of full precision, once."""
        count, processes = task.options.drawn, task.ctx.processes
        start, own = task.sampler.start(count, task.ctx.torch_rng("drawn samples")), processes.share(count)
        self.task = task
        self._own = start.part(own) if own.start < own.stop else None
        with full_precision(task.layers.values()):
            self._reference = self._draw()

    def _draw(self) -> list[torch.Tensor]:
        """Return this process's samples, (B, ...); an empty list without a share."""
        if self._own is None:
            return []
        sampler = self.task.sampler
        return [sampler.sample(clocked(self.task.denoise, self.task.clock, sampler.names.timestep), self._own)]

    def error(self) -> float:
        """Return the mean squared error of the samples that the layers draw as they are now; infinite for NaN."""
        sums = torch.zeros(2, dtype=torch.float64)
        for samples, reference in zip(self._draw(), self._reference, strict=True):
            sums += torch.tensor([float((samples - reference).double().square().sum()), float(samples.numel())])
        for layer in self.task.layers.values():
            layer.cache.clear()  # training will change the weights
        self.task.ctx.processes.add([sums])
        mse = float(sums[0] / sums[1])
        return mse if math.isfinite(mse) else math.inf
