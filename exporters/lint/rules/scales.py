"""Define rules about scales and zero points: their values, their types, and their axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.exporters.float_graph.products import (
    array,
    is_constant,
    shape,
)
from intaglio.exporters.lint.reader import Checked, named, type_name
from intaglio.exporters.lint.rule import Problems, rule

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from intaglio.pipeline.formats.target import Target


@rule(
    "zero-point",
    "error",
    why="TensorRT quantizes symmetrically (NvInfer.h); the parser refuses the node",
    fix="subtract the offset before QuantizeLinear; after the product it is a constant that can be added to the bias",
)
def check_zero_point(graph: Checked, target: Target) -> Problems:
    """Nonzero zero points on a target with symmetric quantization."""
    import numpy as np

    seen: dict[ir.Value | None, str] = {None: ""}  # many nodes may share one constant
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear") if target.limits.symmetric else ():
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value not in seen:
            zero = array(value)
            other = zero is not None and np.any(zero.astype(np.float32) != 0)
            seen[value] = f"zero point {zero.astype(np.float32).ravel()[0]:g}" if zero is not None and other else ""
        if seen[value]:
            yield node, f"{seen[value]}, but {target.name} takes only 0"


@rule(
    "scale",
    "error",
    why=(
        "the parser accepts positive scales only; 1 / s of a float16 scale below 1.5e-5 is infinite, so every code "
        "becomes the largest one or NaN"
    ),
    fix="bound the scale from below (2^-14 in float16), or keep it in float32",
)
def check_scale(graph: Checked, target: Target) -> Problems:
    """Scales that are not numbers, not positive, or have no reciprocal in their type."""
    seen: dict[ir.Value | None, tuple[str, str]] = {}
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        value = node.inputs[1]
        if value not in seen:
            seen[value] = _scale_problems(array(value), positive=target.limits.symmetric)
        bad, tiny = seen[value]
        if bad:
            yield node, bad
        if tiny and target.limits.reciprocal_scales and node.op_type == "QuantizeLinear":
            yield node, tiny


def _scale_problems(scale: NDArray[np.generic] | None, *, positive: bool) -> tuple[str, str]:
    """Describe scales that cannot be divided by, and scales without a reciprocal; empty if there are none."""
    import numpy as np

    if scale is None:
        return "", ""
    s = scale.astype(np.float64).ravel()
    bad = s[~(np.isfinite(s) & ((s > 0) if positive else (s != 0)))]
    largest = 65504  # float16 ends here; the reciprocals fit in types of more range
    tiny = s[(s > 0) & (s < 1 / largest)] if scale.dtype == np.float16 else s[:0]
    return (
        f"{bad.size} of {s.size} scales cannot be divided by, such as {bad[0]:g}" if bad.size else "",
        f"scale {tiny[0]:.2g}, whose reciprocal float16 does not hold" if tiny.size else "",
    )


@rule(
    "scale-type",
    "error",
    why=(
        "TensorRT up to 10.12 requires equal types (NvInfer.h); ONNX Runtime 1.31.1 neither loads nor runs other "
        "graphs; TensorRT-RTX 1.7.1 refuses operands whose scales have different types"
    ),
    fix="give the scale the type of the tensor, and both operands the same",
)
def check_scale_type(graph: Checked, target: Target) -> Problems:
    """Scales whose type differs from that of their tensor, or of the other operand's scale."""
    for node in graph.of_type("QuantizeLinear"):
        x, scale = node.inputs[0], node.inputs[1]
        if target.limits.mixed_scale_types or x is None or scale is None or x.dtype is None or scale.dtype is None:
            continue
        if x.dtype != scale.dtype:
            yield node, f"{x.dtype.name} values with a scale in {scale.dtype.name}"
    for product in graph.products:
        x, w = product.x.dequantize.inputs[1], product.w.dequantize.inputs[1]
        apart = x is not None and w is not None and x.dtype != w.dtype
        if apart and product.w.granularity == "channel" and not product.is_convolution:
            yield (
                product.node,
                f"the scale of the input is in {type_name(x)}, but the scales of the weight are in {type_name(w)}",
            )


@rule(
    "computed-scale",
    "error",
    why="an error up to TensorRT 10.12 (NvInfer.h); TensorRT-RTX 1.7.1 multiplies in floating point without a warning",
    fix="divide by the computed part before QuantizeLinear, and multiply by it after the product",
)
def check_computed_scale(graph: Checked, target: Target) -> Problems:
    """Scales that the graph computes, which keep a product in floating point."""
    if not target.limits.constant_scales:
        return
    for product in graph.products:
        for operand in (product.x, product.w):
            if not is_constant(operand.dequantize.inputs[1]):
                yield operand.dequantize, f"its scale is computed, and {named(product.node)} needs a constant"


@rule(
    "input-scale",
    "error",
    why=(
        "TensorRT-RTX 1.7.1 multiplies in floating point, or does not build for groups; ONNX Runtime 1.31.1 fails when "
        "it runs"
    ),
    fix="give the input a single scale, a scalar; scale its channels with a Mul in front",
)
def check_input_scale(graph: Checked, target: Target) -> Problems:
    """Inputs of products with a scale for each channel or group."""
    for product in graph.products:
        op = product.node.op_type
        for operand in (product.x, product.w):
            if operand.is_weight:
                continue
            scale = shape(operand.dequantize.inputs[1])
            if operand.granularity in ("channel", "group"):
                yield operand.dequantize, f"scales of shape {list(scale or ())} for the input of {named(product.node)}"
            elif scale and op not in target.limits.one_element_scales:
                yield (
                    operand.dequantize,
                    f"a scale of shape {list(scale)}, which {op} interprets as one scale for each channel",
                )


@rule(
    "weight-axis",
    "error",
    why="TensorRT-RTX 1.7.1 multiplies in floating point; ONNX Runtime 1.31.1 fails when it runs",
    fix="scale the output channels: axis 1 of [K, N], 0 of [N, K] and of convolutions",
)
def check_weight_axis(graph: Checked, target: Target) -> Problems:
    """Weights whose scales lie along another axis than the output channels."""
    for product in graph.products:
        if not product.w.is_weight or product.w.granularity != "channel":
            continue
        axis = product.w.channel_axis
        if axis is not None and axis != product.output_axis:
            yield (
                product.w.dequantize,
                f"scales along axis {axis} of the weight of {named(product.node)}, whose channels are on axis "
                f"{product.output_axis}",
            )
