"""Write the product of each scheme, and the rounding of its input, as ONNX operators.

They are written so that a runtime multiplies codes where it can.

Shapes: N out features, K in features, G = K // size groups, C input channels, kh kw kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from intaglio.exporters.qdq.call import Call
from intaglio.exporters.qdq.writer import Entering, Product, Writer
from intaglio.pipeline.errors import ContractError, TargetError
from intaglio.pipeline.formats.schemes import (
    Float,
    LayerScheme,
    w4a4_step,
    w4a4_token,
    w4a8_step,
    w4a8_token,
    w4a16,
    w8ga16,
    with_shift,
)
from intaglio.pipeline.formats.target import OpKind
from intaglio.pipeline.numerics.minifloat import BLOCK, BLOCK_UNIT, E4M3
from intaglio.pipeline.numerics.rounding import INPUT_HIGH, input_scale
from intaglio.pipeline.runs.registry import find_runtime

_GROUP = 64
W4A16, W8GA16 = w4a16(_GROUP), w8ga16(_GROUP)
"""Schemes of 4-bit and 8-bit weights in groups. A row with this scheme serves every group size."""
TWO_LEVEL_STEP = (w4a8_step(_GROUP), w4a4_step(_GROUP))
"""Schemes with two-level weights and one input scale for each step. A row serves every group size."""
TWO_LEVEL = (w4a8_token(_GROUP), w4a4_token(_GROUP), *TWO_LEVEL_STEP)
"""All schemes with two-level weights. A row serves every group size."""


def per_channel(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write x @ DQ(Wq, s_w); s_w has the shape (N,).

    It serves any weight with one scale for each output channel, in the type of its codes: int8 for 6-bit codes.
    """
    linear, shape = call.op == "linear", call.site.weight_shape
    codes = w.codes(
        f"{w.owner(call)}/weight",
        call,
        lambda q_NK: q_NK.T if linear else q_NK.reshape(shape),
        shape[::-1] if linear else shape,
    )
    weight = _dequantize_channels(w, call, codes)
    return _product(w, call, x, weight)


def two_level_cast(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write x @ DQ(Reshape(Cast(Wq) * g), s_w): 4-bit codes become 8-bit codes when the graph is loaded."""
    layer, size = call.site.layer, call.group_size
    n, k = call.shape_NK
    linear = call.op == "linear"
    order = (1, 2, 0) if linear else (0, 1, 2)
    sizes = (n, k // size, size)
    codes = w.codes(
        f"{layer}/weight",
        call,
        lambda q_NK: q_NK.reshape(sizes).transpose(order),
        [sizes[axis] for axis in order],
        packed=True,
    )
    # no DequantizeLinear and QuantizeLinear: ONNX Runtime does not fold them, and computes them again in every run
    cast = w.op(call, "weight/Cast", [codes], {"to": ir.DataType.INT8.value})
    group = w.constant(f"{w.owner(call)}/group", call.group_NG[..., None].transpose(order))
    product = w.op(call, "weight/Mul", [cast, group])
    shape = (k, n) if linear else call.site.weight_shape
    weight = w.op(call, "weight/Reshape", [product, w.constant(f"{layer}/shape", np.array(shape))])
    weight.type, weight.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(shape)
    return _product(w, call, x, _dequantize_channels(w, call, weight))


def _dequantize_channels(w: Writer, call: Call, codes: ir.Value) -> ir.Value:
    """Dequantize 8-bit codes (K, N), or (N, C, kh, kw), by channel."""
    n = call.shape_NK[0]
    scale = w.constant(f"{call.site.layer}/scale", call.product_scale_N)
    # one for each call: with x64quantprecision ONNX Runtime 1.31 refuses two weights that share a zero point
    zero = w.constant(f"{call.prefix}/weight/zero", np.zeros(n, call.code_type))
    return w.op(call, "weight/DequantizeLinear", [codes, scale, zero], {"axis": 1 if call.op == "linear" else 0})


def carrier(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write (x @ DQ(Wq, s_0)) * (s_w / s_0); s_0 is one power of two for all layers that read x."""
    codes = w.codes(f"{call.site.layer}/weight", call, np.transpose, call.shape_NK[::-1])
    return _carried(w, call, x, codes)


def two_level_carrier(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write (x @ DQ(Q(DQ(Wq, g), 1), s_0)) * (s_w / s_0); g are the integers of the groups, s_0 as in `carrier`."""
    return _carried(w, call, x, _unpacked(w, call))


def two_level_channels(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write conv(x, DQ(Q(Reshape(DQ(Wq, g)), 1), s_w)); g are the integers of the groups, s_w has the shape (N,)."""
    return _product(w, call, x, _dequantize_channels(w, call, _unpacked(w, call)))


def _carried(w: Writer, call: Call, x: ir.Value, codes_KN: ir.Value) -> ir.Value:
    key = call.input_key
    assert key is not None  # only schemes with integer inputs use a carrier scale
    scale = w.carriers[key]
    weight = w.op(call, "weight/DequantizeLinear", [codes_KN, w.constant(f"weight/scale/{scale:.9g}", scale)])
    relative = w.constant(f"{call.site.layer}/scale", call.scale_NG.reshape(-1) / scale)
    return w.op(call, "scale/Mul", [_product(w, call, x, weight), relative])


def _unpacked(w: Writer, call: Call) -> ir.Value:
    """Write 8-bit codes, (K, N) or (N, C, kh, kw): 4-bit codes times the integers of their groups, which is exact."""
    codes = _dequantize_blocks(w, call, call.group_NG.astype(np.float32), "group")
    unit = [w.constant("weight/unit", np.float32(1)), w.constant("weight/zero", np.int8(0))]
    return w.op(call, "weight/QuantizeLinear", [codes, *unit])


def blocks(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write x @ DQ(Wq, s_w) with codes of 4 or 8 bits and one scale for each group of neighbours along K.

    4-bit codes must be in [-8, 7]: they are stored as INT4, and so are those of the `two_level_*` functions.
    """
    return _product(w, call, x, _dequantize_blocks(w, call, call.scale_NG, "scale"))


def _dequantize_blocks(w: Writer, call: Call, scale_NG: NDArray[np.float32], called: str) -> ir.Value:
    """Write codes times one factor for each group, (K, N) or (N, C, kh, kw). `called`: scale or group."""
    layer, linear = call.site.layer, call.op == "linear"
    floating = called == "scale"
    owner = w.owner(call, in_blocks=True) if floating else layer
    order = (1, 0) if linear else (0, 1)
    shape_NK = call.shape_NK
    codes = w.codes(
        f"{owner}/weight",
        call,
        lambda q_NK: q_NK.transpose(order),
        [shape_NK[axis] for axis in order],
        packed=call.data.scheme.weight_bits == 4,
    )
    weight = w.op(
        call,
        "weight/DequantizeLinear" if floating else f"weight/{called}/DequantizeLinear",
        [codes, w.constant(f"{layer}/{called}", scale_NG.transpose(order))],
        {"axis": 0 if linear else 1, "block_size": call.group_size},
    )
    if linear:
        return weight
    shape = w.constant(f"{layer}/shape", np.array(call.site.weight_shape))
    return w.op(call, "weight/Reshape", [weight, shape])


def integer_input(w: Writer, call: Call, unit: ir.Value, shape: ir.Shape | None) -> ir.Value:
    """Write DQ(Q(x)) with the constant scale S = 1/127, or 1/7 for 4-bit codes.

    If the product is rounded, the zero point of Q and DQ contains the shift; the convolution then pads with zeros
    itself.
    """
    bits, code = call.data.scheme.input_bits, call.zero_point
    scale = np.float32(input_scale(bits))
    zero = w.input_zero.dtype.type(int(w.input_zero) + code)
    constants = [
        w.constant("input/scale" if bits == 8 else f"input/scale/{bits}", scale),
        w.constant(f"input/zero/{code}" if code else "input/zero", zero),
    ]
    if bits < 8 and call.data.tables.stepped:  # a token's codes need no Clip, unless its range is clipped
        ends = [end - code for end in (-INPUT_HIGH[bits] - 1, INPUT_HIGH[bits])]
        bounds = [w.constant(f"input/bound/{bits}/{end}", scale * np.float32(end)) for end in ends]
        unit = w.op(call, "input/Clip", [unit, *bounds])
    return _quantize_dequantize(w, call, unit, shape, constants)


def fp8_input(w: Writer, call: Call, unit: ir.Value, shape: ir.Shape | None) -> ir.Value:
    """Write DQ(Q(x)) with E4M3 codes and the constant scale 1/448; Q saturates."""
    scale = w.constant("input/scale/fp8", np.float32(E4M3.unit))
    zero = w.constant("input/zero/fp8", np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()))
    return _quantize_dequantize(w, call, unit, shape, [scale, zero])


TRT_DOMAIN = "trt"
"""Domain of TensorRT's own operators."""
FP4_QUANTIZE = "TRT_FP4DynamicQuantize"
"""TensorRT's operator that rounds an input to NVFP4: its E2M1 numbers, and their block scales in E4M3."""


def nvfp4_input(w: Writer, call: Call, unit: ir.Value, shape: ir.Shape | None) -> ir.Value:
    """Write DQ(x4, DQ(s8, 1/2688)): E2M1 numbers x4, and their block scales s8 that TensorRT's operator measures.

    The operator takes two or three axes: an input with more is reshaped to rows (R, K), and back after the product.
    """
    if _many_axes(call):
        k = call.shape_NK[1]
        unit = w.op(call, "input/rows/Reshape", [unit, w.constant(f"input/rows/{k}", np.array([-1, k]))])
        shape = ir.Shape([None, k])
    one = w.constant("input/scale/nvfp4", np.float32(BLOCK_UNIT))
    how = {"axis": -1, "block_size": BLOCK, "scale_type": ir.DataType.FLOAT8E4M3FN.value}
    numbers, blocks = w.node(call, f"input/{FP4_QUANTIZE}", [unit, one], how, domain=TRT_DOMAIN, outputs=2)
    numbers.type, numbers.shape = ir.TensorType(ir.DataType.FLOAT4E2M1), shape
    blocks.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    scale = w.op(call, "input/scale/DequantizeLinear", [blocks, one])
    return w.op(call, "input/DequantizeLinear", [numbers, scale], {"axis": -1, "block_size": BLOCK})


def nvfp4_blocks(w: Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write x @ Transpose(DQ(Wq, DQ(s8, s))): E2M1 numbers (N, K), block scales s8 (N, G), one scale s."""
    layer, owner = call.site.layer, w.owner(call, in_blocks=True)
    assert call.data.group_NG is not None  # NVFP4 weights have block scales
    blocks = call.data.group_NG.view(torch.uint8).numpy().view(ir.DataType.FLOAT8E4M3FN.numpy())
    one = w.constant(f"{layer}/scale", call.scale_NG.reshape(()))
    scale = w.op(call, "weight/scale/DequantizeLinear", [w.constant(f"{owner}/group", blocks), one])
    numbers = w.codes(f"{owner}/weight", call, np.asarray, call.shape_NK)
    weight = w.op(call, "weight/DequantizeLinear", [numbers, scale], {"axis": 1, "block_size": BLOCK})
    across = ir.AttrInt64s("perm", [1, 0])
    y = _product(w, call, x, w.op(call, "weight/Transpose", [weight], {"perm": across}))
    if call.input_key is None or not _many_axes(call):
        return y
    axes = w.op(call, "rows/Shape", [call.site.x], {"end": -1})
    n = w.constant(f"rows/{call.shape_NK[0]}", np.array([call.shape_NK[0]]))
    return w.op(call, "rows/Reshape", [y, w.op(call, "rows/Concat", [axes, n], {"axis": 0})])


def _many_axes(call: Call) -> bool:
    """Return True for an input of more axes than TensorRT's operator takes."""
    return call.site.x.shape is not None and len(call.site.x.shape) > 3


def _quantize_dequantize(
    w: Writer, call: Call, unit: ir.Value, shape: ir.Shape | None, constants: list[ir.Value]
) -> ir.Value:
    codes = w.op(call, "input/QuantizeLinear", [unit, *constants])
    codes.type, codes.shape = constants[1].type, shape
    return w.op(call, "input/DequantizeLinear", [codes, *constants])


def _product(w: Writer, call: Call, x: ir.Value, weight: ir.Value) -> ir.Value:
    """Write x @ w, or the convolution, without a bias."""
    if call.op == "linear":
        return w.op(call, "MatMul", [x, weight])
    return w.op(call, "Conv", [x, weight], call.window)


@dataclass(frozen=True)
class Lowering:
    """Row of a runtime's table: the functions that write a scheme's product and input, and the reason for this form.

    One row serves every group size of the scheme's weight.
    """

    op: OpKind
    scheme: LayerScheme
    product: Product
    integer: bool
    """True where the runtime multiplies codes."""
    why: str
    entering: Entering = integer_input


def with_shifts(rows: Sequence[Lowering]) -> tuple[Lowering, ...]:
    """Return these rows, and one more for each scheme that can also have a shifted input."""
    shifted = (
        replace(row, scheme=with_shift(row.scheme), why=f"{row.why}; the shift is in the {_place(row.scheme)}")
        for row in rows
        if not isinstance(row.scheme.input, Float)
    )
    return (*rows, *shifted)


def _place(scheme: LayerScheme) -> str:
    """Return where the shift of an input is put back."""
    return "bias, after the product" if isinstance(scheme.output, Float) else "zero point"


def table(runtime: str) -> tuple[Lowering, ...]:
    """Return the rows of a runtime. Raises ContractError if its `lowerings` returns anything but a `Lowering`."""
    rows = []
    for row in find_runtime(runtime).lowerings():
        if not isinstance(row, Lowering):
            raise ContractError(f"runtime {runtime}: lowerings yields a {type(row).__name__}, which is no Lowering")
        rows.append(row)
    return tuple(rows)


def lowering(op: OpKind, scheme: LayerScheme, runtime: str) -> Lowering:
    """Return the row for a scheme on a runtime. Raises TargetError if the runtime has no such row."""
    for row in table(runtime):
        if row.op == op and row.scheme.alike(scheme):
            return row
    raise TargetError(
        f"runtime {runtime}: its `lowerings` has no row for {scheme.name} and {op}: add the row, or choose another"
        " scheme"
    )
