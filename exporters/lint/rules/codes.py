"""Rules of `lint` about quantized tensors: what is refused, computed wrongly, or taken off the integers."""

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
from intaglio.exporters.lint.reader import Checked, Problems, named

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from intaglio.pipeline.formats.target import Target


def check_code_type(graph: Checked, target: Target) -> Problems:
    """Codes of a type that the target reads as another, or not at all."""
    known = frozenset(target.limits.code_types)
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        made = producer(node.inputs[0])
        if node.op_type == "DequantizeLinear" and made is not None and made.op_type == "QuantizeLinear":
            continue  # said of the node that makes the codes
        if (found := code_type(node)) not in known and found not in ("unknown", "INT32"):  # INT32: a bias
            yield node, f"codes of type {found}, but {target.name} reads {', '.join(target.limits.code_types)}"


def check_zero_point(graph: Checked, target: Target) -> Problems:
    """Zero points that are not zero where quantization is symmetric."""
    import numpy as np

    seen: dict[ir.Value | None, str] = {None: ""}  # one constant may be of many nodes
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear") if target.limits.symmetric else ():
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value not in seen:
            zero = array(value)
            other = zero is not None and np.any(zero.astype(np.float32) != 0)
            seen[value] = f"zero point {zero.astype(np.float32).ravel()[0]:g}" if zero is not None and other else ""
        if seen[value]:
            yield node, f"{seen[value]}, but {target.name} has none"


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
    """What cannot be divided by, and what has no reciprocal; empty where nothing is wrong."""
    import numpy as np

    if scale is None:
        return "", ""
    s = scale.astype(np.float64).ravel()
    bad = s[~(np.isfinite(s) & ((s > 0) if positive else (s != 0)))]
    largest = 65504  # of float16; for types of more range, a reciprocal always fits
    tiny = s[(s > 0) & (s < 1 / largest)] if scale.dtype == np.float16 else s[:0]
    return (
        f"{bad.size} of {s.size} scales cannot be divided by, such as {bad[0]:g}" if bad.size else "",
        f"scale {tiny[0]:.2g}, whose reciprocal float16 does not hold" if tiny.size else "",
    )


def check_scale_type(graph: Checked, target: Target) -> Problems:
    """Scales of another type than their tensor, or than the other operand."""
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
            yield product.node, f"the input has its scale in {_type(x)}, the weight's channels theirs in {_type(w)}"


def _type(value: ir.Value | None) -> str:
    return "a type not known" if value is None or value.dtype is None else value.dtype.name


def check_computed_scale(graph: Checked, target: Target) -> Problems:
    """Scales that the graph computes, which keep a product off the integers."""
    if not target.limits.constant_scales:
        return
    for product in graph.products:
        for operand in (product.x, product.w):
            if not is_constant(operand.dequantize.inputs[1]):
                yield operand.dequantize, f"its scale is computed, and {named(product.node)} needs a constant"


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
                yield operand.dequantize, f"a scale of shape {list(scale)}, which {op} takes for one a channel"


def check_weight_axis(graph: Checked, target: Target) -> Problems:
    """Weights with scales along another axis than the output channels."""
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


def check_input_by_groups(graph: Checked, target: Target) -> Problems:
    """8-bit inputs by weights in groups."""
    known = {product.node for product in graph.products}
    for product in graph.products:
        if product.w.is_weight and product.w.granularity == "group":
            yield product.node, _by_groups("8-bit", product.w)
    for node, (x, w) in _pairs(graph, target):  # other codes, or a factor in front of the product
        if node not in known and w.granularity == "group":
            yield node, _by_groups(x.code_type, w)


def _by_groups(x: str, w: Operand) -> str:
    return f"an {x} input and a weight with scales of shape {list(shape(w.dequantize.inputs[1]) or ())}"


def check_mixed_codes(graph: Checked, target: Target) -> Problems:
    """Products of codes of two types."""
    for node, (x, w) in _pairs(graph, target):
        if x.code_type != w.code_type and (x.code_type, w.code_type) != ("INT8", "INT4"):
            yield node, f"an input in {x.code_type} and a weight in {w.code_type}"


def _pairs(graph: Checked, target: Target) -> Iterator[tuple[ir.Node, tuple[Operand, Operand]]]:
    """Products of an input and a weight in codes that the target reads, where it multiplies codes of one type only."""
    for node in graph.of_type(*PRODUCTS) if target.limits.same_codes else ():
        operands = [_factored(value) for value in node.inputs[:2]]
        x, w = sorted(filter(None, operands), key=lambda operand: operand.is_weight) if all(operands) else (None, None)
        if x is None or w is None or x.is_weight or not w.is_weight:
            continue
        if {x.code_type, w.code_type} <= set(target.limits.code_types):
            yield node, (x, w)


def _factored(value: ir.Value | None) -> Operand | None:
    """As `dequantized`, through a single constant factor as well, which joins the scale."""
    found, node = dequantized(value), producer(value)
    if found is not None or node is None or node.op_type not in ("Mul", "Div"):
        return found
    factors = [v for v in node.inputs if constant(v) is not None and prod(shape(v) or ()) == 1]
    return next((dequantized(v) for v in node.inputs if v not in factors), None) if factors else None


def check_input_by_int4(graph: Checked, target: Target) -> Problems:
    """8-bit inputs by 4-bit weights."""
    for product in graph.products:
        kind: Literal["conv", "linear"] = "conv" if product.is_convolution else "linear"
        if product.w.code_type not in ("INT4", "UINT4") or product.w.granularity == "group":
            continue
        if kind not in target.limits.int4_by_int8:
            yield product.node, f"an 8-bit input and a 4-bit weight in a {kind} layer"
        elif product.w.granularity == "tensor":
            yield product.node, "an 8-bit input and a 4-bit weight with a single scale"


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


def check_groups(graph: Checked, target: Target) -> Problems:
    """Groups that do not divide an axis, lie along the wrong one, or are not as many as the scales."""
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


def check_int4_shape(graph: Checked, target: Target) -> Problems:
    """4-bit weights of too many axes, or with an odd last one."""
    most = target.limits.int4_rank_max
    for node in graph.of_type("DequantizeLinear"):
        codes = shape(node.inputs[0])
        if code_type(node) != "INT4" or not codes:
            continue
        if most is not None and len(codes) > most:
            yield node, f"a 4-bit weight of {len(codes)} axes, but {target.name} takes {most}"
        if target.limits.int4_even and codes[-1] % 2:
            yield node, f"a 4-bit weight of shape {list(codes)}, but {target.name} takes an even last axis"


def check_half_sum(graph: Checked, target: Target) -> Problems:
    """Float16 products that are written before the scales of their channels."""
    for product in graph.products:
        scale = product.w.dequantize.inputs[1]
        if not target.limits.unscaled_half_sums or product.is_convolution or product.w.granularity != "channel":
            continue
        cast = any(node.op_type == "Cast" for node in product.w.between)
        if not cast and scale is not None and scale.dtype is not None and scale.dtype.name == "FLOAT16":
            yield product.node, "the sum of 8-bit products is written to float16 before its channels are scaled"


def check_moved_codes(graph: Checked, target: Target) -> Problems:
    """Constant codes that something else than DequantizeLinear reads."""
    if not target.limits.codes_only_dequantized:
        return
    for owner in (graph.model.graph, *graph.model.graph.subgraphs()):
        for value in owner.initializers.values():
            if value.dtype is None or value.dtype.name not in ("INT8", "INT4"):
                continue
            for node in dict.fromkeys(use.node for use in value.uses()):
                if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                    yield node, f"reads the codes {value.name}, which {target.name} gives to DequantizeLinear alone"


def check_codes_between(graph: Checked, target: Target) -> Problems:
    """Operators between QuantizeLinear and DequantizeLinear."""
    for node in () if target.limits.moves_codes else graph.of_type("DequantizeLinear"):
        mover = producer(node.inputs[0])
        if mover is not None and mover.op_type != "QuantizeLinear" and not is_constant(node.inputs[0]):
            yield mover, f"moves codes on their way to {named(node)}"


def check_shared_zero_point(graph: Checked, target: Target) -> Problems:
    """8-bit weights with one zero point in common."""
    seen: dict[str, ir.Node] = {}
    for product in () if target.limits.shared_zero_points else graph.products:
        weight = product.w.dequantize
        zero = weight.inputs[2] if product.w.is_weight and len(weight.inputs) > 2 else None
        if zero is None or zero.name is None or product.w.code_type != "INT8":
            continue
        first = seen.setdefault(zero.name, weight)
        if first is not weight:
            yield weight, f"has its zero point {zero.name} in common with {named(first)}"


def check_channels(graph: Checked, target: Target) -> Problems:
    """8-bit convolutions whose channels are not multiples of what kernels take."""
    multiple = target.limits.conv_channels_multiple
    for product in graph.products:
        filters = shape(product.node.inputs[1]) if product.is_convolution else None
        if filters is not None and (filters[0] % multiple or filters[1] % multiple):
            yield product.node, f"8-bit filters of shape {list(filters)}, not of multiples of {multiple} channels"


def check_int8_moves(graph: Checked, target: Target) -> Problems:
    """Int8 inputs that are moved about, which does not load."""
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
    """Whether it is MatMul, of more than two axes, and Add of a constant, and nothing else."""
    users = [use.node for use in node.outputs[0].uses()]
    x = node.inputs[0]
    wide = x is not None and x.shape is not None and len(x.shape) > 2
    return (
        wide and [user.op_type for user in users] == ["Add"] and any(constant(v) is not None for v in users[0].inputs)
    )


def check_input_type(graph: Checked, target: Target) -> Problems:
    """Int8 inputs of products where the target multiplies unsigned ones."""
    for product in graph.products:
        if target.activation_dtype == "uint8" and product.x.code_type == "INT8":
            yield product.x.dequantize, f"int8 codes for the input of {named(product.node)}"


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


def check_between(graph: Checked, target: Target) -> Problems:
    """Operators between DequantizeLinear and a product, which keep it in floating point."""
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
    """A factor joins the scale, and parts that share one scale are one tensor."""
    if node.op_type == "Mul":
        return any(shape(value) == () and constant(value) is not None for value in node.inputs)
    if node.op_type == "Concat":
        scales = [array(o.dequantize.inputs[1]) if (o := dequantized(v)) is not None else None for v in node.inputs]
        return all(s is not None and s.shape == () and s == scales[0] for s in scales)
    return False
