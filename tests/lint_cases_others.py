"""Graphs with the verdict of `lint` for ONNX Runtime, and for the versions of TensorRT that cannot be run here."""

import numpy as np
from lint_graphs import (
    CHANNELS,
    CONVOLUTION,
    FILTERS,
    FLOATING,
    GROUPS,
    HALF,
    IMAGE,
    IN,
    IN_HALF,
    IN_U8,
    ONE,
    PAIR,
    PRODUCT,
    ROWS,
    Case,
    int4,
    int8,
    refused,
    scales,
)

from intaglio.pipeline.formats.target import load_target, target_names

DOCUMENTED = tuple(name for name in target_names() if load_target(name).runtime == "tensorrt")

IN_CH = "q = QuantizeLinear <axis = 2> (x, s_k, {0}) d = DequantizeLinear <axis = 2> (q, s_k, {0}) "
OUT = " q8 = QuantizeLinear (p, s, u128) y = DequantizeLinear (q8, s, u128)"
ORT_CASES = [
    Case("opset 26", "y = MatMul (x, w)", opset=26, counts=FLOATING),
    Case("w8a8, a scale for each channel", IN_U8 + CHANNELS + PRODUCT, counts=ONE),
    Case("w8a8 of rows", IN_U8 + CHANNELS + PRODUCT, counts=ONE, **ROWS),
    Case("computed scale", "c = Gather (table, step) " + IN_U8.replace("s, u128", "c, u128") + CHANNELS + PRODUCT,
         x="float[2,16,64] x, int64 step", counts=ONE),
    Case("uint8 codes moved", IN_U8 + "m = Transpose <perm = [0, 2, 1]> (d) " + CHANNELS + "y = MatMul (m, v)",
         x="float[2,64,16] x", counts=ONE),
    Case("convolution with 8-bit output", IN_U8 + FILTERS + CONVOLUTION.replace("y =", "p =") + OUT, counts=ONE,
         **IMAGE),
    Case("a short last group", "v = DequantizeLinear <axis = 0, block_size = 64> (w200, c) y = MatMul (x, v)",
         x="float[16,200] x", y=ROWS["y"], tensors={"w200": int4(200, 32), "c": scales(4, 32)}, counts=FLOATING),
    Case("contributed operator", "y = com.microsoft.Gelu (x)", y="float[2,16,64] y"),
    Case("convolution with float output", IN_U8 + FILTERS + CONVOLUTION, counts=FLOATING, warnings=("floating",),
         **IMAGE),
    Case("gemm", IN_U8 + "v = DequantizeLinear <axis = 0> (w8_t, s_n) y = Gemm <transB = 1> (d, v, bias)",
         counts=FLOATING, warnings=("floating",), **ROWS),
    Case("int8 input of siblings", IN + CHANNELS + PRODUCT + " v2 = DequantizeLinear <axis = 1> (w8_b, s_n) "
         "z = MatMul (d, v2)", y="float[2,16,32] y, float[2,16,32] z", counts=(0, 2), tensors={"w8_b": int8(64, 32)},
         warnings=("input-type", "input-type")),
    Case("int8 input without a zero point", "q = QuantizeLinear <output_dtype = 3> (x, s) d = DequantizeLinear (q, s) "
         + CHANNELS + PRODUCT, counts=FLOATING, warnings=("input-type",)),
    Case("factor for each channel between", IN_U8 + "m = Mul (d, s_k) " + CHANNELS + "y = MatMul (m, v)",
         counts=FLOATING, warnings=("between",)),
    refused("opset", "fails", "opset 27", "y = MatMul (x, w)", opset=27),
    refused("opset", "fails", "ir version 14", "y = MatMul (x, w)", ir=14),
    refused("valid", "fails", "squeeze of an axis of 16", "m = Squeeze (x, second) y = Abs (m)", y="float[2,64] y"),
    refused("valid", "fails", "fewer scales than channels", IN_U8 + "v = DequantizeLinear <axis = 1> (w8, s_in) "
            + PRODUCT),
    refused("operator", "fails", "operator of nobody", "y = my.Thing (x)", y="float[2,16,64] y"),
    refused("operator", "fails", "standard name of another domain", "y = trt.Relu (x)", y="float[2,16,64] y"),
    refused("operator", "fails", "contributed operator of nobody's domain", "y = my.Gelu (x)", y="float[2,16,64] y"),
    refused("loads", "fails", "contributed operator that is not there", "y = com.microsoft.Thing (x)",
            y="float[2,16,64] y"),
    *(
        refused("loads", "fails", f"{kind} {name}", nodes, x=f"{kind}[16,16] x", y=f"{kind}[16,16] y")
        for kind, name, nodes in (
            ("bfloat16", "product", "y = MatMul (x, x)"), ("bfloat16", "sigmoid", "y = Sigmoid (x)"),
            ("bfloat16", "softmax", "y = Softmax (x)"), ("int16", "relu", "y = Relu (x)"),
            ("uint4", "copy", "y = Identity (x)"),
        )
    ),
    *(
        Case(f"{kind} {name}", nodes, x=f"{kind}[16,16] x", y=f"{kind}[16,16] y", counts=counts)
        for kind, name, nodes, counts in (
            ("float16", "product", "y = MatMul (x, x)", FLOATING), ("double", "product", "y = MatMul (x, x)", FLOATING),
            ("float16", "sigmoid", "y = Sigmoid (x)", (0, 0)), ("double", "sum", "y = Add (x, x)", (0, 0)),
        )
    ),
    refused("scale", "nonsense", "scale of zero", IN_U8 + CHANNELS + PRODUCT, tensors={"s": np.float32(0)}),
    refused("scale-type", "fails", "float32 scale of float16 up to opset 22", "q = QuantizeLinear (x, s, u128) "
            "y = DequantizeLinear (q, half, u128)", x=HALF["x"], y="float16[2,16,64] y"),
    refused("scale-type", "fails", "float32 scale of float16 from opset 23", "q = QuantizeLinear (x, s, u128) "
            "y = DequantizeLinear <output_dtype = 10> (q, s, u128)", x=HALF["x"], y="float16[2,16,64] y", opset=23),
    refused("input-scale", "fails", "a scale for each input channel", IN_CH.format("u_k") + CHANNELS + PRODUCT,
            tensors={"u_k": np.full(64, 128, np.uint8)}),
    refused("weight-axis", "fails", "weight scales for each input feature",
            IN_U8 + "v = DequantizeLinear <axis = 0> (w8, s_k) " + PRODUCT),
    refused("input-by-groups", "fails", "8-bit input by int8 groups",
            IN_U8 + "v = DequantizeLinear <axis = 0, block_size = 16> (w8, s_g) " + PRODUCT),
    refused("input-by-groups", "float", "8-bit input by int4 groups", IN_U8 + GROUPS + PRODUCT),
    refused("input-by-int4", "float", "8-bit input by int4",
            IN_U8 + "v = DequantizeLinear <axis = 1> (w4, s_n) " + PRODUCT),
    refused("groups", "fails", "more scales than groups",
            "v = DequantizeLinear <axis = 0, block_size = 16> (w4, c) y = MatMul (x, v)", tensors={"c": scales(8, 32)}),
    *(
        refused("int8-moves", "fails", f"int8 input and {name}", IN + nodes, y=y, warnings=("input-type",))
        for name, nodes, y in (
            ("reshape", "m = Reshape (d, flat) " + CHANNELS + "y = MatMul (m, v)", "float[32,32] y"),
            ("slice", "m = Slice (d, first, second, first) " + CHANNELS + "y = MatMul (m, v)", "float[1,16,32] y"),
            ("unsqueeze", "m = Unsqueeze (d, first) " + CHANNELS + "y = MatMul (m, v)", "float[1,2,16,32] y"),
            ("a bias", CHANNELS + "p = MatMul (d, v) y = Add (p, bias)", "float[2,16,32] y"),
        )
    ),
]  # fmt: skip

OLD = {"tensorrt-10.3-orin"}
TEN = OLD | {"tensorrt-10", "tensorrt-10.16-orin", "tensorrt-10.16-thor"}
ORIN = {"tensorrt-10.3-orin", "tensorrt-10.16-orin", "tensorrt-11.4-orin"}
ALL = set(DOCUMENTED)


def documented(where: set[str], rule: str, name: str, nodes: str, **more: object) -> tuple[set[str], Case]:
    """An error on these targets, and on no other that only its documents describe."""
    return where, refused(rule, None, name, nodes, **more)


ATTENTION = {"opset": 23, "x": "float16[1,2,16,32] x, float16[1,2,16,32] k, float16[1,2,16,32] v",
             "y": "float16[1,2,16,32] y"}  # fmt: skip
DOCUMENTED_CASES = [
    (set(), Case("w8a8, a scale for each channel", IN + CHANNELS + PRODUCT, opset=20)),
    (set(), Case("transposed convolution", IN + "v = DequantizeLinear <axis = 1> (ct8, s_n) "
                 "y = ConvTranspose <strides = [2, 2]> (d, v)", x=IMAGE["x"], y="float[1,32,16,16] y")),
    (set(), Case("w4a16 in groups", GROUPS + "y = MatMul (x, v)")),
    (set(), Case("group normalization of opset 20", "y = GroupNormalization <num_groups = 4> (x, s_g4, s_g4)",
                 opset=20, x=IMAGE["x"], y="float[1,16,8,8] y", tensors={"s_g4": scales(4)})),
    documented(OLD, "opset", "opset 22", "y = MatMul (x, w)", opset=22),
    documented(TEN, "opset", "opset 25", "y = MatMul (x, w)", opset=25),
    documented(ALL, "opset", "opset 26", "y = MatMul (x, w)", opset=26),
    documented(OLD, "operator", "group normalization of opset 21", "y = GroupNormalization <num_groups = 4> (x, a, a)",
               x=IMAGE["x"], y="float[1,16,8,8] y", tensors={"a": scales(16)}),
    documented(ALL, "form", "sum over axes that are an input", "y = ReduceSum (x, axes)",
               x="float[2,16,64] x, int64[1] axes", y="float[a,b,c] y"),
    (set(), Case("sum over as many axes as a tensor has", "s = Shape (x) n = Size (s) l = Sub (n, first) "
                 "a = Unsqueeze (l, zeroth) y = ReduceSum (x, a)", y="float[2,16,1] y",
                 tensors={"first": np.int64(1), "zeroth": np.array([0])})),
    documented(ALL, "operator", "dynamic quantization", "q, c, z = DynamicQuantizeLinear (x) y = Cast <to = 1> (q)",
               y="float[2,16,64] y"),
    documented(ALL, "computed-scale", "scale looked up by step", "c = Gather (table, step) "
               + IN.replace("s, zero", "c, zero") + CHANNELS + PRODUCT, x="float[2,16,64] x, int64 step"),
    documented(ORIN, "scale-type", "float32 scale of float16", "q = QuantizeLinear (x, s, zero) "
               "y = DequantizeLinear (q, half, zero)", x=HALF["x"], y="float16[2,16,64] y"),
    documented(ORIN - OLD, "codes-between", "codes reshaped on their way", "q = QuantizeLinear (x, s, zero) "
               "m = Reshape (q, flat) d = DequantizeLinear (m, s, zero) " + CHANNELS + "y = MatMul (d, v)",
               y="float[32,32] y"),
    documented(ALL, "input-by-int4", "int8 input by int4", IN + "v = DequantizeLinear <axis = 1> (w4, s_n) " + PRODUCT),
    documented(OLD, "int4-shape", "int4 weight of three axes", "v = DequantizeLinear <axis = 0> (w3, one_n) "
               "y = MatMul (x, v)", x="float[2,16,64] x", tensors={"w3": int4(2, 64, 32), "one_n": scales(2)}),
    documented(ALL, "int4-shape", "int4 weight with an odd number of channels",
               "v = DequantizeLinear <axis = 0, block_size = 16> (w4_odd, s_odd) y = MatMul (x, v)",
               y="float[2,16,31] y", tensors={"w4_odd": int4(64, 31), "s_odd": scales(4, 31)}),
    documented(ALL, "groups", "short last group", "v = DequantizeLinear <axis = 0, block_size = 64> (w200, c) "
               "y = MatMul (x, v)", x="float[16,200] x", y=ROWS["y"],
               tensors={"w200": int4(200, 32), "c": scales(4, 32)}),
    documented(ALL, "code-type", "uint8 input", IN.replace("zero", "u0") + CHANNELS + PRODUCT),
    documented(ORIN, "code-type", "fp8 input", "q = QuantizeLinear <output_dtype = 17> (x, s) "
               "y = DequantizeLinear (q, s)", y="float[2,16,64] y"),
    documented(ALL, "zero-point", "int8 input with a zero point", IN.replace("zero", "z20") + CHANNELS + PRODUCT,
               tensors={"z20": np.int8(-20)}),
    documented(ALL, "scale", "float16 scale without a reciprocal", IN_HALF + "v = DequantizeLinear (w8, half_w) "
               + PRODUCT, tensors={"half": np.float16(1e-5), "half_w": np.float16(0.01)}, **HALF),
    documented(ALL, "moved-codes", "int8 codes cast", "k = Cast <to = 1> (w8) v = Mul (k, s_n) y = MatMul (x, v)"),
    documented(ALL, "requantized", "weight quantized with one scale, read with many", IN + PAIR.replace("v0", "w")),
    documented(ALL - OLD, "shared-attention", "one tensor as q and k", "y = Attention (x, x, v)", **ATTENTION),
    (set(), Case("convolution of 4 channels", IN + "v = DequantizeLinear <axis = 0> (c8_4, s_n) "
                 + CONVOLUTION, x="float[1,4,8,8] x", y=IMAGE["y"], tensors={"c8_4": int8(32, 4, 3, 3)},
                 warnings=("channels",))),
]  # fmt: skip


SHARED = [
    Case("siblings with one zero point", IN_U8 + "v = DequantizeLinear <axis = 1> (w8, s_n, z_n) y = MatMul (d, v) "
         "v2 = DequantizeLinear <axis = 1> (w8_b, s_n, z_n) z = MatMul (d, v2)", y="float[2,16,32] y, float[2,16,32] z",
         tensors={"w8_b": int8(64, 32), "z_b": np.zeros(32, np.int8)}, rules=("shared-zero-point",)),
]  # fmt: skip
