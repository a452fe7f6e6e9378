"""An independent quantizer in numpy, written from the formulas; shares no code with the package.

Shapes: N out features, K in features, C input channels, kh kw kernel.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

UNPADDED = ()


class Computed(NamedTuple):
    """Codes of an input, and the layer's output in float64.

    Where the product is rounded: what it is in codes before that, and what a code is worth in the output.
    """

    x_codes: np.ndarray
    y: np.ndarray
    unrounded: np.ndarray | None = None
    worth: np.ndarray | None = None


def weight_codes(w, scale, low, high, group):
    """w (N, K), scale (N, K // group)"""
    spread = np.repeat(scale.astype(np.float32), group, axis=1)
    return np.clip(np.rint(w.astype(np.float32) / spread), low, high).astype(np.int64)


def two_level_codes(w, scale, group, size):
    """w (N, K), scale (N,), group (N, K // size) of integers: the 4-bit codes, and the 8-bit ones they stand for."""
    four = weight_codes(w, scale.astype(np.float32)[:, None] * group.astype(np.float32), -8, 7, size)
    return four, four * np.repeat(np.rint(group).astype(np.int64), size, axis=1)


def nearest(x, dtype):
    """The numbers of a type of ml_dtypes nearest to x, float32; larger values become the largest number."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x.astype(np.float32), -largest, largest).astype(dtype).astype(np.float32)


def places(numbers, dtype):
    """The place of each number among all numbers of an ml_dtypes type: its bits without the sign, negative if it is."""
    sign = 1 << (ml_dtypes.finfo(dtype).bits - 1)
    bits = numbers.astype(dtype).view(np.uint8).astype(np.int64) & (2 * sign - 1)
    return np.where(bits & sign, -(bits - sign), bits)


def fp8_layer(x, w, scale, bias, *, amax=None, **window):
    """A product of E4M3 numbers: x rounded by token, or with one magnitude; w (N, K) or (N, C, kh, kw), scale (N,)."""
    f, dtype = np.float32, ml_dtypes.float8_e4m3fn
    x, s = x.astype(f), f(1) / f(448)
    if amax is None:
        amax = np.maximum(np.abs(x).max(-1, keepdims=True), f(1e-7))
        unit = x / amax
    else:
        amax = f(amax)
        unit = x * (f(1) / amax)
    numbers = nearest(unit / s, dtype)
    scale, bias = (_of_channels(v, w).astype(np.float64) for v in (scale, bias))
    return Computed(numbers, product(numbers, w, **window) * float(s) * scale * amax + bias)


def nvfp4_weight(w, scale, group):
    """E2M1 numbers of w (N, K), and the value of each, from the scale () and block scales (N, K // 16) in E4M3."""
    worth = np.repeat(np.float32(scale) * group.astype(np.float32), 16, axis=1)
    return nearest(w / worth, ml_dtypes.float4_e2m1fn), worth


def nvfp4_input(x, amax):
    """E2M1 numbers of x (..., K), and the value of each: every block of 16 has an E4M3 scale."""
    f = np.float32
    unit = x.astype(f) * (f(1) / f(amax))
    blocks, one = unit.reshape(*unit.shape[:-1], -1, 16), f(1 / 2688)
    scale = nearest(np.abs(blocks).max(-1, keepdims=True) / (one * f(6)), ml_dtypes.float8_e4m3fn) * one
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = nearest(np.where(scale == 0, 0, blocks / scale), ml_dtypes.float4_e2m1fn)
    return numbers.reshape(x.shape), np.broadcast_to(scale, blocks.shape).reshape(x.shape) * np.float64(amax)


def layer(x, codes, scale, bias, *, high=127, ranges=None, shifted=False, output=None, pads=UNPADDED, **window):
    """An 8-bit product: x rounded by token, or with `ranges`, (half the width, middle); codes (N, K) or (N, C, kh, kw).

    A shifted input of a convolution is padded with zeros before it is shifted; other inputs are padded with codes 0.
    With `output`, (largest magnitude, share of each channel), the product is rounded as well, without the bias, and a
    shift is a zero point of the codes.
    """
    f = np.float32
    x, s = x.astype(f), f(1) / f(high)
    asymmetric = shifted and output is not None
    if shifted and not asymmetric and pads:
        x, pads = np.pad(x, ((0, 0), (0, 0), *pads)), UNPADDED
    if ranges is None:
        half, middle = np.abs(x).max(-1, keepdims=True), f(0)
        if shifted:
            top, bottom = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
            half, middle = (top - bottom) * f(0.5), (top + bottom) * f(0.5)
        half = np.maximum(half, f(1e-7))
        unit = (x - middle) / half
    else:
        half, middle = f(ranges[0]), f(ranges[1])
        unit = (x - middle) * (f(1) / half)
    zero = 0
    if asymmetric:
        zero = -int(np.rint(middle / (half * s)))
        unit = x * (f(1) / half)
    q = np.clip(np.rint(unit / s) + zero, -high - 1, high).astype(np.int64)
    total = product(q - zero, codes, pads=pads, **window)
    scale, bias, rowsum = (_of_channels(v, codes) for v in (scale, bias, codes.reshape(len(codes), -1).sum(1)))
    if output is None:
        y = total * float(s) * scale.astype(np.float64) * half + middle * rowsum * scale.astype(np.float64)
        return Computed(q, y + bias)
    amax, share = f(output[0]), _of_channels(np.asarray(output[1], f), codes)
    out_scale = f(amax / half) / f(127)
    unrounded = total.astype(f) * ((s * (scale.astype(f) / share)) / out_scale)
    worth = float(out_scale) * float(half) * share.astype(np.float64)
    return Computed(q, np.clip(np.rint(unrounded), -128, 127) * worth + bias, unrounded, worth)


def weight_only(x, codes, scale, bias, **window):
    """x in float, codes as in `layer`, and a scale for every one of them (grouped: repeated)."""
    w = codes * scale.astype(np.float64).reshape(codes.shape)
    return product(x.astype(np.float64), w, **window) + _of_channels(bias, codes)


def product(x, w, *, stride=1, dilation=1, pads=UNPADDED):
    """x (..., K) and w (N, K), or the convolution of (B, C, H, ...) and (N, C, kh, ...); in float64, of codes exact.

    `pads` are zeros before and behind along each of the axes H, ...
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    if w.ndim == 2:
        return x @ w.T
    x = np.pad(x, ((0, 0), (0, 0), *pads)) if pads else x
    edges = zip(x.shape[2:], w.shape[2:], strict=True)
    sizes = [(edge - dilation * (size - 1) - 1) // stride + 1 for edge, size in edges]
    total = np.zeros((x.shape[0], w.shape[0], *sizes))
    for place in np.ndindex(*w.shape[2:]):
        starts = zip((dilation * i for i in place), sizes, strict=True)
        read = tuple(slice(start, start + stride * size, stride) for start, size in starts)
        total += np.moveaxis(np.tensordot(x[:, :, *read], w[:, :, *place], axes=(1, 1)), -1, 1)
    return total


def balanced(x, d, block, axis):
    """(x * d) H along `axis`, H[i, j] = (-1)^(bits that i and j share) in each block of H."""
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
    scaled = np.moveaxis(x.astype(np.float64), axis, -1) * d.astype(np.float64)
    return np.moveaxis(scaled @ np.kron(np.eye(len(d) // block), h), -1, axis)


def _of_channels(values, codes):
    return np.asarray(values).reshape(-1, *[1] * (codes.ndim - 2))
