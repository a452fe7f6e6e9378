"""Fold the channel scales of balanced layers into the operators before them, so that they cost nothing in a run.

Example: x = LayerNorm(z) * (1 + a) + b, and the layer reads (x * d) H. Then weight and bias of LayerNorm are multiplied
by d, and so is b, which all tokens share; a stays. If another layer made x, d goes into the scales of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from intaglio.exporters.float_graph.products import constant, shape
from intaglio.pipeline.artifacts.graph import ScaledBy

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scale: TypeAlias = "NDArray[np.float32]"
"""Scale that broadcasts against a value from its last axis on, without leading axes of 1."""


@dataclass(frozen=True)
class ChannelScale:
    """A multiplication of a layer's input by d: the product, and d in the shape (C,) or (1, C, 1, ...)."""

    layer: str
    product: ir.Value
    scale: Scale


@dataclass
class _Fold:
    """One possible fold: the changes to make, and the values that are multiplied by a scale afterwards."""

    changes: list[Callable[[], None]] = field(default_factory=list)
    scaled: list[tuple[ir.Value, Scale]] = field(default_factory=list)
    nodes: int = 0
    """Multiplications that are added."""

    def __add__(self, other: _Fold) -> _Fold:
        return _Fold(self.changes + other.changes, self.scaled + other.scaled, self.nodes + other.nodes)


def fold_scales(
    graph: ir.Graph, scales: Iterable[ChannelScale], ends: Collection[str], *, symmetric: bool = False
) -> tuple[dict[str, ScaledBy], dict[str, float]]:
    """Fold each channel scale into the operators before it, if the graph needs no more work then. Changes `graph`.

    A value is scaled only if no other node reads it, and if it is no input or output of the graph. `symmetric`: True if
    the runtime accepts only positive scales of codes. Returns two mappings by value name: for each scaled value of
    `ends`, the layer whose channel scales multiply it; and the largest factor by which each value grew.
    """
    scaled: dict[str, ScaledBy] = {}
    factors: dict[str, float] = {}
    for each in scales:
        node = each.product.producer()
        assert node is not None  # the Mul that the writer made
        x = node.inputs[0]
        assert x is not None
        fold = _Folder(graph, str(node.name), symmetric).into_output(x, _least_rank(each.scale))
        if fold is None:
            continue
        at_ends = [(str(v.name), _origin(each, s)) for v, s in fold.scaled if v.name in ends]
        origins = {name: origin for name, origin in at_ends if origin is not None}
        if len(origins) < len(at_ends) or origins.keys() & scaled.keys():
            continue
        for change in fold.changes:
            change()
        ir.convenience.replace_all_uses_with(each.product, x)
        graph.remove(node, safe=True)
        scaled |= origins
        factors |= {str(v.name): float(np.abs(s).max()) * factors.get(str(v.name), 1.0) for v, s in fold.scaled}
    return scaled, factors


def _origin(each: ChannelScale, scale: Scale) -> ScaledBy | None:
    """Return where the channels with the layer's scale begin in a value; None if they are in another order."""
    flat, own = scale.ravel(), each.scale.ravel()
    count = len(own)
    for start in range(0, len(flat) - count + 1, count):
        rest = np.delete(flat, slice(start, start + count))
        if np.array_equal(flat[start : start + count], own) and np.all(rest == 1):
            return ScaledBy(each.layer, start)
    return None


@dataclass(frozen=True)
class _Folder:
    graph: ir.Graph
    name: str
    """Name of the multiplication that is folded, which is part of the names of added values."""
    symmetric: bool

    def into_output(self, value: ir.Value, scale: Scale) -> _Fold | None:
        """Return the change after which the producer of `value` gives `value * scale`; None if there is none.

        There is none if other nodes read `value`.
        """
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        fold = self._through(node, value, scale)
        return None if fold is None else fold + _Fold(scaled=[(value, scale)])

    def _through(self, node: ir.Node, value: ir.Value, scale: Scale) -> _Fold | None:
        match node.op_type:
            case "Add" | "Sub":
                return _all(self._into(node, place, scale, value) for place in (0, 1))
            case "Mul":
                folds = [self._into(node, place, scale, value) for place in (0, 1)]
                return min((f for f in folds if f is not None), key=lambda f: f.nodes, default=None)
            case "Div":
                return self._into(node, 0, scale, value)
            case "LayerNormalization" if scale.ndim == 1 and node.attributes.get_int("axis", -1) == -1:
                return self._affine(node, scale)
            case "GroupNormalization" | "InstanceNormalization" | "BatchNormalization" if (
                scale.ndim > 1 and scale.size == len(scale)
            ):
                return self._affine(node, scale.ravel())
            case "MatMul" if scale.ndim == 1 or scale.shape[-2] == 1:
                return self._into(node, 1, scale, None)  # a factor after the codes would keep the product in float
            case "DequantizeLinear" if scale.ndim == 1 and not (self.symmetric and (scale < 0).any()):
                return self._weight(node, scale)
            case "Split":
                return self._split(node, value, scale)
            case "Concat":
                return self._concatenation(node, value, scale)
            case "Reshape" | "Transpose":
                before = _moved_back(node, value, scale)
                return None if before is None else self._into(node, 0, before, node.inputs[0])
        return None

    def _affine(self, node: ir.Node, scale: Scale) -> _Fold | None:
        """Scale a normalization's own scale and bias."""
        places = [place for place in (1, 2) if place < len(node.inputs) and node.inputs[place] is not None]
        return _all(self._constant(node, place, scale) for place in places)

    def _weight(self, node: ir.Node, scale: Scale) -> _Fold | None:
        """Scale each column of a product's second operand, with or without groups along the rows."""
        codes, own = shape(node.inputs[0]), shape(node.inputs[1])
        if not codes or own is None or own[-1:] != scale.shape:
            return None
        by_column = len(own) == 2 or node.attributes.get_int("axis", 1) % len(codes) == len(codes) - 1
        return self._constant(node, 1, scale) if by_column else None

    def _split(self, node: ir.Node, value: ir.Value, scale: Scale) -> _Fold | None:
        """Scale the input of a Split so that one part is scaled, and the others are multiplied by 1."""
        rank, axis = len(value.shape or ()), node.attributes.get_int("axis", 0)
        sizes = [part.shape[-1] for part in node.outputs if part.shape is not None and isinstance(part.shape[-1], int)]
        if scale.ndim != 1 or not rank or axis % rank != rank - 1 or len(sizes) < len(node.outputs):
            return None
        parts = [
            scale if part is value else np.ones(size, np.float32)
            for part, size in zip(node.outputs, sizes, strict=True)
        ]
        return self._into(node, 0, np.concatenate(parts), node.inputs[0])

    def _concatenation(self, node: ir.Node, value: ir.Value, scale: Scale) -> _Fold | None:
        """Scale each input of a Concat; if the scale runs along the axis, each input gets its own part of the scale."""
        rank, axis = len(value.shape or ()), node.attributes.get_int("axis", 0)
        if not rank:
            return None
        axis = axis % rank - rank
        scales = [scale] * len(node.inputs)
        if -axis <= scale.ndim and scale.shape[axis] > 1:
            shapes = [part.shape for part in node.inputs if part is not None and part.shape is not None]
            sizes = [size for shape in shapes if isinstance(size := shape[axis], int)]
            if len(sizes) < len(node.inputs):
                return None
            scales = np.split(scale, np.cumsum(sizes)[:-1], axis)
        return _all(self._into(node, place, _least_rank(each), None) for place, each in enumerate(scales))

    def _into(self, node: ir.Node, place: int, scale: Scale, result: ir.Value | None) -> _Fold | None:
        """Return the change that scales one input of a node: its constant or its producer, or a Mul in between.

        A Mul is added only if the input is small: the node repeats it to the shape of `result`.
        """
        value = node.inputs[place]
        if value is None:
            return None
        if constant(value) is not None:
            return self._constant(node, place, scale)
        fold = self.into_output(value, scale)
        if (fold is None or fold.nodes) and _is_repeated(value, scale, result):
            return self._factor(node, place, value, scale)
        return fold

    def _constant(self, node: ir.Node, place: int, scale: Scale) -> _Fold | None:
        value = node.inputs[place]
        tensor = constant(value)
        if value is None or tensor is None:
            return None

        def change() -> None:
            node.replace_input_with(place, self._initializer(str(value.name), tensor.numpy() * scale))

        return _Fold([change])

    def _factor(self, node: ir.Node, place: int, value: ir.Value, scale: Scale) -> _Fold:
        def change() -> None:
            name = f"{self.name}/{value.name}"
            mul = ir.node("Mul", [value, self._initializer("balance", scale)], name=name)
            made = mul.outputs[0]
            made.name, made.type, made.shape = f"{name}:0", value.type, value.shape
            self.graph.insert_before(node, mul)
            node.replace_input_with(place, made)

        return _Fold([change], nodes=1)

    def _initializer(self, called: str, array: Scale) -> ir.Value:
        """Make a new constant, because an existing one may have other readers."""
        name = f"{self.name}/{called}"
        while name in self.graph.initializers:
            name += "/again"
        value = ir.val(name, const_value=ir.Tensor(array.astype(np.float32), name=name))
        self.graph.register_initializer(value)
        return value


def _all(folds: Iterable[_Fold | None]) -> _Fold | None:
    """Return all changes as one; None if one of them is None."""
    total = _Fold()
    for fold in folds:
        if fold is None:
            return None
        total += fold
    return total


def _least_rank(scale: Scale) -> Scale:
    """Return the scale without leading axes of 1."""
    leading = next((axis for axis, size in enumerate(scale.shape) if size > 1), scale.ndim - 1)
    return scale.reshape(scale.shape[leading:])


def _moved_back(node: ir.Node, value: ir.Value, scale: Scale) -> Scale | None:
    """Return the scale to multiply the node's input by, so that its output is multiplied by `scale`.

    None if there is none. The node is a Reshape or a Transpose.
    """
    before = None if node.inputs[0] is None else node.inputs[0].shape
    if before is None or value.shape is None:
        return None
    if node.op_type == "Transpose":
        whole = scale.reshape((1,) * (len(value.shape) - scale.ndim) + scale.shape)
        order = node.attributes.get_ints("perm", None) or tuple(reversed(range(whole.ndim)))
        return _least_rank(whole.transpose(np.argsort(order)))
    if tuple(value.shape[-scale.ndim :]) != scale.shape:  # an axis of 1, which Reshape may merge with others
        return None
    for axes in range(1, len(before) + 1):
        last = [size for size in before[-axes:] if isinstance(size, int)]
        if len(last) < axes or prod(last) > scale.size:
            return None
        if prod(last) == scale.size:
            return scale.reshape(last)
    return None


def _is_repeated(value: ir.Value, scale: Scale, result: ir.Value | None) -> bool:
    """Return True if `value` is repeated along some axis where the result is computed."""
    if value.shape is None or result is None or result.shape is None:
        return False
    rank = len(result.shape)
    sizes = [1] * (rank - len(value.shape)) + list(value.shape)
    scales = (1,) * (rank - scale.ndim) + scale.shape
    return any(size == by == 1 != whole for size, by, whole in zip(sizes, scales, result.shape, strict=True))
