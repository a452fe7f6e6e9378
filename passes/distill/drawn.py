"""Draw samples with the quantized model, to choose the trained state whose samples are nearest to full precision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.calls import clocked
from intaglio.pipeline.simulation.model import full_precision
from intaglio.pipeline.simulation.references import CHOICE, draw_starts, full_precision_samples, shared_starts

if TYPE_CHECKING:
    from intaglio.passes.distill.objective import Task


class DrawnSamples:
    """Compares samples of the quantized model with those that full precision drew from the same starts.

    No update is trained on the starts, which are those of `assign`. Every process draws its share; with more processes
    than samples, some draw nothing.
    """

    def __init__(self, task: Task) -> None:
        """Draw the samples of full precision, once."""
        sampler, ctx, count = task.sampler, task.ctx, task.options.drawn
        self.task = task
        self._denoise = clocked(task.denoise, task.clock, sampler.names.timestep)
        self._own = list(shared_starts(draw_starts(sampler, count, ctx, CHOICE), ctx.processes.share(count)))
        with full_precision(task.layers.values()):
            self._reference = [full_precision_samples(sampler, self._denoise, part, ctx) for part in self._own]

    def error(self) -> float:
        """Return the mean squared error of the samples that the layers draw as they are now; infinite for NaN."""
        sums = torch.zeros(2, dtype=torch.float64)
        for part, reference in zip(self._own, self._reference, strict=True):
            samples = self.task.sampler.sample(self._denoise, part)
            sums += torch.tensor([float((samples - reference).double().square().sum()), float(samples.numel())])
        for layer in self.task.layers.values():
            layer.cache.clear()  # training will change the weights
        self.task.ctx.processes.add([sums])
        mse = float(sums[0] / sums[1])
        return mse if math.isfinite(mse) else math.inf
