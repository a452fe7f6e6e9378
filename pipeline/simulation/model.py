"""Puts simulated layers in the place of a model's own, and takes them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme, RoundedWeight
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.simulation.layer import QuantizedLayer, places_of

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData


@contextlib.contextmanager
def full_precision(layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """With these layers as the model has them: the teacher needs no memory of its own."""
    switched = list(layers)
    for layer in switched:
        layer.full_precision = True
    try:
        yield
    finally:
        for layer in switched:
            layer.full_precision = False


def quantize_model(
    model: nn.Module,
    schemes: Mapping[str, LayerScheme],
    clock: StepClock,
    amax: Mapping[str, torch.Tensor],
    output_amax: Mapping[str, torch.Tensor] = MappingProxyType({}),
    shift: Mapping[str, torch.Tensor] = MappingProxyType({}),
    balance: Mapping[str, Balance] = MappingProxyType({}),
    factor: Mapping[str, torch.Tensor] = MappingProxyType({}),
    branch: Mapping[str, Branch] = MappingProxyType({}),
    *,
    fit: bool = True,
) -> dict[str, QuantizedLayer]:
    """Put a QuantizedLayer in the place of every layer that does not stay in float. Changes `model`.

    `amax`, `output_amax` and `shift` hold (T,) ranges by layer name, for the layers with a scale a step, those whose
    output is rounded and those whose input is shifted; `balance` the bases of those that are balanced:
    `Trajectory.ranges`. `factor` holds what token magnitudes are multiplied by, (T,); `branch` the parts of weights
    that stay in float. `fit` is False where `set_codes` brings the weight scales. Returns the new layers by name.
    A layer that is registered in several places is replaced in all of them.
    """
    replaced = {}
    places = places_of(model)
    for name in sorted(schemes):
        if schemes[name] == FLOAT:
            continue
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"{name} is a {type(layer).__name__}: only Linear and Conv2d can be quantized")
        tables = (amax.get(name), output_amax.get(name), shift.get(name), balance.get(name), factor.get(name))
        replaced[name] = QuantizedLayer(layer, schemes[name], clock, *tables, branch.get(name), fit=fit)
        for parent, child in places[layer]:
            setattr(parent, child, replaced[name])
    return replaced


def simulate(model: nn.Module, quantized: Quantized) -> StepClock:
    """Turn `model` into what the deployed graph computes, from integer codes and scales alone. Changes `model`.

    Tables of embeddings are rounded to float16, in which the graph keeps them.
    Returns the clock that is set to a call's timestep before the call.
    """
    clock = StepClock(quantized.timesteps)

    def of_layers(part: Callable[[QuantizedLayerData], Any]) -> dict[str, Any]:
        """By layer name, of those that have it."""
        found = {name: part(data) for name, data in quantized.layers.items()}
        return {name: value for name, value in found.items() if value is not None}

    layers = quantize_model(
        model,
        of_layers(lambda data: data.scheme),
        clock,
        of_layers(lambda data: data.amax_T),
        of_layers(lambda data: data.output_amax_T),
        of_layers(lambda data: data.shift_T),
        of_layers(lambda data: data.balance),
        of_layers(lambda data: data.factor_T),
        of_layers(lambda data: data.branch),
        fit=False,
    )
    for name, layer in layers.items():
        if isinstance(layer.scheme.weight, RoundedWeight):
            data = quantized.layers[name]
            layer.set_codes(data.codes, data.scale_NG, data.group_NG)
    round_tables(model)
    return clock


def round_tables(model: nn.Module) -> None:
    """Tables of embeddings as graphs keep them, in float16 where that holds them. Changes `model`."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(affine.half_table(module.weight).float(), requires_grad=False)
