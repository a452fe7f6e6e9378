"""Spell out NVFP4 in operators that ONNX Runtime has, so that graphs with NVFP4 are checked without a GPU that has it.

The graph keeps its nodes. E2M1 numbers are stored as E4M3, which represents each of them exactly, and TensorRT's
operator that rounds an input becomes a function of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.exporters.qdq.lowering import FP4_QUANTIZE, TRT_DOMAIN

if TYPE_CHECKING:
    import onnx

_QUANTIZE = f"""
<domain: "{TRT_DOMAIN}", opset_import: ["" : 23]>
{FP4_QUANTIZE} <axis, block_size, scale_type> (x, g) => (q, s)
{{
    rows = Shape <end = -1> (x)
    block = Constant <value_ints = [-1, 16]> ()
    blocks = Concat <axis = 0> (rows, block)
    b = Reshape (x, blocks)
    magnitude = Abs (b)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax <keepdims = 0> (magnitude, last)
    six = Constant <value_float = 6.0> ()
    range = Mul (g, six)
    ratio = Div (largest, range)
    s = Cast <to = 17> (ratio)
    scale = Cast <to = 1> (s)
    zero = Constant <value_float = 0.0> ()
    empty = Equal (scale, zero)
    endless = Constant <value_float = 3e38> ()
    number = Mul (scale, g)
    divisor = Where (empty, endless, number)
    each = Unsqueeze (divisor, last)
    n = Div (b, each)
    low = Neg (six)
    inside = Clip (n, low, six)
    size = Abs (inside)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    small = Less (size, two)
    middle = Less (size, four)
    above = Where (middle, one, two)
    step = Where (small, half, above)
    places = Div (inside, step)
    even = Round (places)
    nearest = Mul (even, step)
    all = Shape (x)
    numbers = Reshape (nearest, all)
    q = Cast <to = 17> (numbers)
}}
"""


def spell_out(model: onnx.ModelProto, folder: Path | None) -> bool:
    """Replace FP4 tensors and operators, and return whether there were any. Changes `model`.

    `folder` has the model's external tensors; None if there are none.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    fp4 = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1]
    for tensor in fp4:
        numbers = numpy_helper.to_array(tensor, str(folder or ""))
        wide = TensorProto.FLOAT8E4M3FN
        name, dtype = tensor.name, onnx.helper.tensor_dtype_to_np_dtype(wide)
        tensor.CopyFrom(numpy_helper.from_array(numbers.astype(dtype), name))
    for value in (*model.graph.value_info, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT4E2M1:
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    if quantizes := any(node.domain == TRT_DOMAIN for node in model.graph.node):
        model.functions.append(onnx.parser.parse_function(_QUANTIZE))
    return bool(fp4) or quantizes
