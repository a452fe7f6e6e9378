"""Estimate the cost of a layer: a lower bound of its latency, its bit operations, and its activation bytes.

Shapes: R rows (tokens, or output pixels of a convolution), N out features, K in features of one output, C channels
of the input (K for a linear layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from intaglio.pipeline.formats.inputs import Float, Multiplied

if TYPE_CHECKING:
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Device

FLOAT_PRODUCT = 2
"""Time of a multiplication in float, relative to one of 8-bit integers."""
CODE_PRODUCT: Mapping[Multiplied, float] = {"int8": 1, "fp8": 1, "fp4": 0.5}
"""Time of a multiplication of codes, relative to one of 8-bit integers."""
ELEMENT = 8
"""Time to read, change and write one number, relative to a multiplication of 8-bit integers in a product."""
FLOAT_BYTES = 2
"""Bytes of a number in float16, in which GPUs compute."""


def latency_s(layer: Layer, scheme: LayerScheme, rows: int, device: Device) -> float:
    """Return the roofline max(bytes / bandwidth, operations / throughput), in seconds, of one call on R rows.

    It is a lower bound: every number is moved once, and kernel launches and cached data are ignored. The weight is read
    as stored, x is (R, C) and y is (R, N): the input of a convolution is assumed to have as many pixels as the output.
    A rounded input is multiplied as codes.
    """
    moved_bytes = layer.size_bytes(scheme, FLOAT_BYTES) + activation_bytes(layer, scheme, rows)
    operations = 2 * rows * layer.n * layer.k
    tera = device.fp16_tflops if isinstance(scheme.input, Float) else device.rate(scheme.input.multiplied)
    return max(moved_bytes / (device.bandwidth_gb_s * 1e9), operations / (tera * 1e12))


def activation_bytes(layer: Layer, scheme: LayerScheme, rows: float) -> float:
    """Return the bytes of x and y: 2 for a float, 1 for a code of an integer or FP8, 4.5 / 8 for one of NVFP4."""
    x_bytes = FLOAT_BYTES if isinstance(scheme.input, Float) else scheme.input.bits_stored / 8
    y_bytes = FLOAT_BYTES if isinstance(scheme.output, Float) else 1
    return rows * (layer.channels * x_bytes + layer.n * y_bytes)


def bit_operations(layer: Layer, scheme: LayerScheme, rows: float) -> float:
    """Return the multiplications on R rows, each counted as weight bits times input bits."""
    return rows * layer.n * layer.k * scheme.weight_bits * scheme.input_bits


def work(layer: Layer, scheme: LayerScheme, rows: float, block: int | None = None, *, in_codes: bool = True) -> float:
    """Return an estimate of a layer's time on R rows where no device is known, in multiplications of 8-bit integers.

    It counts the product, and the passes over the input that rounding needs: two (divide by the scale, round), one more
    for the magnitudes of tokens, and one more for a shift. `block` is the block size of the basis: None for no basis, 1
    for scaled channels (one more pass), more for a rotation. `in_codes` says if the target multiplies the codes of
    a rounded input, and not float values of them.
    """
    elements = rows * layer.channels
    passes = 0
    if not isinstance(scheme.input, Float):
        passes += 2 + scheme.by_token + scheme.shifted
    moved = 0.0 if block is None else ELEMENT + (0 if block == 1 else block * FLOAT_PRODUCT)
    codes = None if isinstance(scheme.input, Float) or not in_codes else scheme.input.multiplied
    product = rows * layer.n * layer.k * (FLOAT_PRODUCT if codes is None else CODE_PRODUCT[codes])
    return product + elements * (passes * ELEMENT + moved)


def basis_s(layer: Layer, rows: float, block: int, device: Device) -> float:
    """Return the time, in seconds, in which a device brings R rows of an input into a basis with this block.

    A channel scale counts as one pass over the input, although it is often folded into the preceding operator and then
    costs nothing. A rotation is a product of each block with a matrix.
    """
    elements = rows * layer.channels
    moved_s = 2 * FLOAT_BYTES * elements / (device.bandwidth_gb_s * 1e9)
    return moved_s + (0 if block == 1 else 2 * elements * block / (device.fp16_tflops * 1e12))
