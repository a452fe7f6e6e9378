"""Define rules about integer codes: which codes meet in a product, how they are stored, and what may move them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Literal

from intaglio.exporters.float_graph.products import (
    PRODUCTS,
    Operand,
    array,
    code_type,
    constant,
    dequantized,
    granularity,
    is_constant,
    producer,
    shape,
)
from intaglio.exporters.lint.reader import Checked, named
from intaglio.exporters.lint.rule import Problems, rule

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.pipeline.formats.target import Target


@rule(
    "input-by-groups",
    "error",
    why=(
        "TensorRT-RTX 1.7.1 does not build it in 3-D and ignores all groups but the first in 2-D; ONNX Runtime 1.31.1 "
        "fails when it runs, or multiplies in float"
    ),
    fix="give the weight one scale for each channel, or leave the input in float",
)
def check_input_by_groups(graph: Checked, target: Target) -> Problems:
    """8-bit inputs of products whose weights are scaled in groups."""
    known = {product.node for product in graph.products}
    for product in graph.products:
        if product.w.is_weight and product.w.granularity == "group":
            yield product.node, _by_groups("8-bit", product.w)
    for node, (x, w) in _pairs(graph, target):  # codes of other types, or a factor before the product
        if node not in known and w.granularity == "group" and x.code_type != "FLOAT4E2M1":
            yield node, _by_groups(x.code_type, w)


def _by_groups(x: str, w: Operand) -> str:
    return f"an {x} input and a weight with scales of shape {list(shape(w.dequantize.inputs[1]) or ())}"


@rule(
    "mixed-codes",
    "error",
    why=(
        "TensorRT-RTX 1.7.1 does not build a linear layer of them (input and filter have to be the same type), and "
        "computes a convolution in float"
    ),
    fix="quantize both to one type, or leave the input in float",
)
def check_mixed_codes(graph: Checked, target: Target) -> Problems:
    """Products whose two operands have codes of different types."""
    for node, (x, w) in _pairs(graph, target):
        if x.code_type != w.code_type and (x.code_type, w.code_type) != ("INT8", "INT4"):
            yield node, f"an input in {x.code_type} and a weight in {w.code_type}"


def _pairs(graph: Checked, target: Target) -> Iterator[tuple[ir.Node, tuple[Operand, Operand]]]:
    """Yield products of a quantized input and weight, for a target that multiplies only codes of one type."""
    for node in graph.of_type(*PRODUCTS) if target.limits.same_codes else ():
        operands = [_factored(value) for value in node.inputs[:2]]
        x, w = sorted(filter(None, operands), key=lambda operand: operand.is_weight) if all(operands) else (None, None)
        if x is None or w is None or x.is_weight or not w.is_weight:
            continue
        if {x.code_type, w.code_type} <= set(target.limits.code_types):
            yield node, (x, w)


def _factored(value: ir.Value | None) -> Operand | None:
    """Return the operand as `dequantized` does, also through one constant factor, which is merged into the scale."""
    found, node = dequantized(value), producer(value)
    if found is not None or node is None or node.op_type not in ("Mul", "Div"):
        return found
    factors = [v for v in node.inputs if constant(v) is not None and prod(shape(v) or ()) == 1]
    return next((dequantized(v) for v in node.inputs if v not in factors), None) if factors else None


@rule(
    "input-by-int4",
    "error",
    why=(
        "TensorRT documents int4 only for weights beside float inputs; TensorRT-RTX 1.7.1 builds such a product only "
        "for linear layers with one scale for each channel; ONNX Runtime 1.31.1 multiplies in float"
    ),
    fix="store the weight as int8 codes, or leave the input in float",
)
def check_input_by_int4(graph: Checked, target: Target) -> Problems:
    """8-bit inputs of products with 4-bit weights."""
    for product in graph.products:
        kind: Literal["conv", "linear"] = "conv" if product.is_convolution else "linear"
        if product.w.code_type not in ("INT4", "UINT4") or product.w.granularity == "group":
            continue
        if kind not in target.limits.int4_by_int8:
            yield product.node, f"an 8-bit input and a 4-bit weight in a {kind} layer"
        elif product.w.granularity == "tensor":
            yield product.node, "an 8-bit input and a 4-bit weight with a single scale"


@rule(
    "requantized",
    "error",
    why=(
        "TensorRT-RTX 1.7.1 removes the pair if both scales are equal, and then refuses the 4-bit type; if the shapes "
        "of the scales differ, its process ends with SIGSEGV"
    ),
    fix=(
        "give QuantizeLinear and DequantizeLinear scales of the same shape, and make them smaller than the scales of "
        "the 4-bit codes"
    ),
)
def check_requantized(graph: Checked, target: Target) -> Problems:
    """Weights that are scaled and quantized again in the graph, with scales that the builder cannot take."""
    import numpy as np

    for dequantize in graph.of_type("DequantizeLinear"):
        quantize = producer(dequantize.inputs[0])
        if quantize is None or quantize.op_type != "QuantizeLinear" or not is_constant(quantize.inputs[0]):
            continue
        before = dequantized(quantize.inputs[0])
        if before is not None and before.code_type == "INT4" and target.limits.symmetric:
            first, second = array(before.dequantize.inputs[1]), array(quantize.inputs[1])
            if first is not None and second is not None and np.array_equal(first, second):
                yield quantize, "4-bit codes are scaled and quantized again with the same scale"
        users = {use.node.op_type for use in dequantize.outputs[0].uses()}
        if target.limits.mixed_pairs or not users & {"MatMul", "Gemm"}:
            continue
        if granularity(quantize) == "tensor" and granularity(dequantize) == "channel":
            yield dequantize, "a weight quantized with one scale is read with one for each channel"


@rule(
    "groups",
    "error",
    why=(
        "the TensorRT parser ignores block_size and takes K / rows of the scale, so that a short last group regroups "
        "all weights without a warning"
    ),
    fix="take a group size that divides K, and write one scale for each group",
)
def check_groups(graph: Checked, target: Target) -> Problems:
    """Groups that do not divide their axis, lie along a wrong axis, or do not match the number of scales."""
    limits = target.limits
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        size, codes, scale = node.attributes.get_int("block_size", 0), shape(node.inputs[0]), shape(node.inputs[1])
        if not size or codes is None or scale is None or len(codes) != len(scale):
            continue
        axis = node.attributes.get_int("axis", 1) % len(codes)
        k = codes[axis]
        if k % size and not limits.ragged_groups:
            yield node, f"{k} input features are not a multiple of the group size {size}"
        expected = (*codes[:axis], -(-k // size), *codes[axis + 1 :])
        if scale != expected:
            yield node, f"scales of shape {list(scale)}, but groups of {size} need {list(expected)}"
        if limits.trailing_groups and axis < len(codes) - 2:
            yield node, f"groups along axis {axis} of {len(codes)}, but {target.name} takes the last two"


@rule(
    "int4-shape",
    "error",
    why="4-bit weights have two axes up to TensorRT 10.6 (NvInfer.h), and are packed in pairs along the last",
    fix="store it in 2-D with an even last axis, and reshape or slice what DequantizeLinear makes",
)
def check_int4_shape(graph: Checked, target: Target) -> Problems:
    """4-bit weights with too many axes, or with an odd last axis."""
    most = target.limits.int4_rank_max
    for node in graph.of_type("DequantizeLinear"):
        codes = shape(node.inputs[0])
        if code_type(node) != "INT4" or not codes:
            continue
        if most is not None and len(codes) > most:
            yield node, f"a 4-bit weight of {len(codes)} axes, but {target.name} takes {most}"
        if target.limits.int4_even and codes[-1] % 2:
            yield node, f"a 4-bit weight of shape {list(codes)}, but {target.name} takes an even last axis"


@rule(
    "half-sum",
    "error",
    why=(
        "TensorRT-RTX 1.7.1 writes the sums of the product in float16 before it applies the scales: at K = 4608, 28 % "
        "of the outputs overflow"
    ),
    fix=(
        "give the weight one scale, and multiply the output by the scale of each channel; or compute the product in "
        "float32"
    ),
)
def check_half_sum(graph: Checked, target: Target) -> Problems:
    """Float16 products that are written before the scales of their channels are applied."""
    for product in graph.products:
        scale = product.w.dequantize.inputs[1]
        if not target.limits.unscaled_half_sums or product.is_convolution or product.w.granularity != "channel":
            continue
        cast = any(node.op_type == "Cast" for node in product.w.between)
        if not cast and scale is not None and scale.dtype is not None and scale.dtype.name == "FLOAT16":
            yield product.node, "the sum of 8-bit products is written to float16 before its channels are scaled"


@rule(
    "moved-codes",
    "error",
    why="TensorRT-RTX 1.7.1 does not build such a graph; Cast in TensorRT 10 does not accept int8 or int4",
    fix="change the layout of the codes in the file, or of the output of DequantizeLinear",
)
def check_moved_codes(graph: Checked, target: Target) -> Problems:
    """Constant codes that another operator than DequantizeLinear reads."""
    if not target.limits.codes_only_dequantized:
        return
    for owner in (graph.model.graph, *graph.model.graph.subgraphs()):
        for value in owner.initializers.values():
            if value.dtype is None or value.dtype.name not in ("INT8", "INT4"):
                continue
            for node in dict.fromkeys(use.node for use in value.uses()):
                if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                    yield (
                        node,
                        f"reads constant codes {value.name}: on {target.name} only DequantizeLinear does",
                    )


@rule(
    "codes-between",
    "error",
    why="TensorRT 10.16.2 builds such a graph on Thor, but not on Orin (NVIDIA/TensorRT issue 4832)",
    fix="change the layout before QuantizeLinear, or after DequantizeLinear",
)
def check_codes_between(graph: Checked, target: Target) -> Problems:
    """Operators between QuantizeLinear and DequantizeLinear."""
    for node in () if target.limits.moves_codes else graph.of_type("DequantizeLinear"):
        mover = producer(node.inputs[0])
        if mover is not None and mover.op_type != "QuantizeLinear" and not is_constant(node.inputs[0]):
            yield mover, f"changes codes between QuantizeLinear and {named(node)}"


@rule(
    "shared-zero-point",
    "error",
    why=(
        "with session.x64quantprecision=1, which CPUs without VNNI need for exact sums, ONNX Runtime 1.31.1 rewrites "
        "the zero point for the first weight, and then cannot load the second"
    ),
    fix="give each weight a zero point of its own",
)
def check_shared_zero_point(graph: Checked, target: Target) -> Problems:
    """8-bit weights that share one zero point."""
    seen: dict[str, ir.Node] = {}
    for product in () if target.limits.shared_zero_points else graph.products:
        weight = product.w.dequantize
        zero = weight.inputs[2] if product.w.is_weight and len(weight.inputs) > 2 else None
        if zero is None or zero.name is None or product.w.code_type != "INT8":
            continue
        first = seen.setdefault(zero.name, weight)
        if first is not weight:
            yield weight, f"has its zero point {zero.name} in common with {named(first)}"


@rule(
    "int8-moves",
    "error",
    why=(
        "on x86-64, with or without VNNI, ONNX Runtime 1.31.1 converts int8 inputs to uint8, and then does not load "
        "the converted graph"
    ),
    fix="write uint8 codes with zero point 128",
)
def check_int8_moves(graph: Checked, target: Target) -> Problems:
    """Int8 inputs with a zero point that another operator moves, or that enter a product with a bias."""
    if target.limits.moves_int8 or graph.opset < 21:
        return
    for node in graph.of_type("DequantizeLinear"):
        operand = Operand(node, ())
        quantize = operand.quantize
        if quantize is None or operand.is_weight or operand.code_type != "INT8" or len(quantize.inputs) < 3:
            continue
        for user in dict.fromkeys(use.node for use in node.outputs[0].uses()):
            if user.op_type in ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"):
                yield user, "moves an input that was quantized to int8 with a zero point"
            elif user.op_type == "MatMul" and _biased(user):
                yield user, "an int8 input with a zero point, in a product that becomes a Gemm with its bias"


def _biased(node: ir.Node) -> bool:
    """Return True for a MatMul of more than two axes whose only user is an Add of a constant."""
    users = [use.node for use in node.outputs[0].uses()]
    x = node.inputs[0]
    wide = x is not None and x.shape is not None and len(x.shape) > 2
    return (
        wide and [user.op_type for user in users] == ["Add"] and any(constant(v) is not None for v in users[0].inputs)
    )


@rule(
    "input-type",
    "warning",
    why=(
        "in ONNX Runtime 1.31.1, layers stay in float if they share an int8 input, or if their int8 input has no zero "
        "point"
    ),
    fix="write uint8 codes with zero point 128",
)
def check_input_type(graph: Checked, target: Target) -> Problems:
    """Int8 inputs of products on a target that multiplies unsigned inputs."""
    for product in graph.products:
        if target.activation_dtype == "uint8" and product.x.code_type == "INT8":
            yield product.x.dequantize, f"int8 codes for the input of {named(product.node)}"
