"""Round one layer at a time, in a model that stays in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from intaglio.passes.sensitivity.forms import Form
from intaglio.pipeline.formats.layer_tables import NO_TABLES
from intaglio.pipeline.formats.schemes import Float, RoundedWeight
from intaglio.pipeline.model.layer_types import LayerModule
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.simulation.layer import QuantizedLayer, places_of
from intaglio.pipeline.simulation.weight import WeightRounding

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.numerics.basis import LayerBalance


Bases: TypeAlias = "Mapping[str, Mapping[str, LayerBalance]]"
"""Bases of layers, by the name of the basis and of the layer."""
KEPT_BYTES = 2**28
"""Bytes of rounded weights that are kept between calls. With few tokens, rounding takes longer than the product."""


class RoundedLayers:
    """Rounded versions of a model's layers, made for each form on request.

    Scales are fitted once. Rounded weights are kept up to KEPT_BYTES in all; others are rounded for every call.
    `bases` has the bases of layers by the basis's name; the empty name stands for the bases that layers already have.
    """

    def __init__(self, module: nn.Module, trajectory: Trajectory, bases: Bases = MappingProxyType({})) -> None:
        self.module, self.trajectory, self.bases = module, trajectory, bases
        self.clock = StepClock(trajectory.timesteps)
        self._places = places_of(module)
        self._made: dict[tuple[str, Form], QuantizedLayer] = {}
        self._fitted: dict[tuple[str, Float | RoundedWeight, str], WeightRounding] = {}
        self._kept: set[QuantizedLayer] = set()
        self._room = KEPT_BYTES

    def layer(self, name: str, form: Form) -> QuantizedLayer:
        """Return the layer in this form. It shares the model's weight, and is not in the model."""
        key = (name, form)
        if key not in self._made:
            layer, balances = self.module.get_submodule(name), self.bases.get(form.basis, {})
            assert isinstance(layer, LayerModule)  # only these types have forms
            tables = self.trajectory.tables({name: form.scheme}, balances).get(name, NO_TABLES)
            balance = balances[name].balance if name in balances else None
            fit = (name, form.scheme.weight, form.basis)
            if fit not in self._fitted:
                self._fitted[fit] = WeightRounding.fitted(form.scheme.weight, layer.weight, balance)
            weight = self._fitted[fit]
            self._made[key] = QuantizedLayer(layer, form.scheme, self.clock, tables, balance=balance, weight=weight)
        return self._made[key]

    @torch.no_grad()
    def weight(self, name: str, form: Form) -> torch.Tensor:
        """Return the rounded weight of the layer in this form, in its basis."""
        layer = self.layer(name, form)
        weight = layer.rounded_weight()
        self._leave(layer)
        return weight

    def _leave(self, layer: QuantizedLayer) -> None:
        """Keep the rounded weight of a layer that was called, if KEPT_BYTES allow it."""
        if layer in self._kept or isinstance(layer.scheme.weight, Float):
            return
        if (size := layer.layer.weight.nbytes) > self._room:
            layer.cache.clear()
            return
        self._kept.add(layer)
        self._room -= size

    @contextlib.contextmanager
    def alone(self, name: str, form: Form) -> Iterator[None]:
        """Put this one layer into the model in this form, inside the context."""
        layer, original = self.layer(name, form), self.module.get_submodule(name)
        places = self._places[original]
        for parent, child in places:
            setattr(parent, child, layer)
        try:
            yield
        finally:
            for parent, child in places:
                setattr(parent, child, original)
            self._leave(layer)
