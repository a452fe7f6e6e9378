"""What a run will cost, before it ever ran: one call of the denoiser is timed, and passes say how many they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.checkpoint import Checkpoint

ROWS = 8


@dataclass(frozen=True)
class ModelCost:
    """What estimates start from. A row is one sample in one call of the denoiser; guidance takes two for a sample.

    `from_layer` is the share of a call's products from a layer on, the mean over layers; `from_units` the same from
    the first layer of each unit (block) on, summed over units.
    """

    layers: int
    steps: int
    rows_per_sample: int
    seconds_per_row: float
    from_layer: float = 1.0
    from_units: float = 0.0


def measure_cost(checkpoint: Checkpoint) -> ModelCost:
    """Time the second of two calls of eight rows, on this machine and as busy as it is now."""
    import torch

    from intaglio.pipeline.blocks import find_units
    from intaglio.pipeline.checkpoint import layer_table
    from intaglio.pipeline.denoiser import Sampler, check_inputs, denoise_with

    model = checkpoint.open()
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    check_inputs(sampler)
    rows_per_sample = 1 if sampler.guidance == 1.0 else 2
    start = sampler.start(ROWS // rows_per_sample, torch.Generator().manual_seed(0))
    inputs = sampler.rows(start.noise, model.scheduler.timesteps[0], start)
    denoise = denoise_with(model.module, model)
    layers = [layer.name for layer in layer_table(model.module)]
    with torch.no_grad():
        shares = _shares(model.module, layers, lambda: denoise(inputs))
        began = time.perf_counter()
        denoise(inputs)
    seconds = (time.perf_counter() - began) / ROWS
    known = [shares[name] for name in layers if name in shares]
    units = (
        max((share for name, share in shares.items() if name == unit or name.startswith(f"{unit}.")), default=0.0)
        for unit in find_units(model.module)
    )
    from_layer = sum(known) / max(1, len(known))
    return ModelCost(len(layers), len(sampler.timesteps), rows_per_sample, seconds, from_layer, sum(units))


def _shares(module: nn.Module, layers: Iterable[str], call: Callable[[], object]) -> dict[str, float]:
    """By layer that is called, the share of the call's products that begin with it or come after it."""
    from torch.utils.flop_counter import FlopCounterMode

    from intaglio.pipeline.hooks import before_calls

    before: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def begin(name: str, _: tuple[object, ...]) -> None:
        before.setdefault(name, counter.get_total_flops())

    with before_calls({name: module.get_submodule(name) for name in layers}, begin), counter:
        call()
    return {name: 1 - done / max(1, counter.get_total_flops()) for name, done in before.items()}
