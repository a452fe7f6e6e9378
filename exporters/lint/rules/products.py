"""Define rules about quantized products that a target computes in floating point, or without a fast kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.exporters.float_graph.products import (
    array,
    constant,
    dequantized,
    producer,
    shape,
)
from intaglio.exporters.lint.reader import Checked
from intaglio.exporters.lint.rule import Problems, rule

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.pipeline.formats.target import Target


@rule(
    "floating",
    "warning",
    why=(
        "TensorRT-RTX 1.7.1 computes ConvTranspose in float; ONNX Runtime 1.31.1 has no 8-bit Gemm, and an 8-bit Conv "
        "only if its output is quantized too"
    ),
    fix="leave it in float, or accept the rounding without the speed",
)
def check_floating(graph: Checked, target: Target) -> Problems:
    """Products of codes that the target computes in floating point."""
    for product in graph.products:
        op = product.node.op_type
        match target.limits.integer_products.get(op):
            case None:
                yield product.node, f"{target.name} computes {op} in floating point, on rounded values"
            case "output":
                users = [use.node.op_type for use in product.node.outputs[0].uses()]
                if users != ["QuantizeLinear"]:
                    yield product.node, f"{target.name} computes {op} in floating point unless its output is quantized"
            case "input":
                pass


@rule(
    "between",
    "warning",
    why="TensorRT-RTX 1.7.1 and ONNX Runtime 1.31.1 multiply in floating point",
    fix="quantize right before the product",
)
def check_between(graph: Checked, target: Target) -> Problems:
    """Operators between DequantizeLinear and a product that keep the product in floating point."""
    for product in graph.products:
        casts = [sum(node.op_type == "Cast" for node in end.between) for end in (product.x, product.w)]
        if casts[0] != casts[1]:
            yield product.node, "Cast between DequantizeLinear and the product keeps it in floating point"
    for node in graph.of_type("MatMul", "Gemm", "Conv"):
        w = dequantized(node.inputs[1]) if len(node.inputs) > 1 else None
        stop = producer(node.inputs[0])
        if w is None or not w.is_weight or w.code_type not in ("INT8", "UINT8") or stop is None:
            continue
        if stop.op_type not in ("Add", "Clip", "Concat", "Mul", "Relu", "Resize") or _harmless(stop):
            continue
        before = [dequantized(value) for value in stop.inputs]
        if any(operand is not None and not operand.is_weight for operand in before):
            yield node, f"{stop.op_type} between DequantizeLinear and the product keeps it in floating point"


def _harmless(node: ir.Node) -> bool:
    """Return True for a constant factor, which is merged into the scale, and for parts that share one scale."""
    if node.op_type == "Mul":
        return any(shape(value) == () and constant(value) is not None for value in node.inputs)
    if node.op_type == "Concat":
        scales = [array(o.dequantize.inputs[1]) if (o := dequantized(v)) is not None else None for v in node.inputs]
        return all(s is not None and s.shape == () and s == scales[0] for s in scales)
    return False


@rule(
    "channels",
    "warning",
    why="TensorRT 8.6 found no kernel for 4 channels (NVIDIA/TensorRT issue 3638); multiples of 16 are safe;"
    " TensorRT-RTX 1.7.1 adds zeros to groups of fewer than 4, so that a depthwise input has four times the size",
    fix="leave it in float",
)
def check_channels(graph: Checked, target: Target) -> Problems:
    """8-bit convolutions whose numbers of channels are no multiples of those that kernels take, or in small groups."""
    multiple, least = target.limits.conv_channels_multiple, target.conv_group_channels
    for product in graph.products:
        filters = shape(product.node.inputs[1]) if product.is_convolution else None
        if filters is not None and (filters[0] % multiple or filters[1] % multiple):
            yield product.node, f"8-bit filters of shape {list(filters)}, not of multiples of {multiple} channels"
        elif filters is not None and filters[1] < least and product.node.attributes.get_int("group", 1) > 1:
            yield product.node, f"8-bit filters of shape {list(filters)}, of fewer than {least} channels in each group"
