"""Layers of a TensorRT network that look at a window of places: slices, resizing, pooling and convolutions.

They are computed as those of tensorrt_layers.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Array = NDArray[Any]


def shape_of(layer: Any, place: int = 0) -> tuple[int, ...]:
    return tuple(layer.get_output(place).shape)


def tensor(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def _slice(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    rank = x.ndim

    def numbers(place: int, name: str) -> list[int]:
        dynamic = len(given) > place and given[place] is not None
        return [int(v) for v in (given[place] if dynamic else getattr(layer, name))]

    start, size, stride = numbers(1, "start"), numbers(2, "shape"), numbers(3, "stride")
    if layer.axes is not None or len(given) > 5:
        whole = [0] * rank, list(x.shape), [1] * rank
        for place, axis in enumerate(numbers(5, "axes")):
            for full, part in zip(whole, (start, size, stride), strict=True):
                full[axis] = part[place]
        start, size, stride = whole
    fill = 0 if len(given) <= 4 or given[4] is None else np.asarray(given[4]).reshape(-1)[0]
    y = x
    inside = np.ones(size, bool)
    for axis in range(rank):
        places, n = start[axis] + stride[axis] * np.arange(size[axis]), x.shape[axis]
        match layer.mode.name:
            case "STRICT_BOUNDS" | "DEFAULT":
                assert size[axis] == 0 or (places.min() >= 0 and places.max() < n), "out of bounds"
            case "WRAP":
                places = places % n
            case "CLAMP":
                places = places.clip(0, n - 1)
            case "FILL":
                ok = (places >= 0) & (places < n)
                inside &= ok.reshape([-1 if a == axis else 1 for a in range(rank)])
                places = places.clip(0, n - 1)
            case "REFLECT":
                period = max(1, 2 * (n - 1))
                places = np.abs((places + n - 1) % period - (n - 1)) if n > 1 else places * 0
        y = y.take(places, axis=axis)
    return np.where(inside, y, np.asarray(fill, x.dtype))


def _coordinates(layer: Any, n: int, m: int, scale: float) -> Array:
    """Return the place of each of m outputs among n inputs."""
    y = np.arange(m, dtype=np.float64)
    match layer.coordinate_transformation.name:
        case "ASYMMETRIC":
            x = y / scale
        case "ALIGN_CORNERS":
            x = y * (n - 1) / (m - 1) if m > 1 else y * 0
        case "HALF_PIXEL":
            x = (y + 0.5) / scale - 0.5
        case other:
            raise NotImplementedError(other)
    if m == 1 and layer.selector_for_single_pixel.name == "UPPER":
        x = np.zeros(1)
    return x


def _weights(layer: Any, x: float, n: int) -> Array:
    """Return the share of each input in an output at x."""
    found = np.zeros(n)
    low = int(np.floor(x))
    match layer.resize_mode.name:
        case "NEAREST":
            match layer.nearest_rounding.name:
                case "FLOOR":
                    place = np.floor(x)
                case "CEIL":
                    place = np.ceil(x)
                case "HALF_DOWN":
                    place = np.ceil(x - 0.5)
                case "HALF_UP":
                    place = np.floor(x + 0.5)
            found[int(np.clip(place, 0, n - 1))] = 1
        case "LINEAR":
            for place, weight in ((low, 1 - (x - low)), (low + 1, x - low)):
                found[int(np.clip(place, 0, n - 1))] += weight
        case "CUBIC":
            a = layer.cubic_coeff
            for place in range(low - 1, low + 3):
                d = abs(x - place)
                near = (a + 2) * d**3 - (a + 3) * d**2 + 1
                weight = near if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                if layer.exclude_outside and not 0 <= place < n:
                    continue
                found[int(np.clip(place, 0, n - 1))] += weight
            if layer.exclude_outside:
                found /= found.sum()
    return found


def _resize(layer: Any, given: Sequence[Any]) -> Array:
    y = np.asarray(given[0], np.float64)
    scales = list(layer.scales)
    for axis, m in enumerate(shape_of(layer)):
        n = y.shape[axis]
        scale = scales[axis] if scales else m / n
        if n == m and scale == 1:
            continue
        matrix = np.stack([_weights(layer, x, n) for x in _coordinates(layer, n, m, scale)])
        y = np.moveaxis(np.tensordot(matrix, y, (1, axis)), 0, axis)
    return y


def padding(layer: Any, total: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Before and behind; `total` is what the sizes need."""
    if not layer.padding_mode.name.startswith("SAME"):
        return tuple(layer.pre_padding), tuple(layer.post_padding)
    less, more = [max(0, each) // 2 for each in total], [max(0, each) - max(0, each) // 2 for each in total]
    return (tuple(less), tuple(more)) if layer.padding_mode.name == "SAME_UPPER" else (tuple(more), tuple(less))


def _pooling(layer: Any, given: Sequence[Any]) -> Array:
    x = tensor(np.asarray(given[0], np.float64))
    window, stride = tuple(layer.window_size_nd), tuple(layer.stride_nd)
    spatial, out = x.shape[2:], shape_of(layer)[2:]
    pre, post = padding(layer, [(o - 1) * s + w - n for o, s, w, n in zip(out, stride, window, spatial, strict=True)])
    # rounding up lets the last window go over the end
    over = [
        max(0, (o - 1) * s + w - (n + a + b))
        for o, s, w, n, a, b in zip(out, stride, window, spatial, pre, post, strict=True)
    ]
    pads = [p for a, b, o in reversed(list(zip(pre, post, over, strict=True))) for p in (a, b + o)]
    highest = layer.type.name == "MAX"
    padded = F.pad(x, pads, value=-np.inf if highest else 0.0)
    inside = F.pad(torch.ones_like(x), pads)
    if not layer.average_count_excludes_padding:  # what is padded counts, but not what is over the end
        inside = F.pad(
            F.pad(
                torch.ones_like(x),
                [p for a, b in reversed(list(zip(pre, post, strict=True))) for p in (a, b)],
                value=1.0,
            ),
            [p for o in reversed(over) for p in (0, o)],
        )
    for axis, (w, s) in enumerate(zip(window, stride, strict=True), start=2):
        padded, inside = padded.unfold(axis, w, s), inside.unfold(axis, w, s)
    places = tuple(range(-len(window), 0))
    if highest:
        return padded.amax(places).numpy()
    return (padded.sum(places) / inside.sum(places)).numpy()


def _convolution(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    n = x.ndim - 2
    kernel = (
        given[1] if len(given) > 1 else np.array(layer.kernel).reshape(layer.num_output_maps, -1, *layer.kernel_size_nd)
    )
    bias = given[2] if len(given) > 2 else np.array(layer.bias)
    stride, dilation = tuple(layer.stride_nd), tuple(layer.dilation_nd)
    sizes = zip(shape_of(layer)[2:], stride, dilation, kernel.shape[2:], x.shape[2:], strict=True)
    pre, post = padding(layer, [(o - 1) * s + d * (k - 1) + 1 - size for o, s, d, k, size in sizes])
    pads = [p for a, b in reversed(list(zip(pre, post, strict=True))) for p in (a, b)]
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    y = function(F.pad(tensor(x), pads), tensor(kernel), None, stride, 0, dilation, layer.num_groups)
    return (y + tensor(bias).reshape(-1, *[1] * n)).numpy() if np.size(bias) else y.numpy()


def _deconvolution(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    n, c = x.ndim - 2, x.shape[1]
    kernel = given[1] if len(given) > 1 else np.array(layer.kernel).reshape(c, -1, *layer.kernel_size_nd)
    bias = given[2] if len(given) > 2 else np.array(layer.bias)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    y = function(
        tensor(x), tensor(kernel), None, tuple(layer.stride_nd), 0, 0, layer.num_groups, tuple(layer.dilation_nd)
    )
    out = shape_of(layer)[2:]
    pre, post = padding(layer, [size - m for m, size in zip(out, y.shape[2:], strict=True)])
    more = [m + a + b - size for m, a, b, size in zip(out, pre, post, y.shape[2:], strict=True)]
    y = F.pad(y, [p for each in reversed(more) for p in (0, each)])
    cut = tuple(slice(a, size - b) for a, b, size in zip(pre, post, y.shape[2:], strict=True))
    y = y[(slice(None), slice(None), *cut)]
    return (y + tensor(bias).reshape(-1, *[1] * n)).numpy() if np.size(bias) else y.numpy()


WINDOWS: dict[str, Callable[[Any, Sequence[Any]], Any]] = {
    "SLICE": _slice,
    "RESIZE": _resize,
    "POOLING": _pooling,
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
}
