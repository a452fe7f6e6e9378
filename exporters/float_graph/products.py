"""Find in any graph the products of two dequantized operands: those that should run on integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

Granularity: TypeAlias = Literal["tensor", "channel", "group"]

MOVES = frozenset(
    {"Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that select or move values: a product after them still runs on integers (TensorRT-RTX 1.7.1)."""

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_FARTHEST = 64
"""Largest number of nodes to look back: long chains before many products would take hours."""
_MOST_ELEMENTS = 1 << 23
"""Largest number of elements of a constant that is read: scales of groups of 16 in a weight of 10^8."""
CODES = frozenset({"INT8", "UINT8", "INT4", "UINT4", "FLOAT8E4M3FN"})


@dataclass(frozen=True)
class Operand:
    """Operand of a product: the DequantizeLinear that made it, and the nodes after it, nearest to the product first."""

    dequantize: ir.Node
    between: tuple[ir.Node, ...]

    @property
    def code_type(self) -> str:
        """Return the type of the codes, such as `INT8` or `UINT4`."""
        return code_type(self.dequantize)

    @cached_property
    def is_weight(self) -> bool:
        """True if its codes are constant."""
        return is_constant(self.dequantize.inputs[0])

    @property
    def quantize(self) -> ir.Node | None:
        """Node that made its codes, if it is in the graph."""
        maker = producer(self.dequantize.inputs[0])
        return maker if maker is not None and maker.op_type == "QuantizeLinear" else None

    @property
    def granularity(self) -> Granularity | None:
        """Granularity of its scale; None if the shape is unknown."""
        return granularity(self.dequantize)

    @property
    def channel_axis(self) -> int | None:
        """Axis of the operand with a scale for each position; None if it is unknown."""
        codes_shape, scale_shape = shape(self.dequantize.inputs[0]), shape(self.dequantize.inputs[1])
        if not codes_shape or scale_shape is None:  # a scalar has no axes
            return None
        if len(scale_shape) == 1:
            axis = self.dequantize.attributes.get_int("axis", 1) % len(codes_shape)
        else:  # one group along the other axis
            axis = next((axis for axis, size in enumerate(scale_shape) if size > 1), 0)
        for node in reversed(self.between):
            match node.op_type:
                case "Transpose":
                    order = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(codes_shape))))
                    axis = order.index(axis)
                case "Cast" | "Identity":
                    pass
                case "Reshape" if axis == 0:  # (N, K) -> (N, C, kh, kw), the one that weights are stored for
                    pass
                case _:
                    return None
        return axis


@dataclass(frozen=True)
class Product:
    """Matrix product or convolution of two quantized operands: `x` is computed, `w` is a weight or computed."""

    node: ir.Node
    x: Operand
    w: Operand
    left: bool
    """True if the weight is the first operand."""

    @property
    def is_convolution(self) -> bool:
        """Return True for a convolution, False for a matrix product."""
        return self.node.op_type.startswith("Conv")

    @property
    def output_axis(self) -> int:
        """Axis of the weight that becomes the output's channels."""
        match self.node.op_type:
            case "Conv":
                return 0
            case "ConvTranspose":
                return 1
            case "Gemm":
                transposed = self.node.attributes.get_int("transA" if self.left else "transB", 0)
                return int(self.left) ^ int(not transposed)
            case _:
                rank = len(shape(self.w.dequantize.inputs[0]) or ())
                return rank - 2 if self.left else rank - 1


def products(nodes: list[ir.Node]) -> Iterator[Product]:
    """Yield the products whose operands both come from integer codes."""
    for node in nodes:
        if node.op_type not in PRODUCTS or len(node.inputs) < 2:
            continue
        first, second = dequantized(node.inputs[0]), dequantized(node.inputs[1])
        if first is None or second is None or not {first.code_type, second.code_type} <= CODES:
            continue
        if first.is_weight and second.is_weight:
            continue
        yield Product(node, second, first, True) if first.is_weight else Product(node, first, second, False)


def dequantized(value: ir.Value | None) -> Operand | None:
    """Return the operand behind `value`, through nodes that only move or cast it."""
    between: list[ir.Node] = []
    node = producer(value)
    while node is not None and node.op_type in MOVES | {"Cast"} and len(between) < _FARTHEST:
        between.append(node)
        node = producer(node.inputs[0])
    return Operand(node, tuple(between)) if node is not None and node.op_type == "DequantizeLinear" else None


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value; None for inputs and constants."""
    return None if value is None else value.producer()


def code_type(node: ir.Node) -> str:
    """Return the type of codes of a QuantizeLinear or DequantizeLinear; UINT8 if QuantizeLinear names none."""
    import onnx_ir as ir

    if node.op_type == "QuantizeLinear":
        if declared := node.attributes.get_int("output_dtype", 0):
            return ir.DataType(declared).name
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        return "UINT8" if zero is None or zero.dtype is None else zero.dtype.name
    maker = producer(node.inputs[0])
    if maker is not None and maker.op_type == "QuantizeLinear":
        return code_type(maker)
    codes = node.inputs[0]
    return "unknown" if codes is None or codes.dtype is None else codes.dtype.name


def granularity(node: ir.Node) -> Granularity | None:
    """Return the granularity of a node's scale; one single group along an axis does not count as groups."""
    scale = shape(node.inputs[1])
    if scale is None:
        return None
    if prod(scale) == 1:
        return "tensor"
    return "channel" if sum(size > 1 for size in scale) == 1 and not _has_groups(node, scale) else "group"


def _has_groups(node: ir.Node, scale: tuple[int, ...]) -> bool:
    """Return True if there is more than one scale along the axis of the groups."""
    return len(scale) > 1 and scale[node.attributes.get_int("axis", 1) % len(scale)] > 1


def shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a value; None if it is unknown or varies between runs."""
    if value is None:
        return None
    tensor = constant(value)
    found = value.shape if tensor is None else tensor.shape
    if found is None:
        return None
    known = tuple(size for size in found if isinstance(size, int))
    return known if len(known) == len(found) else None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant of a value: an initializer, or the output of Constant; else None."""
    import onnx_ir as ir

    return None if value is None else ir.convenience.get_const_tensor(value)


def array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the constant in memory if it is not too large. Raises RecipeError if its file has another size."""
    tensor = constant(value)
    try:
        return None if tensor is None or tensor.size > _MOST_ELEMENTS else tensor.numpy()
    except (ValueError, TypeError) as e:
        raise RecipeError(f"constant {value.name if value else ''}: {e}") from e


def is_constant(value: ir.Value | None) -> bool:
    """Return True if the value does not depend on the graph's inputs."""
    pending = [value]
    seen: set[ir.Value] = set()
    while pending and len(seen) < _FARTHEST:
        current = pending.pop()
        if current is None or current in seen or constant(current) is not None:
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            return False
        pending += node.inputs
    return not pending
