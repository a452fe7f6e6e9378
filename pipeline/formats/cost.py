"""The cost of a layer: its least latency on a device, its bit operations, and the bytes of its activations.

Shapes: R rows (tokens, or pixels that a convolution gives), N out features, K in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.pipeline.formats.inputs import Float

if TYPE_CHECKING:
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Device

FLOAT_BYTES = 2
"""Bytes of a number in float16, in which GPUs compute."""


def latency_s(layer: Layer, scheme: LayerScheme, rows: int, device: Device) -> float:
    """The roofline max(bytes / bandwidth, operations / throughput) of one call on R rows, each number moved once.

    A bound from below, without launches and without what other layers leave in caches. The weight is read as it is
    stored, x: (R, K) and y: (R, N); a convolution with a kernel of k numbers has its x as (R, K // k) in memory, for as
    many pixels as it gives. An input with codes is multiplied on integers.
    """
    moved_bytes = layer.size_bytes(scheme, FLOAT_BYTES) + activation_bytes(layer, scheme, rows)
    operations = 2 * rows * layer.n * layer.k
    tera = device.fp16_tflops if isinstance(scheme.input, Float) else device.int8_tops
    return max(moved_bytes / (device.bandwidth_gb_s * 1e9), operations / (tera * 1e12))


def activation_bytes(layer: Layer, scheme: LayerScheme, rows: float) -> float:
    """Bytes of x and y, with one byte for a number that is rounded."""
    kernel = layer.k // layer.shape[1]
    x_bytes = FLOAT_BYTES if isinstance(scheme.input, Float) else 1
    y_bytes = FLOAT_BYTES if isinstance(scheme.output, Float) else 1
    return rows * (layer.k // kernel * x_bytes + layer.n * y_bytes)


def bit_operations(layer: Layer, scheme: LayerScheme, rows: float) -> float:
    """Multiplications on R rows, each counted as bits of the weight times bits of the input."""
    return rows * layer.n * layer.k * scheme.weight_bits * scheme.input_bits
