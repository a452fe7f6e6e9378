"""How long layers take in each scheme: as measured, and where nothing was measured by the roofline of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

from intaglio.pipeline.formats.cost import latency_s
from intaglio.pipeline.formats.layer import admitted_schemes
from intaglio.pipeline.formats.schemes import Float

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.profile import Profile
    from intaglio.pipeline.artifacts.workload import Workload
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Device

Roofline: TypeAlias = "Callable[[Layer, LayerScheme], float]"
"""Seconds."""


def roofline(workload: Workload, samples: int, device: Device) -> Roofline:
    """Of the call that denoises so many samples."""
    return lambda layer, scheme: latency_s(layer, scheme, math.ceil(workload.rows[layer.name] * samples), device)


@dataclass(frozen=True)
class Latencies:
    """Seconds by layer and scheme. Without a roofline, a scheme takes what the one nearest to it was measured to take.

    `measured` has the median over the profiles, by layer name and scheme name; `scale` is how much longer than their
    rooflines all of them take, for layers that no profile has.
    """

    measured: Mapping[str, Mapping[str, float]]
    roofline: Roofline | None
    scale: float = 1.0

    @classmethod
    def of(cls, profiles: Sequence[Profile], layers: Iterable[Layer], bound: Roofline | None) -> Latencies:
        """From profiles of plans of these layers, which may be none if there is a roofline."""
        found: dict[str, dict[str, list[float]]] = {}
        for profile in profiles:
            for name, time in profile.layers.items():
                found.setdefault(name, {}).setdefault(time.scheme, []).append(time.microseconds * 1e-6)
        measured = {
            layer.name: {s: median(t) for s, t in found.get(layer.name, {}).items() if s in _named(layer)}
            for layer in layers
        }
        if bound is None:
            return cls(measured, bound)
        pairs = [(layer, s, seconds) for layer in layers for s, seconds in measured[layer.name].items()]
        least = sum(bound(layer, _named(layer)[s]) for layer, s, _ in pairs)
        return cls(measured, bound, sum(seconds for *_, seconds in pairs) / least if least else 1.0)

    def seconds(self, layer: Layer, scheme: LayerScheme) -> float:
        """Measured; or the nearest measured scheme's, as much longer as its roofline is; or else the roofline."""
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
        """Whether a profile has this layer in this scheme."""
        return scheme.name in self.measured[layer.name]


def _named(layer: Layer) -> dict[str, LayerScheme]:
    return {scheme.name: scheme for scheme in admitted_schemes(layer)}


def _apart(scheme: LayerScheme, other: LayerScheme) -> tuple[int, int, int]:
    """What makes kernels differ, the most first: products on integers or in float, bits of weights, bits of inputs."""
    in_float = [isinstance(each.input, Float) for each in (scheme, other)]
    bits = abs(scheme.weight_bits - other.weight_bits), abs(scheme.input_bits - other.input_bits)
    return in_float[0] != in_float[1], *bits
