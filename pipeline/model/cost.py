"""Estimate the cost of a run before it starts: one denoiser call is counted or timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.ref import ModelRef

ROWS = 2
"""Rows of the call that is counted or timed: those of one sample with guidance, or of two samples."""


@dataclass(frozen=True)
class ModelCost:
    """Cost of one denoiser call. A row is one sample in one call; guidance needs two rows for a sample.

    `from_layer` is the share of a call's products that a layer and all later layers compute, the mean over layers;
    `from_units` is the same for the first layer of each unit (block), summed over units. An operation is a
    multiplication or an addition.
    """

    layers: int
    steps: int
    rows_per_sample: int
    seconds_per_row: float = 0.0
    from_layer: float = 1.0
    from_units: float = 0.0
    operations_per_row: float = 0.0


def measure_cost(checkpoint: Checkpoint) -> ModelCost:
    """Time the second of two calls of ROWS rows, on this machine under its present load.

    Raises RecipeError for a model that cannot be called.
    """
    import torch

    from intaglio.pipeline.model.model_files import blamed

    model = checkpoint.open()
    with blamed(checkpoint.name), torch.no_grad():
        cost, call = _counted(model, checkpoint.ref)
        began = time.perf_counter()
        call()
    return replace(cost, seconds_per_row=(time.perf_counter() - began) / ROWS)


def count_cost(model: DenoiserModel, ref: ModelRef) -> ModelCost:
    """Return the cost without the time. Works on a model without weights if no shape depends on a value.

    Raises RecipeError if the model needs an input that was not provided.
    """
    return _counted(model, ref)[0]


def _counted(model: DenoiserModel, ref: ModelRef) -> tuple[ModelCost, Callable[[], object]]:
    """Return the cost, and a function that makes one call of ROWS rows."""
    import torch

    from intaglio.pipeline.model.blocks import find_units
    from intaglio.pipeline.model.calls import check_inputs, denoise_with
    from intaglio.pipeline.model.layers import layer_table
    from intaglio.pipeline.model.sampler import Sampler

    sampler = Sampler(model, ref.sampling_steps, ref.guidance)
    check_inputs(sampler)
    rows_per_sample = 1 if sampler.guidance == 1.0 else 2
    start = sampler.start(ROWS // rows_per_sample, torch.Generator().manual_seed(0))
    device = next((parameter.device for parameter in model.module.parameters()), torch.device("cpu"))
    inputs = sampler.rows(start.noise, sampler.first_timestep, start)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    denoise = denoise_with(model.module, model)
    layers = [layer.name for layer in layer_table(model.module)]
    with torch.no_grad():
        shares, operations = _shares(model.module, layers, lambda: denoise(inputs))
    known = [shares[name] for name in layers if name in shares]
    units = (
        max((share for name, share in shares.items() if name == unit or name.startswith(f"{unit}.")), default=0.0)
        for unit in find_units(model.module)
    )
    from_layer = sum(known) / max(1, len(known))
    cost = ModelCost(
        layers=len(layers),
        steps=len(sampler.timesteps),
        rows_per_sample=rows_per_sample,
        from_layer=from_layer,
        from_units=sum(units),
        operations_per_row=operations / ROWS,
    )
    return cost, lambda: denoise(inputs)


def _shares(module: nn.Module, layers: Iterable[str], call: Callable[[], object]) -> tuple[dict[str, float], int]:
    """Return the share of the call's operations in and after each called layer, and the number of all operations."""
    from torch.utils.flop_counter import FlopCounterMode

    from intaglio.pipeline.model.hooks import before_calls

    before: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def begin(name: str, _: tuple[object, ...]) -> None:
        before.setdefault(name, counter.get_total_flops())

    with before_calls({name: module.get_submodule(name) for name in layers}, begin), counter:
        call()
    total = counter.get_total_flops()
    return {name: 1 - done / max(1, total) for name, done in before.items()}, total
