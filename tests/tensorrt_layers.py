"""Compute the layers of a TensorRT network in numpy and torch, as NvInfer.h describes them; for static shapes.

Nothing is built, so no GPU is needed: a network as the parser makes it is executed from the layers' attributes. Layers
that are not here raise NotImplementedError.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensorrt_windows import WINDOWS, Array, shape_of, tensor
from torch.nn import functional as F

TYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8, "UINT8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
CLASSES = {
    "ELEMENTWISE": "IElementWiseLayer", "TOPK": "ITopKLayer", "LRN": "ILRNLayer", "SOFTMAX": "ISoftMaxLayer",
    "PARAMETRIC_RELU": "IParametricReLULayer",
}  # fmt: skip


def parse(trt: Any, model: bytes) -> tuple[Any, list[str], tuple[object, ...]]:
    """The strongly typed network of an ONNX model, the parser's errors, and what has to outlive the network."""
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parser.parse(model)
    return network, [parser.get_error(i).desc() for i in range(parser.num_errors)], (parser, builder, log)


def layers(trt: Any, network: Any) -> list[tuple[str, Any]]:
    """The kind of each, and the layer as the class of its kind."""
    found = []
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        kind = layer.type.name
        name = CLASSES.get(kind, f"I{''.join(part.title() for part in kind.split('_'))}Layer")
        if hasattr(trt, name):
            layer.__class__ = getattr(trt, name)
        found.append((kind, layer))
    return found


def compute(trt: Any, network: Any, feed: Mapping[str, Array]) -> list[Array]:
    """The outputs of the network. Raises NotImplementedError."""
    values: dict[str, Array] = dict(feed)
    pending = layers(trt, network)
    while pending:  # a constant may come behind the layer that reads it
        ready = [each for each in pending if all(t is None or t.name in values for t in _inputs(each[1]))]
        assert ready, f"nothing computes what {pending[0][1].name} reads"
        for kind, layer in ready:
            _execute(kind, layer, values)
        done = {layer.name for _, layer in ready}
        pending = [each for each in pending if each[1].name not in done]
    return [values[network.get_output(i).name] for i in range(network.num_outputs)]


def _inputs(layer: Any) -> list[Any]:
    return [layer.get_input(i) for i in range(layer.num_inputs)]


def _execute(kind: str, layer: Any, values: dict[str, Array]) -> None:
    if kind not in COMPUTE:
        raise NotImplementedError(kind)
    made = COMPUTE[kind](layer, [None if tensor is None else values[tensor.name] for tensor in _inputs(layer)])
    for place, value in enumerate((made if isinstance(made, tuple) else (made,))[: layer.num_outputs]):
        there, found = layer.get_output(place), np.asarray(value)
        if -1 not in tuple(there.shape) and found.shape != tuple(there.shape):
            raise AssertionError(f"{kind} {layer.name}: {found.shape}, TensorRT says {tuple(there.shape)}")
        values[there.name] = found.astype(TYPES[there.dtype.name])


def axes_of(mask: int, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if mask >> axis & 1)


def _constant(layer: Any, _: Sequence[Any]) -> Array:
    return np.array(layer.weights).reshape(tuple(layer.shape))


def _shuffle(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    first, second = list(layer.first_transpose)[: x.ndim], list(layer.second_transpose)
    out = shape_of(layer)
    second = second[: len(out)]
    between = [0] * len(out)
    for place, axis in enumerate(second):
        between[axis] = out[place]
    return x.transpose(first).reshape(between).transpose(second)


def _normalization(layer: Any, given: Sequence[Any]) -> Array:
    x, scale, bias = (np.asarray(v, np.float64) for v in given)
    axes, groups = axes_of(layer.axes, x.ndim), layer.num_groups
    parts = x
    if groups > 1:
        parts, axes = x.reshape(x.shape[0], groups, -1), (2,)
        if not layer.is_v2:
            scale, bias = (v.repeat(x.shape[1] // groups, axis=1) for v in (scale, bias))
    mean, var = parts.mean(axes, keepdims=True), parts.var(axes, keepdims=True)
    return ((parts - mean) / np.sqrt(var + layer.epsilon)).reshape(x.shape) * scale + bias


def _reduce(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    function = {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean, "NONE": None}[
        layer.op.name
    ]
    return x if function is None else function(x, axis=axes_of(layer.axes, x.ndim), keepdims=layer.keep_dims)


def _divide(a: Array, b: Array) -> Array:
    if not np.issubdtype(a.dtype, np.integer):
        return a / b
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))  # as in C


ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add, "PROD": np.multiply, "MAX": np.maximum, "MIN": np.minimum, "SUB": np.subtract, "DIV": _divide,
    "POW": np.power, "FLOOR_DIV": np.floor_divide, "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor,
    "EQUAL": np.equal, "GREATER": np.greater, "LESS": np.less,
}  # fmt: skip
UNARY: dict[str, Callable[[Array], Array]] = {
    "EXP": np.exp, "LOG": np.log, "SQRT": np.sqrt, "RECIP": np.reciprocal, "ABS": np.abs, "NEG": np.negative,
    "SIN": np.sin, "COS": np.cos, "TAN": np.tan, "SINH": np.sinh, "COSH": np.cosh, "ASIN": np.arcsin,
    "ACOS": np.arccos, "ATAN": np.arctan, "ASINH": np.arcsinh, "ACOSH": np.arccosh, "ATANH": np.arctanh,
    "CEIL": np.ceil, "FLOOR": np.floor, "NOT": np.logical_not, "SIGN": np.sign, "ROUND": np.rint, "ISINF": np.isinf,
    "ISNAN": np.isnan, "ERF": lambda x: torch.erf(tensor(x)).numpy(),
}  # fmt: skip


def _scale(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    sides = [1 if axis != layer.channel_axis else -1 for axis in range(x.ndim)]
    assert layer.mode.name == "CHANNEL"
    parts = ((layer.scale, 1), (layer.shift, 0), (layer.power, 1))
    scale, shift, power = (np.reshape(v, sides) if np.size(v) else np.float32(usual) for v, usual in parts)
    return (x * scale + shift) ** power


def _lrn(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    half = layer.window_size // 2
    square = np.pad(x**2, [(0, 0), (half, half), *[(0, 0)] * (x.ndim - 2)])
    total = sum(square[:, i : i + x.shape[1]] for i in range(layer.window_size))
    return x / (layer.k + layer.alpha * total / layer.window_size) ** layer.beta


def _activation(layer: Any, given: Sequence[Any]) -> Array:
    x, a, b = tensor(given[0]), layer.alpha, layer.beta
    match layer.type.name:
        case "RELU":
            y = F.relu(x)
        case "SIGMOID":
            y = torch.sigmoid(x)
        case "TANH":
            y = torch.tanh(x)
        case "LEAKY_RELU":
            y = torch.where(x > 0, x, a * x)
        case "ELU":
            y = torch.where(x >= 0, x, a * (torch.exp(x) - 1))
        case "SELU":
            y = torch.where(x > 0, b * x, b * (a * torch.exp(x) - a))
        case "SOFTSIGN":
            y = x / (1 + x.abs())
        case "SOFTPLUS":
            y = a * torch.log(torch.exp(b * x) + 1)
        case "CLIP":
            y = torch.clamp(x, a, b)
        case "HARD_SIGMOID":
            y = torch.clamp(a * x + b, 0, 1)
        case "SCALED_TANH":
            y = a * torch.tanh(b * x)
        case "THRESHOLDED_RELU":
            y = torch.where(x > a, x, 0.0)
        case "GELU_ERF":
            y = F.gelu(x)
        case "GELU_TANH":
            y = F.gelu(x, approximate="tanh")
        case other:
            raise NotImplementedError(other)
    return y.numpy()


def _multiply(layer: Any, given: Sequence[Any]) -> Array:
    operands = []
    for x, op in zip(given, (layer.op0.name, layer.op1.name), strict=True):
        operands.append(np.swapaxes(x, -1, -2) if op == "TRANSPOSE" else x)
    a, b = operands
    if layer.op0.name == "VECTOR" and layer.op1.name == "VECTOR":
        return (a * b).sum(-1)
    if layer.op0.name == "VECTOR":
        return (a[..., None, :] @ b)[..., 0, :]
    if layer.op1.name == "VECTOR":
        return (a @ b[..., None])[..., 0]
    return a @ b


def _softmax(layer: Any, given: Sequence[Any]) -> Array:
    x = given[0]
    axes = axes_of(layer.axes, x.ndim)
    e = np.exp(x - x.max(axes, keepdims=True))
    return e / e.sum(axes, keepdims=True)


def _gather(layer: Any, given: Sequence[Any]) -> Array:
    x, i = given[:2]
    axis, batch = layer.axis, layer.num_elementwise_dims
    match layer.mode.name:
        case "DEFAULT" if batch == 0:
            return x.take(np.where(i < 0, i + x.shape[axis], i), axis=axis)
        case "ELEMENT":
            return np.take_along_axis(x, np.where(i < 0, i + x.shape[axis], i).astype(np.int64), axis=axis)
        case "ND":
            flat = [tuple(place) for place in np.ndindex(*i.shape[:-1])]
            found = [x[(*place[:batch], *(int(v) for v in i[place]))] for place in flat]
            return np.array(found).reshape(shape_of(layer))
    raise NotImplementedError(layer.mode.name)


def _scatter(layer: Any, given: Sequence[Any]) -> Array:
    x, i, u = given
    y = x.copy()
    if layer.mode.name == "ND":
        for place in np.ndindex(*i.shape[:-1]):
            y[tuple(int(v) for v in i[place])] = u[place]
    else:
        for place in np.ndindex(*i.shape):
            to = list(place)
            to[layer.axis] = int(i[place])
            y[tuple(to)] = u[place]
    return y


def _fill(layer: Any, given: Sequence[Any]) -> Array:
    if layer.operation.name != "LINSPACE":
        raise NotImplementedError(layer.operation.name)
    shape = shape_of(layer)
    given = [*given, None, None, None]
    start = layer.alpha if given[1] is None else given[1]
    step = np.atleast_1d(layer.beta if given[2] is None else given[2])
    grid = np.indices(shape)
    return start + sum(g * s for g, s in zip(grid, step, strict=True))


def _topk(layer: Any, given: Sequence[Any]) -> tuple[Array, Array]:
    x = given[0]
    (axis,) = axes_of(layer.axes, x.ndim)
    k = int(given[1]) if len(given) > 1 and given[1] is not None else layer.k
    order = np.argsort(-x if layer.op.name == "MAX" else x, axis=axis, kind="stable").take(range(k), axis=axis)
    return np.take_along_axis(x, order, axis), order


def _cumulative(layer: Any, given: Sequence[Any]) -> Array:
    x, axis = given[0], int(np.asarray(given[1]).reshape(()))
    x = np.flip(x, axis) if layer.reverse else x
    y = np.cumsum(x, axis, dtype=x.dtype)
    y = y - x if layer.exclusive else y
    return np.flip(y, axis) if layer.reverse else y


def _one_hot(layer: Any, given: Sequence[Any]) -> Array:
    i, (off, on), depth = given[0], given[1], int(given[2])
    hot = np.arange(depth) == np.where(i < 0, i + depth, i)[..., None]
    return np.moveaxis(np.where(hot, on, off), -1, layer.axis)


def _cast(layer: Any, given: Sequence[Any]) -> Array:
    return given[0].astype(TYPES[layer.get_output(0).dtype.name])


def _quantize(layer: Any, given: Sequence[Any]) -> Array:
    x, scale = given[:2]
    return np.clip(np.rint(x / _along(layer, x, scale)), -128, 127)


def _dequantize(layer: Any, given: Sequence[Any]) -> Array:
    x, scale = given[:2]
    return x * _along(layer, x, scale)


def _along(layer: Any, x: Array, scale: Array) -> Array:
    if scale.ndim == x.ndim and scale.shape != (1,):
        return np.kron(scale, np.ones([a // b for a, b in zip(x.shape, scale.shape, strict=True)], scale.dtype))
    return scale.reshape([-1 if axis == layer.axis else 1 for axis in range(x.ndim)]) if scale.size > 1 else scale


def _grid_sample(layer: Any, given: Sequence[Any]) -> Array:
    mode = {"NEAREST": "nearest", "LINEAR": "bilinear", "CUBIC": "bicubic"}[layer.interpolation_mode.name]
    outside = {"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}[layer.sample_mode.name]
    x, grid = map(tensor, given)
    return F.grid_sample(x, grid, mode, outside, align_corners=layer.align_corners).numpy()


def _reverse_sequence(layer: Any, given: Sequence[Any]) -> Array:
    x, lengths = given
    y = np.moveaxis(x, (layer.batch_axis, layer.sequence_axis), (0, 1)).copy()
    for row, length in zip(y, lengths, strict=True):
        row[: int(length)] = row[: int(length)][::-1].copy()
    return np.moveaxis(y, (0, 1), (layer.batch_axis, layer.sequence_axis))


def _rotary(layer: Any, given: Sequence[Any]) -> Array:
    x, cos, sin = given[:3]  # B, H, S, D
    if len(given) > 3 and given[3] is not None:
        cos, sin = cos[given[3]], sin[given[3]]
    cos, sin = cos[:, None], sin[:, None]
    size = layer.rotary_embedding_dim or x.shape[-1]
    part, rest = x[..., :size], x[..., size:]
    a, b = (part[..., ::2], part[..., 1::2]) if layer.interleaved else np.split(part, 2, axis=-1)
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    if layer.interleaved:
        turned = np.stack([real, imaginary], -1).reshape(part.shape)
    else:
        turned = np.concatenate([real, imaginary], -1)
    return np.concatenate([turned, rest], -1)


COMPUTE: dict[str, Callable[[Any, Sequence[Any]], Any]] = {
    "CONSTANT": _constant, "SHUFFLE": _shuffle, "NORMALIZATION": _normalization, "REDUCE": _reduce,
    "ELEMENTWISE": lambda layer, given: ELEMENTWISE[layer.op.name](*given),
    "UNARY": lambda layer, given: UNARY[layer.op.name](given[0]), "ACTIVATION": _activation,
    **WINDOWS,
    "MATRIX_MULTIPLY": _multiply, "SOFTMAX": _softmax, "GATHER": _gather, "SCATTER": _scatter, "FILL": _fill,
    "TOPK": _topk, "CUMULATIVE": _cumulative, "ONE_HOT": _one_hot, "CAST": _cast, "IDENTITY": _cast,
    "SCALE": _scale,
    "REVERSE_SEQUENCE": _reverse_sequence, "ROTARY_EMBEDDING": _rotary, "LRN": _lrn,
    "QUANTIZE": _quantize, "DEQUANTIZE": _dequantize, "GRID_SAMPLE": _grid_sample,
    "SQUEEZE": lambda layer, given: given[0].reshape(shape_of(layer)),
    "UNSQUEEZE": lambda layer, given: given[0].reshape(shape_of(layer)),
    "SELECT": lambda layer, given: np.where(*given),
    "CONCATENATION": lambda layer, given: np.concatenate(given, layer.axis),
    "SHAPE": lambda layer, given: np.array(given[0].shape),
    "EINSUM": lambda layer, given: np.einsum(layer.equation, *given),
    "PARAMETRIC_RELU": lambda layer, given: np.where(given[0] >= 0, given[0], given[0] * given[1]),
    "NON_ZERO": lambda layer, given: np.array(np.nonzero(given[0])),
}  # fmt: skip
