"""Round one layer at a time, in a model that stays in full precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from intaglio.pipeline.formats.layer_tables import NO_TABLES
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.simulation.layer import QuantizedLayer, places_of

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.numerics.basis import LayerBalance


KEPT_BYTES = 2**28
"""Bytes of rounded weights that are kept between calls. With few tokens, rounding takes longer than the product."""


class RoundedLayers:
    """Rounded versions of a model's layers, made for each scheme on request.

    Scales are fitted once. Rounded weights are kept up to KEPT_BYTES in all; others are rounded for every call.
    Layers in `balances` are rounded in their basis, in every form.
    """

    def __init__(
        self, module: nn.Module, trajectory: Trajectory, balances: Mapping[str, LayerBalance] = MappingProxyType({})
    ) -> None:
        self.module, self.trajectory, self.balances = module, trajectory, balances
        self.clock = StepClock(trajectory.timesteps)
        self._places = places_of(module)
        self._made: dict[tuple[str, LayerScheme], QuantizedLayer] = {}
        self._kept: set[QuantizedLayer] = set()
        self._room = KEPT_BYTES

    def layer(self, name: str, form: LayerScheme) -> QuantizedLayer:
        """Return the layer in this form. It shares the model's weight, and is not in the model."""
        key = (name, form)
        if key not in self._made:
            layer, tables = self.module.get_submodule(name), self.trajectory.tables({name: form}, self.balances)
            assert isinstance(layer, nn.Linear | nn.Conv2d)  # others have no forms
            balance = self.balances[name].balance if name in self.balances else None
            self._made[key] = QuantizedLayer(layer, form, self.clock, tables.get(name, NO_TABLES), balance=balance)
        return self._made[key]

    @torch.no_grad()
    def output(self, name: str, form: LayerScheme, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer in this form."""
        layer = self.layer(name, form)
        y: torch.Tensor = layer(x)
        self._leave(layer)
        return y

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
    def alone(self, name: str, form: LayerScheme) -> Iterator[None]:
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
