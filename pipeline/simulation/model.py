"""Replace the layers of a model by layers that compute as the deployed graph does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from intaglio.pipeline.formats.layer_tables import NO_TABLES
from intaglio.pipeline.formats.schemes import FLOAT, RoundedWeight
from intaglio.pipeline.model.layer_types import LayerModule
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import rounding
from intaglio.pipeline.simulation.layer import QuantizedLayer, places_of
from intaglio.pipeline.simulation.weight import WeightRounding

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
    from intaglio.pipeline.formats.layer_tables import LayerTables
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.low_rank import Branch


@contextlib.contextmanager
def full_precision(layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """Compute these layers in full precision inside the context, so that a teacher needs no second model."""
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
    tables: Mapping[str, LayerTables] = MappingProxyType({}),
    balances: Mapping[str, Balance] = MappingProxyType({}),
    branches: Mapping[str, Branch] = MappingProxyType({}),
) -> dict[str, QuantizedLayer]:
    """Put a QuantizedLayer in the place of every layer that does not stay in float. Changes `model`.

    All mappings are by layer name. `tables` are those of `Trajectory.tables`, `balances` the bases of the layers that
    are balanced, `branches` the parts of weights that stay in float. Returns the new layers by name.
    """

    def make(name: str, layer: LayerModule) -> QuantizedLayer:
        balance, branch = balances.get(name), branches.get(name)
        return QuantizedLayer(layer, schemes[name], clock, tables.get(name, NO_TABLES), balance=balance, branch=branch)

    return _replace_layers(model, sorted(name for name in schemes if schemes[name] != FLOAT), make)


def simulate(model: nn.Module, quantized: Quantized) -> StepClock:
    """Turn `model` into what the deployed graph computes, from integer codes and scales alone. Changes `model`.

    Tables of embeddings are rounded to float16, in which the graph keeps them.
    Returns the clock, whose step is set around each call: `with clock.at(step):`, or `clocked`.
    """
    clock = StepClock(quantized.timesteps)
    _replace_layers(
        model, sorted(quantized.layers), lambda name, layer: _from_integers(layer, quantized.layers[name], clock)
    )
    round_tables(model)
    return clock


def _from_integers(layer: LayerModule, data: QuantizedLayerData, clock: StepClock) -> QuantizedLayer:
    """Return the layer that computes with these codes. Changes `layer`, whose float weight is freed."""
    grid = WeightRounding(data.scheme.weight, data.balance, data.branch)
    if isinstance(data.scheme.weight, RoundedWeight):
        grid.set_scales(data.scale_NG, data.group_NG)
    made = QuantizedLayer(layer, data.scheme, clock, data.tables, balance=data.balance, branch=data.branch, weight=grid)
    if isinstance(data.scheme.weight, RoundedWeight):
        made.set_codes(data.codes)
    return made


def _replace_layers(
    model: nn.Module, names: Iterable[str], make: Callable[[str, LayerModule], QuantizedLayer]
) -> dict[str, QuantizedLayer]:
    """Replace each of these layers by the result of `make`, wherever it is registered. Changes `model`."""
    replaced: dict[str, QuantizedLayer] = {}
    places = places_of(model)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, LayerModule):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: only Linear, Conv1d, Conv2d and Conv3d can be quantized"
            )
        replaced[name] = make(name, layer)
        for parent, child in places[layer]:
            setattr(parent, child, replaced[name])
    return replaced


def round_tables(model: nn.Module) -> None:
    """Round tables of embeddings as graphs keep them, to float16 where that holds them. Changes `model`."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(rounding.half_table(module.weight).float(), requires_grad=False)
