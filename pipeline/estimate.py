"""What a run will cost, before it ever ran: one call of the denoiser is timed, and passes say how many they make."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.pipeline.checkpoint import Checkpoint

ROWS = 8


@dataclass(frozen=True)
class ModelCost:
    """What estimates start from. A row is one sample in one call of the denoiser; guidance takes two for a sample."""

    layers: int
    steps: int
    rows_per_sample: int
    seconds_per_row: float


def measure_cost(checkpoint: Checkpoint) -> ModelCost:
    """Time the second of two calls of eight rows, on this machine and as busy as it is now."""
    import torch

    from intaglio.pipeline.checkpoint import layer_table
    from intaglio.pipeline.denoiser import Sampler, check_inputs, denoise_with

    model = checkpoint.open()
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    check_inputs(sampler)
    rows_per_sample = 1 if sampler.guidance == 1.0 else 2
    start = sampler.start(ROWS // rows_per_sample, torch.Generator().manual_seed(0))
    inputs = sampler.rows(start.noise, model.scheduler.timesteps[0], start)
    denoise = denoise_with(model.module, model)
    with torch.no_grad():
        denoise(inputs)
        began = time.perf_counter()
        denoise(inputs)
    seconds = (time.perf_counter() - began) / ROWS
    return ModelCost(len(layer_table(model.module)), len(sampler.timesteps), rows_per_sample, seconds)
