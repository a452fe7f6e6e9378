"""Estimate the time of layers in each scheme, from profiles, or else from the device's roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.cost import basis_s, latency_s
from intaglio.pipeline.formats.layer import Layer, admitted_schemes
from intaglio.pipeline.formats.schemes import Float, LayerScheme

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.layer_times import LayerTimes
    from intaglio.pipeline.artifacts.profile import Profile
    from intaglio.pipeline.artifacts.workload import Workload
    from intaglio.pipeline.formats.target import Device

Roofline: TypeAlias = Callable[[Layer, LayerScheme], float]
"""Function from a layer and a scheme to seconds."""
BasisTime: TypeAlias = Callable[[Layer, int], float]
"""Function from a layer and the block of a basis to seconds."""


def roofline(workload: Workload, samples: int, device: Device) -> Roofline:
    """Return the roofline of a call that denoises this many samples."""
    return lambda layer, scheme: latency_s(layer, scheme, math.ceil(workload.rows[layer.name] * samples), device)


def basis_times(workload: Workload, samples: int, device: Device) -> BasisTime:
    """Return the time that a basis takes in a call that denoises this many samples."""
    return lambda layer, block: basis_s(layer, workload.rows[layer.name] * samples, block, device)


def timed_s(times: LayerTimes, rows: float, layer: Layer, scheme: LayerScheme, block: int | None) -> float:
    """Return the seconds of a layer alone, and of bringing its input into its basis; `block` is None without one.

    Raises RecipeError for a scheme in which the layer was not timed.
    """
    known = times.seconds[layer.name]
    if scheme.name not in known:
        raise RecipeError(
            f"time-layers.schemes: {layer.name} was not timed with {scheme.name}: add this scheme, which assign may"
            " choose"
        )
    # a rotation multiplies each block by a matrix: for each number, as many multiplications as the block has channels
    passes = 0 if block is None else max(1, block / 4)
    return known[scheme.name] + passes * times.element_s * rows * layer.channels


@dataclass(frozen=True)
class Latencies:
    """Seconds by layer and scheme. Without a roofline, a scheme takes as long as the nearest measured one.

    `measured` has the median over the profiles, by layer name and scheme name; `scale` is the ratio of all measured
    times to their rooflines, for layers that no profile has.
    """

    measured: Mapping[str, Mapping[str, float]]
    roofline: Roofline | None
    scale: float = 1.0
    basis: BasisTime | None = None

    @classmethod
    def of(
        cls,
        profiles: Sequence[Profile],
        layers: Iterable[Layer],
        bound: Roofline | None,
        basis: BasisTime | None = None,
    ) -> Latencies:
        """Collect the times from profiles of plans of these layers; profiles may be empty if there is a roofline."""
        found: dict[str, dict[str, list[float]]] = {}
        for profile in profiles:
            for name, time in profile.layers.items():
                found.setdefault(name, {}).setdefault(time.scheme, []).append(time.microseconds * 1e-6)
        measured = {
            layer.name: {s: median(t) for s, t in found.get(layer.name, {}).items() if s in _named(layer)}
            for layer in layers
        }
        if bound is None:
            return cls(measured, bound, basis=basis)
        pairs = [(layer, s, seconds) for layer in layers for s, seconds in measured[layer.name].items()]
        least = sum(bound(layer, _named(layer)[s]) for layer, s, _ in pairs)
        return cls(measured, bound, sum(seconds for *_, seconds in pairs) / least if least else 1.0, basis)

    def seconds(self, layer: Layer, scheme: LayerScheme, block: int | None = None) -> float:
        """Return the time of a layer, and that of its basis if it is known; `block` is None without a basis."""
        return self._product_s(layer, scheme) + (
            0.0 if block is None or self.basis is None else self.basis(layer, block)
        )

    def _product_s(self, layer: Layer, scheme: LayerScheme) -> float:
        """Return the measured time; or the nearest scheme's, scaled by both rooflines; or else the roofline."""
        known = self.measured[layer.name]
        if scheme.name in known:
            return known[scheme.name]
        if not known:
            return 0.0 if self.roofline is None else self.scale * self.roofline(layer, scheme)
        named = _named(layer)
        nearest = min(known, key=lambda name: (*_apart(named[name], scheme), name))
        if self.roofline is None:
            return known[nearest]
        return known[nearest] * self.roofline(layer, scheme) / self.roofline(layer, named[nearest])

    def is_measured(self, layer: Layer, scheme: LayerScheme) -> bool:
        """Return True if a profile has this layer in this scheme."""
        return scheme.name in self.measured[layer.name]


def _named(layer: Layer) -> dict[str, LayerScheme]:
    return {scheme.name: scheme for scheme in admitted_schemes(layer)}


def _apart(scheme: LayerScheme, other: LayerScheme) -> tuple[int, int, int]:
    """Return a distance of two schemes' kernels: integer or float products first, then bits of weights and inputs."""
    in_float = [isinstance(each.input, Float) for each in (scheme, other)]
    bits = abs(scheme.weight_bits - other.weight_bits), abs(scheme.input_bits - other.input_bits)
    return in_float[0] != in_float[1], *bits
