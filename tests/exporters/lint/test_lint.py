"""Every verdict of `lint` is held against the runtime: what it passes builds, what it refuses is really refused.

A refused graph fails, ends the builder's process, multiplies in floating point, is one of the hazards that the layer
list shows, or compiles to the very plan of another graph. Versions that cannot be run here are linted alone.
Shapes: 64 in features, 32 out features, groups of 16; 16 in channels and 32 out channels of 8 x 8.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx.parser
import pytest
from harness import Artifacts, run_pass
from onnx import TensorProto, helper, numpy_helper
from quantizing import with_plan
from typer.testing import CliRunner

from intaglio.exporters.lint.lint import RULES, Lint, lint
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.runtimes.tensorrt.build_log import Layer, count_products, find_hazards, read_layers
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.formats.layer import illegal
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import Target, load_target, target_names

RTX = load_target("tensorrt-rtx")
ORT = load_target("onnxruntime-cpu")
DOCUMENTED = tuple(name for name in target_names() if load_target(name).runtime == "tensorrt")

Evidence = Literal["misread", "fails", "crashes", "float", "hazard", "no scale", "nonsense"]
INTEGER = {"MatMulIntegerToFloat", "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger"}


@dataclass(frozen=True)
class Case:
    """A graph by its nodes; constants are taken from TENSORS by their names. `rules`: its errors, then its warnings."""

    name: str
    nodes: str
    x: str = "float[2,16,64] x"
    y: str = "float[2,16,32] y"
    opset: int = 21
    ir: int = 10
    rules: tuple[str, ...] = ()
    counts: tuple[int, int] = (0, 0)
    """Numbers of products on integers and in floating point."""
    evidence: Evidence | None = None
    same_plan: str | None = None
    """Nodes of the graph that it is taken for."""
    warnings: tuple[str, ...] = ()
    tensors: dict[str, object] = field(default_factory=dict)

    def model(self, nodes: str | None = None) -> onnx.ModelProto:
        head = f'<ir_version: {self.ir}, opset_import: ["": {self.opset}, "com.microsoft": 1, "my": 1]>'
        model = onnx.parser.parse_model(f"{head}\ngraph ({self.x}) => ({self.y})\n{{{nodes or self.nodes}}}")
        made = {o for n in model.graph.node for o in n.output} | {i.name for i in model.graph.input} | {""}
        for name in sorted({i for n in model.graph.node for i in n.input} - made):
            if (content := {**TENSORS, **self.tensors}[name]) is not None:
                model.graph.initializer.append(_tensor(name, content))
        del model.opset_import[1:]
        model.opset_import.extend(
            helper.make_opsetid(domain, 1) for domain in sorted({n.domain for n in model.graph.node} - {""})
        )
        return model

    def write(self, folder: Path) -> Path:
        onnx.save(self.model(), folder / "model.onnx")
        return folder / "model.onnx"


def _tensor(name: str, content: object) -> onnx.TensorProto:
    if isinstance(content, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(content)
        tensor.name = name
        return tensor
    return numpy_helper.from_array(np.asarray(content), name)


def int8(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-127, 128, shape).astype(np.int8)


def int4(*shape: int, kind: int = TensorProto.INT4) -> onnx.TensorProto:
    low = 0 if kind == TensorProto.UINT4 else -8
    codes = np.random.default_rng(7).integers(low, low + 16, int(np.prod(shape)))
    return helper.make_tensor("", kind, shape, codes)


def floats(kind: int, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(7).choice([0, 0.5, 1, -1, 2, 3], int(np.prod(shape)))
    return helper.make_tensor("", kind, shape, values)


def scales(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.linspace(0.01, 0.02, int(np.prod(shape)), dtype=dtype).reshape(shape)


def zeros4(*shape: int, value: int = 0) -> onnx.TensorProto:
    return helper.make_tensor("", TensorProto.INT4, shape, [value] * int(np.prod(shape)))


TENSORS: dict[str, object] = {
    "s": scales(), "t": np.float32(0.03), "one": np.float32(1), "zero": np.int8(0), "u0": np.uint8(0),
    "u128": np.uint8(128), "s_vec": scales(1), "z_vec": np.zeros(1, np.int8), "half": scales(dtype=np.float16),
    "w8": int8(64, 32), "w8_t": int8(32, 64), "w4": int4(64, 32), "w4_t": int4(32, 64), "w": scales(64, 32),
    "s_n": scales(32), "s_k": scales(64), "s_g": scales(4, 32), "s_gt": scales(32, 4), "s_row": scales(1, 32),
    "fine": scales(32) / np.float32(16), "z_n": np.zeros(32, np.int8), "z_k": np.zeros(64, np.int8),
    "half_n": scales(32, dtype=np.float16), "bias": scales(32), "ratio": scales(32), "table": scales(3),
    "c8": int8(32, 16, 3, 3), "c8_flat": int8(32, 144), "c4": int4(32, 16, 3, 3), "c4_flat": int4(32, 144),
    "s_cg": scales(32, 9), "s_c4": scales(32, 2, 3, 3), "s_in": scales(16), "oihw": np.array([32, 16, 3, 3]),
    "ct8": int8(16, 32, 2, 2), "dw8": int8(16, 1, 3, 3), "last": np.array([-1]), "eps": np.float32(1e-7),
    "first": np.array([0]), "second": np.array([1]), "flat": np.array([32, 64]), "kn": np.array([64, 32]),
    "w_fp8": floats(TensorProto.FLOAT8E4M3FN, 64, 32), "w_fp4": floats(TensorProto.FLOAT4E2M1, 64, 32),
    "whole": np.full((4, 32), 3, np.float32), "ones_n": np.ones(32, np.float32),
}  # fmt: skip

IN = "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) "
IN_HALF = IN.replace("s, zero", "half, zero")
IN_FP8 = "q = QuantizeLinear <output_dtype = 17> (x, s) d = DequantizeLinear (q, s) "
IN_U8 = IN.replace("zero", "u128")
CHANNELS = "v = DequantizeLinear <axis = 1> (w8, s_n) "
GROUPS = "v = DequantizeLinear <axis = 0, block_size = 16> (w4, s_g) "
PRODUCT = "y = MatMul (d, v)"
FILTERS = "v = DequantizeLinear <axis = 0> (c8, s_n) "
CONVOLUTION = "y = Conv <pads = [1, 1, 1, 1]> (d, v)"
ROWS = {"x": "float[16,64] x", "y": "float[16,32] y"}
IMAGE = {"x": "float[1,16,8,8] x", "y": "float[1,32,8,8] y"}
HALF = {"x": "float16[2,16,64] x", "y": "float16[2,16,32] y"}
ONE, FLOATING = (1, 0), (0, 1)

LEGAL = [
    Case("float product", "y = MatMul (x, w)", counts=FLOATING),
    Case("opset 26", "y = MatMul (x, w)", counts=FLOATING, opset=26),
    Case("ir version 13", "y = MatMul (x, w)", counts=FLOATING, ir=13),
    Case("w8a8, a scale for each channel", IN + CHANNELS + PRODUCT, counts=ONE),
    Case("w8a8 of rows", IN + CHANNELS + PRODUCT, counts=ONE, **ROWS),
    Case("w8a8 carrier", IN + "v = DequantizeLinear (w8, s) p = MatMul (d, v) y = Mul (p, ratio)", counts=ONE),
    Case("w8a8 of opset 20", IN + CHANNELS + PRODUCT, counts=ONE, opset=20),
    Case(
        "w8a8 without a zero point that says int8",
        "q = QuantizeLinear <output_dtype = 3> (x, s) d = DequantizeLinear (q, s) " + CHANNELS + PRODUCT,
        counts=ONE,
    ),
    Case(
        "w8a8 by token",
        "a = Abs (x) l = ReduceMax (a, last) m = Max (l, eps) x1 = Div (x, m) "
        "q = QuantizeLinear (x1, s, zero) d = DequantizeLinear (q, s, zero) " + CHANNELS + "p = MatMul (d, v) "
        "y = Mul (p, m)",
        counts=ONE,
    ),
    Case(
        "w8a8 by step",
        "r = Gather (table, step) x1 = Mul (x, r) q = QuantizeLinear (x1, s, zero) d = DequantizeLinear (q, s, zero) "
        + CHANNELS + "p = MatMul (d, v) y = Mul (p, r)",
        x="float[2,16,64] x, int64 step",
        counts=ONE,
    ),
    Case("scale from Constant", "c = Constant <value = float {0.01}> () " + IN.replace("s, zero", "c, zero")
         + CHANNELS + PRODUCT, counts=ONE),
    Case("scale folded from constants", "c = Mul (s, t) " + IN.replace("s, zero", "c, zero") + CHANNELS + PRODUCT,
         counts=ONE),
    Case("input read with another scale", "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, t, zero) "
         + CHANNELS + PRODUCT, counts=ONE),
    Case("scale of shape (1,) in a linear layer", IN.replace("s, zero", "s_vec, z_vec") + CHANNELS + PRODUCT,
         counts=ONE),
    Case("gemm, transposed", IN + "v = DequantizeLinear <axis = 0> (w8_t, s_n) y = Gemm <transB = 1> (d, v, bias)",
         counts=ONE, **ROWS),
    Case("weight transposed in the graph", IN + "v0 = DequantizeLinear <axis = 0> (w8_t, s_n) "
         "v = Transpose <perm = [1, 0]> (v0) " + PRODUCT, counts=ONE),
    Case("float weight quantized in the graph", IN + "k = QuantizeLinear <axis = 1> (w, s_n, z_n) "
         "v = DequantizeLinear <axis = 1> (k, s_n, z_n) " + PRODUCT, counts=ONE),
    Case("two computed operands", "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) "
         "k = QuantizeLinear (z, t, zero) v = DequantizeLinear (k, t, zero) " + PRODUCT,
         x="float[2,16,64] x, float[2,64,32] z", counts=ONE),
    Case("siblings on one input", IN + CHANNELS + PRODUCT + " v2 = DequantizeLinear <axis = 1> (w8_b, s_n) "
         "z = MatMul (d, v2)", y="float[2,16,32] y, float[2,16,32] z", counts=(2, 0), tensors={"w8_b": int8(64, 32)}),
    Case("input quantized twice", IN + "q3 = QuantizeLinear (d, s, zero) d3 = DequantizeLinear (q3, s, zero) "
         + CHANNELS + "y = MatMul (d3, v)", counts=ONE),
    Case("float16 island in float32", "x1 = Cast <to = 1> (x) q = QuantizeLinear (x1, s, zero) "
         "d = DequantizeLinear (q, s, zero) " + CHANNELS + "p = MatMul (d, v) y = Cast <to = 10> (p)",
         counts=ONE, **HALF),
    Case("two types of single scales", "q = QuantizeLinear (x, s, zero) "
         "d = DequantizeLinear <output_dtype = 10> (q, s, zero) v = DequantizeLinear (w8, half) " + PRODUCT,
         opset=23, counts=ONE, **HALF),
    Case("float16 carrier", IN_HALF + "v = DequantizeLinear (w8, half) p = MatMul (d, v) y = Mul (p, half_n)",
         counts=ONE, **HALF),
    Case("reshape between", IN + "m = Reshape (d, flat) " + CHANNELS + "y = MatMul (m, v)", y="float[32,32] y",
         counts=ONE),
    Case("transpose between", IN + "m = Transpose <perm = [0, 2, 1]> (d) " + CHANNELS + "y = MatMul (m, v)",
         x="float[2,64,16] x", counts=ONE),
    Case("slice between", IN + "m = Slice (d, first, second, first) " + CHANNELS + "y = MatMul (m, v)",
         y="float[1,16,32] y", counts=ONE),
    Case("factor between", IN + "m = Mul (d, one) " + CHANNELS + "y = MatMul (m, v)", counts=ONE),
    Case("fp8 by fp8, a scale for each channel", IN_FP8 + "v = DequantizeLinear <axis = 1> (w_fp8, s_n) " + PRODUCT,
         counts=ONE),
    Case("group normalization of one channel", "y = GroupNormalization <num_groups = 1> (x, s_1, s_1)",
         x="float[1,1,8,8] x", y="float[1,1,8,8] y", tensors={"s_1": scales(1)}),
    Case("w8a16", CHANNELS + "y = MatMul (x, v)", counts=FLOATING),
    Case("w8a16 in groups", "v = DequantizeLinear <axis = 0, block_size = 16> (w8, s_g) y = MatMul (x, v)",
         counts=FLOATING),
    Case("w4a16 in groups", GROUPS + "y = MatMul (x, v)", counts=FLOATING),
    Case("w4a16 in groups with zero points of zero",
         "v = DequantizeLinear <axis = 0, block_size = 16> (w4, s_g, z4) y = MatMul (x, v)", counts=FLOATING,
         tensors={"z4": zeros4(4, 32)}),
    Case("w4a16 gemm, transposed", "v = DequantizeLinear <axis = 1, block_size = 16> (w4_t, s_gt) "
         "y = Gemm <transB = 1> (x, v)", counts=FLOATING, **ROWS),
    Case("w4a16, the group is K", "v = DequantizeLinear <axis = 0, block_size = 64> (w4, s_row) y = MatMul (x, v)",
         counts=FLOATING),
    Case("w4a16, a scale for each channel", "v = DequantizeLinear <axis = 1> (w4, s_n) y = MatMul (x, v)",
         counts=FLOATING),
    Case("w4a16, an odd number of channels",
         "v = DequantizeLinear <axis = 0, block_size = 16> (w4_odd, s_odd) y = MatMul (x, v)", y="float[2,16,31] y",
         counts=FLOATING, tensors={"w4_odd": int4(64, 31), "s_odd": scales(4, 31)}),
    Case("w4a8, a scale for each channel", IN + "v = DequantizeLinear <axis = 1> (w4, s_n) " + PRODUCT, counts=ONE),
    Case("w4a8, the group is K", IN + "v = DequantizeLinear <axis = 0, block_size = 64> (w4, s_row) " + PRODUCT,
         counts=ONE),
    Case("w4a8 progressive, one scale", IN + "v4 = DequantizeLinear <axis = 0, block_size = 16> (w4, whole) "
         "k = QuantizeLinear (v4, one, zero) v = DequantizeLinear (k, s, zero) " + PRODUCT, counts=ONE),
    Case("w4a8 progressive, a scale for each channel",
         IN + "v4 = DequantizeLinear <axis = 0, block_size = 16> (w4, whole) "
         "k = QuantizeLinear <axis = 1> (v4, ones_n, z_n) v = DequantizeLinear <axis = 1> (k, s_n, z_n) " + PRODUCT,
         counts=ONE),
    Case("w4a8 by a finer scale", IN + "v4 = DequantizeLinear <axis = 1> (w4, s_n) "
         "k = QuantizeLinear <axis = 1> (v4, fine, z_n) v = DequantizeLinear <axis = 1> (k, fine, z_n) " + PRODUCT,
         counts=ONE),
    Case("convolution w8a8", IN + FILTERS + CONVOLUTION, counts=ONE, **IMAGE),
    Case("convolution w8a8 with bias", IN + FILTERS + CONVOLUTION.replace("v)", "v, bias)"), counts=ONE, **IMAGE),
    Case("convolution w8a8, one weight scale", IN + "v = DequantizeLinear (c8, s) " + CONVOLUTION, counts=ONE, **IMAGE),
    Case("convolution w8a8, filters stored flat", IN + "v0 = DequantizeLinear <axis = 0> (c8_flat, s_n) "
         "v = Reshape (v0, oihw) " + CONVOLUTION, counts=ONE, **IMAGE),
    Case("depthwise convolution w8a8", IN + "v = DequantizeLinear <axis = 0> (dw8, s_in) "
         "y = Conv <group = 16, pads = [1, 1, 1, 1]> (d, v)", x=IMAGE["x"], y="float[1,16,8,8] y", counts=ONE),
    Case("convolution w4a16", "v = DequantizeLinear <axis = 0> (c4, s_n) " + CONVOLUTION.replace("d,", "x,"),
         counts=FLOATING, **IMAGE),
    Case("convolution w4a16 in groups, flat", "v0 = DequantizeLinear <axis = 1, block_size = 16> (c4_flat, s_cg) "
         "v = Reshape (v0, oihw) " + CONVOLUTION.replace("d,", "x,"), counts=FLOATING, **IMAGE),
    Case("convolution w4a8 by a finer scale", IN + "v4 = DequantizeLinear <axis = 0> (c4, s_n) "
         "k = QuantizeLinear <axis = 0> (v4, fine, z_n) v = DequantizeLinear <axis = 0> (k, fine, z_n) " + CONVOLUTION,
         counts=ONE, **IMAGE),
    Case("concatenation of one scale", "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) "
         "q2 = QuantizeLinear (z, s, zero) d2 = DequantizeLinear (q2, s, zero) m = Concat <axis = 1> (d, d2) "
         + FILTERS + CONVOLUTION.replace("d,", "m,"), x="float[1,8,8,8] x, float[1,8,8,8] z", y=IMAGE["y"], counts=ONE),
    Case("resize by cubic interpolation", 'y = Resize <mode = "cubic"> (x, , factors)', x="float[1,3,8,8] x",
         y="float[1,3,4,4] y", tensors={"factors": np.array([1, 1, 0.5, 0.5], np.float32)}),
    Case("attention in float16", "y = Attention (x, k, v)", opset=23, y="float16[1,2,16,32] y",
         x="float16[1,2,16,32] x, float16[1,2,16,32] k, float16[1,2,16,32] v"),
    Case("attention in float32 with flat heads", "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, k, v)",
         opset=23, y="float[1,16,64] y", x="float[1,16,64] x, float[1,16,64] k, float[1,16,64] v"),
    Case("attention with one tensor as k and v", "y = Attention (x, k, k)", opset=23, y="float16[1,2,16,32] y",
         x="float16[1,2,16,32] x, float16[1,2,16,32] k"),
    Case("swish", "y = Swish (x)", y="float[2,16,64] y", opset=24),
    Case("group normalization of opset 21", "y = GroupNormalization <num_groups = 4> (x, s_in, s_in)",
         x=IMAGE["x"], y="float[1,16,8,8] y"),
]  # fmt: skip

BETWEEN = IN + "m = {} " + CHANNELS + "y = MatMul (m, v)"
WARNED = [
    Case("transposed convolution", IN + "v = DequantizeLinear <axis = 1> (ct8, s_n) "
         "y = ConvTranspose <strides = [2, 2]> (d, v)", x=IMAGE["x"], y="float[1,32,16,16] y", warnings=("floating",)),
    Case("factor for each channel between", BETWEEN.format("Mul (d, s_k)"), warnings=("between",)),
    Case("relu between", BETWEEN.format("Relu (d)"), warnings=("between",)),
    Case("addition between", BETWEEN.format("Add (d, s_k)"), warnings=("between",)),
    Case("cast there and back between", IN + "h = Cast <to = 10> (d) m = Cast <to = 1> (h) " + CHANNELS
         + "y = MatMul (m, v)", warnings=("between",)),
    Case("resize between", IN + 'm = Resize <mode = "nearest"> (d, , factors) ' + FILTERS
         + CONVOLUTION.replace("d,", "m,"), x=IMAGE["x"], y="float[1,32,16,16] y", warnings=("between",),
         tensors={"factors": np.array([1, 1, 2, 2], np.float32)}),
    Case("concatenation of two scales", "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) "
         "q2 = QuantizeLinear (z, t, zero) d2 = DequantizeLinear (q2, t, zero) m = Concat <axis = 1> (d, d2) "
         + FILTERS + CONVOLUTION.replace("d,", "m,"), x="float[1,8,8,8] x, float[1,8,8,8] z", y=IMAGE["y"],
         warnings=("between",)),
]  # fmt: skip


def refused(rule: str, evidence: Evidence | None, name: str, nodes: str, **more: object) -> Case:
    return Case(name, nodes, rules=(rule,), evidence=evidence, **more)  # type: ignore[arg-type]  # tests only


TOKEN_SCALE = "a = Abs (x) r = ReduceMax <keepdims = {}> (a, last) "
PAIR = "k = QuantizeLinear (v0, s, zero) v = DequantizeLinear <axis = 1> (k, s_n, z_n) " + PRODUCT
REFUSED = [
    refused("valid", "fails", "value of nobody", "y = Abs (x) z = Abs (nobody)", y="float[2,16,64] y, float z",
            tensors={"nobody": None}),
    refused("valid", "fails", "cycle", "a = Add (x, b) b = Abs (a) y = Abs (b)", y="float[2,16,64] y"),
    refused("valid", "fails", "squeeze of an axis of 16", "m = Squeeze (x, second) y = Abs (m)", y="float[2,64] y"),
    refused("valid", "fails", "scales along an axis that is not there",
            IN + "v = DequantizeLinear <axis = 7> (w8, s_n) " + PRODUCT),
    refused("valid", "fails", "fewer scales than channels", IN + "v = DequantizeLinear <axis = 1> (w8, s_in) "
            + PRODUCT),
    refused("operator", "fails", "determinant", "y = Det (x)", x="float[8,8] x", y="float y"),
    refused("operator", "fails", "dynamic quantization",
            "q, c, z = DynamicQuantizeLinear (x) y = Cast <to = 1> (q)", y="float[2,16,64] y"),
    refused("operator", "fails", "integer product", "y = MatMulInteger (x, z)",
            x="int8[16,64] x, int8[64,32] z", y="int32[16,32] y"),
    refused("operator", "fails", "operator of nobody", "y = my.Thing (x)", y="float[2,16,64] y"),
    refused("operator", "fails", "resize against aliasing",
            'y = Resize <mode = "linear", antialias = 1> (x, , factors)', x="float[1,3,8,8] x", y="float[1,3,4,4] y",
            tensors={"factors": np.array([1, 1, 0.5, 0.5], np.float32)}),
    refused("operator", "fails", "attention with a softmax precision",
            "y = Attention <softmax_precision = 1> (x, k, v)", opset=23, y="float16[1,2,16,32] y",
            x="float16[1,2,16,32] x, float16[1,2,16,32] k, float16[1,2,16,32] v"),
    refused("operator", "fails", "attention with a soft cap", "y = Attention <softcap = 30.0> (x, k, v)",
            opset=23, y="float16[1,2,16,32] y", x="float16[1,2,16,32] x, float16[1,2,16,32] k, float16[1,2,16,32] v"),
    refused("form", "fails", "sum over axes that are an input", "y = ReduceSum (x, axes)",
            x="float[2,16,64] x, int64[1] axes", y="float[a,b,c] y"),
    refused("form", "fails", "axes computed from an input", "r = Abs (axes) y = Unsqueeze (x, r)",
            x="float[2,16,64] x, int64[1] axes", y="float[a,b,c,d] y"),
    refused("form", "fails", "sum of opset 6", "y = Add (x, x)", opset=6, x="float[2,64] x", y="float[2,64] y"),
    refused("parses", "fails", "pool with two outputs", "y, places = MaxPool <kernel_shape = [2, 2]> (x)",
            x=IMAGE["x"], y="float[1,16,7,7] y, int64[1,16,7,7] places"),
    refused("form", "misread", "group normalization of one group",
            "y = GroupNormalization <num_groups = 1> (x, s_in, s_in)", x=IMAGE["x"], y="float[1,16,8,8] y"),
    refused("attention", "fails", "attention in float32", "y = Attention (x, k, v)", opset=23,
            y="float[1,2,16,32] y", x="float[1,2,16,32] x, float[1,2,16,32] k, float[1,2,16,32] v"),
    refused("shared-attention", "crashes", "one tensor as q and k", "y = Attention (x, x, v)", opset=23,
            y="float16[1,2,16,32] y", x="float16[1,2,16,32] x, float16[1,2,16,32] v"),
    refused("shared-attention", "crashes", "one product as q, k and v, and a copy of it", "p = MatMul (x, eye) "
            "c = Identity (p) y = Attention <q_num_heads = 2, kv_num_heads = 2> (p, c, p)", opset=23,
            y="float[1,16,64] y", x="float[1,16,64] x", tensors={"eye": np.eye(64, dtype=np.float32)}),
    refused("code-type", None, "uint8 input compiles as int8", IN.replace("zero", "u0") + CHANNELS + PRODUCT,
            same_plan=IN + CHANNELS + PRODUCT),
    refused("code-type", None, "uint8 by default compiles as int8", IN.replace(", zero", "") + CHANNELS + PRODUCT,
            same_plan="q = QuantizeLinear <output_dtype = 3> (x, s) d = DequantizeLinear (q, s) " + CHANNELS + PRODUCT),
    refused("code-type", "fails", "uint8 that says so",
            "q = QuantizeLinear <output_dtype = 2> (x, s) d = DequantizeLinear (q, s) " + CHANNELS + PRODUCT),
    refused("code-type", "fails", "int16 input", IN.replace("zero", "z16") + CHANNELS + PRODUCT,
            tensors={"z16": np.int16(0)}),
    refused("code-type", "fails", "uint8 weight", IN + "v = DequantizeLinear <axis = 1> (wu8, s_n) " + PRODUCT,
            tensors={"wu8": (int8(64, 32).astype(np.int16) + 128).astype(np.uint8)}),
    refused("code-type", "fails", "uint4 weight",
            "v = DequantizeLinear <axis = 0, block_size = 16> (wu4, s_g) y = MatMul (x, v)",
            tensors={"wu4": int4(64, 32, kind=TensorProto.UINT4)}),
    refused("zero-point", "fails", "int8 input with a zero point", IN.replace("zero", "z20") + CHANNELS + PRODUCT,
            tensors={"z20": np.int8(-20)}),
    refused("zero-point", "fails", "weight with a zero point",
            IN + "v = DequantizeLinear <axis = 1> (w8, s_n, z7) " + PRODUCT, tensors={"z7": np.full(32, 7, np.int8)}),
    refused("zero-point", "fails", "int4 weight with a zero point",
            "v = DequantizeLinear <axis = 0, block_size = 16> (w4, s_g, z4) y = MatMul (x, v)",
            tensors={"z4": zeros4(4, 32, value=1)}),
    refused("scale", "fails", "scale of zero", IN + CHANNELS + PRODUCT, tensors={"s": np.float32(0)}),
    refused("scale", "fails", "negative scale", IN + CHANNELS + PRODUCT, tensors={"s": np.float32(-0.01)}),
    refused("scale", "fails", "scale that is no number", IN + CHANNELS + PRODUCT, tensors={"s": np.float32("nan")}),
    refused("scale", "nonsense", "infinite scale", IN + CHANNELS + PRODUCT, tensors={"s": np.float32("inf")}),
    refused("scale", "fails", "one channel's scale of zero", IN + CHANNELS + PRODUCT,
            tensors={"s_n": np.array([0] + 31 * [0.01], np.float32)}),
    refused("scale", "fails", "float16 scale that underflows", IN_HALF + "v = DequantizeLinear (w8, half) " + PRODUCT,
            tensors={"half": np.float16(1e-9)}, **HALF),
    refused("scale", "no scale", "float16 scale without a reciprocal",
            IN_HALF + "v = DequantizeLinear (w8, half_w) " + PRODUCT,
            tensors={"half": np.float16(1e-5), "half_w": np.float16(0.01)}, **HALF),
    Case("operands with scales of two types", "q = QuantizeLinear (x, s, zero) "
         "d = DequantizeLinear <output_dtype = 10> (q, s, zero) v = DequantizeLinear <axis = 1> (w8, half_n) "
         + PRODUCT, opset=23, evidence="fails", rules=("scale-type", "half-sum"), **HALF),
    refused("scale-type", "fails", "float16 input by float32 scales", "q = QuantizeLinear (x, half, zero) "
            "d = DequantizeLinear (q, half, zero) v = DequantizeLinear <axis = 1, output_dtype = 10> (w8, s_n) "
            + PRODUCT, opset=23, **HALF),
    refused("computed-scale", "float", "scale looked up by step", "c = Gather (table, step) "
            + IN.replace("s, zero", "c, zero") + CHANNELS + PRODUCT, x="float[2,16,64] x, int64 step"),
    refused("computed-scale", "float", "scale as an input", IN.replace("s, zero", "c, zero") + CHANNELS + PRODUCT,
            x="float[2,16,64] x, float c"),
    refused("computed-scale", "float", "weight scales looked up by step", "c = Gather (table, step) " + IN
            + "v = DequantizeLinear <axis = 1> (w8, c) " + PRODUCT, x="float[2,16,64] x, int64 step",
            tensors={"table": scales(3, 32)}),
    refused("input-scale", "float", "a scale for each input channel",
            "q = QuantizeLinear <axis = 2> (x, s_k, z_k) d = DequantizeLinear <axis = 2> (q, s_k, z_k) "
            + CHANNELS + PRODUCT),
    refused("input-scale", "fails", "scales for groups of input channels",
            "q = QuantizeLinear <axis = 2, block_size = 16, output_dtype = 3> (x, c) "
            "d = DequantizeLinear <axis = 2, block_size = 16> (q, c) " + CHANNELS + PRODUCT,
            tensors={"c": scales(2, 16, 4)}),
    refused("input-scale", "float", "scale of shape (1,) in a convolution",
            IN.replace("s, zero", "s_vec, z_vec") + FILTERS + CONVOLUTION, **IMAGE),
    refused("weight-axis", "float", "weight scales for each input feature",
            IN + "v = DequantizeLinear <axis = 0> (w8, s_k) " + PRODUCT),
    refused("weight-axis", "float", "weight scales for each input feature of a gemm",
            IN + "v = DequantizeLinear <axis = 1> (w8_t, s_k) y = Gemm <transB = 1> (d, v)", **ROWS),
    refused("weight-axis", "float", "weight scales for each input feature, transposed",
            IN + "v0 = DequantizeLinear <axis = 1> (w8_t, s_k) v = Transpose <perm = [1, 0]> (v0) " + PRODUCT),
    refused("weight-axis", "float", "filter scales for each input channel",
            IN + "v = DequantizeLinear <axis = 1> (c8, s_in) " + CONVOLUTION, **IMAGE),
    refused("input-by-groups", "fails", "int8 input by int4 groups", IN + GROUPS + PRODUCT),
    refused("input-by-groups", "fails", "int8 input by int8 groups",
            IN + "v = DequantizeLinear <axis = 0, block_size = 16> (w8, s_g) " + PRODUCT),
    refused("input-by-groups", "hazard", "rows of int8 by int4 groups", IN + GROUPS + PRODUCT, **ROWS),
    refused("input-by-groups", "hazard", "rows of int8 by int8 groups",
            IN + "v = DequantizeLinear <axis = 0, block_size = 16> (w8, s_g) " + PRODUCT, **ROWS),
    refused("input-by-groups", "hazard", "int8 input reshaped to rows by int4 groups",
            IN + "m = Reshape (d, flat) " + GROUPS + "y = MatMul (m, v)", y="float[32,32] y"),
    refused("input-by-groups", "fails", "int8 input by a gemm of int4 groups",
            IN + "v = DequantizeLinear <axis = 1, block_size = 16> (w4_t, s_gt) y = Gemm <transB = 1> (d, v)", **ROWS),
    refused("input-by-groups", "fails", "int8 input by groups of output channels",
            IN + "v = DequantizeLinear <axis = 1, block_size = 16> (w4, c) " + PRODUCT, tensors={"c": scales(64, 2)}),
    refused("input-by-groups", "float", "int8 image by int4 groups",
            IN + "v0 = DequantizeLinear <axis = 1, block_size = 16> (c4_flat, s_cg) v = Reshape (v0, oihw) "
            + CONVOLUTION, **IMAGE),
    refused("input-by-groups", "fails", "int8 input by int4 groups behind a factor",
            IN + GROUPS.replace("v =", "v0 =") + "v = Mul (v0, one) " + PRODUCT),
    refused("input-by-groups", "hazard", "rows of int8 by int4 groups behind a divisor",
            IN + GROUPS.replace("v =", "v0 =") + "v = Div (v0, one) " + PRODUCT, **ROWS),
    refused("input-by-groups", "fails", "fp8 input by fp8 groups",
            IN_FP8 + GROUPS.replace("w4", "w_fp8") + PRODUCT),
    Case("fp8 input by int4 groups", IN_FP8 + GROUPS + PRODUCT, rules=("input-by-groups", "mixed-codes"),
         evidence="fails"),
    Case("fp8 input by int4 groups, transposed",
         IN_FP8 + "v = DequantizeLinear <axis = 1, block_size = 16> (w4_t, s_gt) y = Gemm <transB = 1> (d, v)",
         rules=("input-by-groups", "mixed-codes"), evidence="fails", **ROWS),
    refused("mixed-codes", "fails", "fp8 input by int4",
            IN_FP8 + "v = DequantizeLinear <axis = 1> (w4, s_n) " + PRODUCT),
    refused("mixed-codes", "fails", "fp8 input by int8", IN_FP8 + CHANNELS + PRODUCT),
    refused("mixed-codes", "fails", "int8 input by fp8", IN + CHANNELS.replace("w8", "w_fp8") + PRODUCT),
    refused("mixed-codes", "fails", "int8 input by fp4", IN + CHANNELS.replace("w8", "w_fp4") + PRODUCT),
    refused("input-by-int4", "fails", "int8 input by int4 with one scale",
            IN + "v = DequantizeLinear (w4, s) " + PRODUCT),
    refused("input-by-int4", "fails", "int8 image by int4 filters",
            IN + "v = DequantizeLinear <axis = 0> (c4, s_n) " + CONVOLUTION, **IMAGE),
    refused("input-by-int4", "fails", "int8 image by int4 filters, flat",
            IN + "v0 = DequantizeLinear <axis = 0> (c4_flat, s_n) v = Reshape (v0, oihw) " + CONVOLUTION, **IMAGE),
    refused("requantized", "fails", "int4 requantized with its own scale",
            IN + "v4 = DequantizeLinear <axis = 1> (w4, s_n) k = QuantizeLinear <axis = 1> (v4, s_n, z_n) "
            "v = DequantizeLinear <axis = 1> (k, s_n, z_n) " + PRODUCT),
    refused("requantized", "fails", "int4 filters requantized with their own scale",
            IN + "v4 = DequantizeLinear <axis = 0> (c4, s_n) k = QuantizeLinear <axis = 0> (v4, s_n, z_n) "
            "v = DequantizeLinear <axis = 0> (k, s_n, z_n) " + CONVOLUTION, **IMAGE),
    refused("requantized", "crashes", "int4 quantized with one scale, read with many",
            IN + "v0 = DequantizeLinear <axis = 0, block_size = 16> (w4, whole) " + PAIR),
    refused("requantized", "crashes", "weight quantized with one scale, read with many",
            IN + PAIR.replace("v0", "w")),
    refused("groups", None, "short last group", "v = DequantizeLinear <axis = 0, block_size = 64> (w200, c) "
            "y = MatMul (x, v)", x="float[16,200] x", y=ROWS["y"], tensors={"w200": int4(200, 32), "c": scales(4, 32)},
            same_plan="v = DequantizeLinear <axis = 0, block_size = 50> (w200, c) y = MatMul (x, v)"),
    refused("groups", "fails", "short last group that divides nothing",
            "v = DequantizeLinear <axis = 0, block_size = 64> (w1000, c) y = MatMul (x, v)", x="float[16,1000] x",
            y=ROWS["y"], tensors={"w1000": int4(1000, 32), "c": scales(16, 32)}),
    refused("groups", None, "more scales than groups",
            "v = DequantizeLinear <axis = 0, block_size = 16> (w4, c) y = MatMul (x, v)", tensors={"c": scales(8, 32)},
            same_plan="v = DequantizeLinear <axis = 0, block_size = 8> (w4, c) y = MatMul (x, v)"),
    refused("groups", "fails", "groups along two axes",
            "v = DequantizeLinear <axis = 0, block_size = 16> (w4, c) y = MatMul (x, v)", tensors={"c": scales(4, 2)}),
    refused("groups", "fails", "groups of input channels of a filter",
            "v = DequantizeLinear <axis = 1, block_size = 8> (c4, s_c4) " + CONVOLUTION.replace("d,", "x,"), **IMAGE),
    refused("half-sum", "hazard", "float16 scales for each channel",
            IN_HALF + "v = DequantizeLinear <axis = 1> (w8, half_n) " + PRODUCT, **HALF),
    refused("half-sum", "hazard", "float16 scales for each channel of a gemm",
            IN_HALF + "v = DequantizeLinear <axis = 0> (w8_t, half_n) y = Gemm <transB = 1> (d, v)",
            x="float16[16,64] x", y="float16[16,32] y"),
    refused("moved-codes", "fails", "int4 codes cast",
            "k = Cast <to = 3> (w4) v = DequantizeLinear <axis = 1> (k, s_n) y = MatMul (x, v)"),
    refused("moved-codes", "fails", "int8 codes cast", "k = Cast <to = 1> (w8) v = Mul (k, s_n) y = MatMul (x, v)"),
    refused("moved-codes", "fails", "int8 codes transposed", IN + "k = Transpose <perm = [1, 0]> (w8_t) "
            "v = DequantizeLinear <axis = 1> (k, s_n) " + PRODUCT),
    refused("moved-codes", "fails", "int8 codes reshaped", IN + "k = Reshape (w8_flat, kn) "
            "v = DequantizeLinear <axis = 1> (k, s_n) " + PRODUCT, tensors={"w8_flat": int8(2048)}),
]  # fmt: skip

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


def named(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


def found(path: Path, target: Target) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rules of its errors and of its warnings."""
    findings = Findings(tuple(lint(path, target)))
    return tuple(f.rule for f in findings.at("error")), tuple(f.rule for f in findings.at("warning"))


def plan_of(path: Path) -> tuple[bytes, tuple[Layer, ...], tuple[int, int]]:
    """The engine, its layers, and its products on integers and in floating point. Raises TargetError."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no verdict can be tested")
    plan, log = BuildTensorRT()._build(trt, path, {}, RTX)
    layers = read_layers(log)
    products = {
        n.name or f"node_of_{n.output[0]}"
        for n in onnx.load(path).graph.node
        if n.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose")
    }
    return plan, layers, count_products(layers, products)


@pytest.mark.parametrize("case", named(LEGAL))
def test_what_passes_builds_and_runs_on_integers_where_it_says_so(case, tmp_path):
    path = case.write(tmp_path)
    assert found(path, RTX) == ((), ())
    _, layers, counts = plan_of(path)
    assert counts == case.counts
    assert not find_hazards(layers)


@pytest.mark.parametrize("case", named(WARNED))
def test_what_is_warned_about_builds_and_multiplies_in_floating_point(case, tmp_path):
    path = case.write(tmp_path)
    assert found(path, RTX) == ((), case.warnings)
    assert plan_of(path)[2] == FLOATING


@pytest.mark.parametrize("case", named(REFUSED))
def test_what_is_refused_is_really_refused(case, tmp_path):
    path = case.write(tmp_path)
    assert set(found(path, RTX)[0]) == set(case.rules)
    match case.evidence:
        case "misread":  # what it computes instead is in test_importer.py
            plan_of(path)
        case "fails":
            with pytest.raises(TargetError):
                plan_of(path)
        case "crashes":
            assert builder_ends_with(path) == -11  # SIGSEGV
        case "float":
            assert plan_of(path)[2] == FLOATING
        case "hazard":
            assert find_hazards(plan_of(path)[1])
        case "no scale":  # of the kernel that quantizes
            quantize = next(layer for layer in plan_of(path)[1] if layer.outputs[0].dtype == "Int8")
            assert not quantize.constants
        case "nonsense":
            plan_of(path)
            assert computes_nonsense(path)
        case None:
            onnx.save(case.model(case.same_plan), tmp_path / "other.onnx")
            assert plan_of(path)[0] == plan_of(tmp_path / "other.onnx")[0]


def builder_ends_with(path: Path) -> int:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no verdict can be tested")
    code = (
        "import sys, tensorrt_rtx; from pathlib import Path; "
        "from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT; "
        "from intaglio.pipeline.formats.target import load_target; "
        "BuildTensorRT()._build(tensorrt_rtx, Path(sys.argv[1]), {}, load_target('tensorrt-rtx'))"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60).returncode


def test_every_rule_has_a_case_on_some_runtime():
    tried = {
        rule
        for case in (*REFUSED, *WARNED, *ORT_CASES, *(case for _, case in DOCUMENTED_CASES), *SHARED)
        for rule in (*case.rules, *case.warnings)
    } | {"name", "domain", "type", "double"}
    assert tried == {rule.name for rule in RULES}
    assert all(rule.why and rule.fix for rule in RULES)


@pytest.mark.parametrize("case", named(ORT_CASES))
def test_onnx_runtime_agrees(case, tmp_path, monkeypatch):
    # what loads and what is fused is asked, not what is exact on this CPU
    monkeypatch.setattr("intaglio.exporters.runtimes.onnxruntime.session.exact_kernels", lambda code=127: {})
    path = case.write(tmp_path)
    errors, warnings = found(path, ORT)
    assert (set(errors), warnings) == (set(case.rules), case.warnings)
    match case.evidence:
        case "fails":
            with pytest.raises(Exception, match="ONNXRuntimeError"):
                run(path)
        case "nonsense":
            assert computes_nonsense(path)
        case "float":
            assert run(path)[1] == FLOATING
        case _:
            assert run(path)[1] == case.counts


SHARED = [
    Case("siblings with one zero point", IN_U8 + "v = DequantizeLinear <axis = 1> (w8, s_n, z_n) y = MatMul (d, v) "
         "v2 = DequantizeLinear <axis = 1> (w8_b, s_n, z_n) z = MatMul (d, v2)", y="float[2,16,32] y, float[2,16,32] z",
         tensors={"w8_b": int8(64, 32), "z_b": np.zeros(32, np.int8)}, rules=("shared-zero-point",)),
]  # fmt: skip


@pytest.mark.parametrize("case", named(SHARED))
def test_weights_with_one_zero_point_do_not_load_with_the_kernels_for_cpus_without_vnni(case, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "intaglio.exporters.runtimes.onnxruntime.session.exact_kernels", lambda code=127: ORT.kernels[-1].settings
    )
    own = ORT.model_copy(update={"limits": ORT.limits.model_copy(update={"shared_zero_points": False})})
    path = case.write(tmp_path)
    assert found(path, own)[0] == case.rules
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(path)
    apart = replace(case, nodes=case.nodes.replace("(w8_b, s_n, z_n)", "(w8_b, s_n, z_b)")).write(tmp_path)
    assert found(apart, own) == ((), ())
    assert run(apart)[1] == (2, 0)


def run(path: Path) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Return the outputs of ONNX Runtime, and the numbers of its products on integers and in floating point."""
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    optimized = path.with_name("optimized.onnx")
    session = open_session(path, threads=1, optimized=optimized)
    rng = np.random.default_rng(3)
    types = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(double)": np.float64,
    }
    feed = {i.name: rng.normal(size=i.shape).astype(types[i.type]) for i in session.get_inputs()}
    ops = [node.op_type for node in onnx.load(optimized).graph.node]
    integer = sum(op in INTEGER for op in ops)
    floating = sum(op in ("MatMul", "FusedMatMul", "Gemm", "Conv", "MatMulNBits") for op in ops)
    return session.run(None, feed), (integer, floating)


def computes_nonsense(path: Path) -> bool:
    """NaN, Inf or zero, on random input."""
    return not all(np.isfinite(y).all() and y.any() for y in run(path)[0])


@pytest.mark.parametrize("target", DOCUMENTED)
def test_versions_that_cannot_run_here_follow_their_documents(target, tmp_path):
    for where, case in DOCUMENTED_CASES:
        if "Attention" in case.nodes and target in OLD:
            continue  # it has no such operator at all
        errors, warnings = found(case.write(tmp_path), load_target(target))
        later = () if case.rules == ("opset",) else ("opset",)  # is tested alone
        assert set(errors) - set(later) == (set(case.rules) if target in where else set()), case.name
        assert warnings == case.warnings, case.name


def test_an_attention_of_one_tensor_is_for_no_version_before_it_had_the_operator(tmp_path):
    case = Case("attention", "y = Attention (x, k, v)", **ATTENTION)
    path = case.write(tmp_path)
    assert {name for name in DOCUMENTED if "operator" in found(path, load_target(name))[0]} == OLD


def planned(layer):
    if layer.op == "conv":
        return FLOAT if layer.name in ("conv_in", "conv_out") else W8A8_STEP
    if "attn" in layer.name or "attention" in layer.name:
        return W8A8_TOKEN
    return w4a16(64) if layer.k >= 128 and "time_embedding" not in layer.name else W8A8_STEP


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_our_own_graphs_pass(name, target, request, tmp_path):
    there = load_target(target)

    def legal(layer):  # a patch embedding has too few channels for some
        return planned(layer) if illegal(layer, planned(layer), there) is None else FLOAT

    artifacts: Artifacts = with_plan(request.getfixturevalue(name), legal) | {TARGET: there}
    artifacts |= run_pass(ExportQdq(), artifacts, tmp_path / "qdq")
    findings = run_pass(Lint(), artifacts, tmp_path / "lint")[LINT]
    assert {f.rule for f in findings.findings} <= ({"floating"} if there.runtime == "onnxruntime" else set())
    assert not findings.at("error")


THREE_ERRORS = Case(
    "three errors",
    IN.replace("zero", "u0")
    + "v = DequantizeLinear <axis = 0> (w8, s_k) [first] p = MatMul (d, v) [second] z = Det (p) "
    "y = Abs (p)",
    y="float[2,16,32] y, float[2] z",
)


def test_the_pass_names_every_error(tmp_path):
    artifacts = {GRAPH: Graph(THREE_ERRORS.write(tmp_path), {}, {}), TARGET: RTX}
    with pytest.raises(TargetError, match=r"second: .* has no operator Det") as caught:
        run_pass(Lint(), artifacts, tmp_path / "lint")
    assert len(caught.value.problems) == 4  # `valid` knows as well that Det takes square matrices
    assert "QuantizeLinear of q: codes of type UINT8" in str(caught.value)
    assert "scales along axis 0 of the weight of first, whose channels are on axis 1" in str(caught.value)


def test_warnings_are_logged_once_a_rule(tmp_path, caplog):
    case = WARNED[1]
    artifacts = {GRAPH: Graph(case.write(tmp_path), {}, {}), TARGET: RTX}
    findings = run_pass(Lint(), artifacts, tmp_path / "lint")[LINT]
    assert [line.message.partition(":")[0] for line in caplog.records] == ["1 findings of the rule between, the first"]
    findings.save(tmp_path)
    assert Findings.load(tmp_path) == findings


def test_functions_and_branches_are_looked_into(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["": 21, "own": 1]>
    graph (float[8,8] x, bool c) => (float y, float z)
    {
        y = own.Volume (x)
        z = If (c) <then_branch = g1 () => (float a) { a = Det (x) }, else_branch = g2 () => (float b) { b = Det (x) }>
    }
    <domain: "own", opset_import: ["": 21]> Volume (m) => (v) { v = Det (m) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert found(tmp_path / "model.onnx", RTX)[0] == ("operator",) * 3


def outside(path: Path, location: str, **place: int) -> None:
    """Says that the weight of the model is kept elsewhere."""
    model = onnx.load(path)
    (weight,) = (t for t in model.graph.initializer if t.name == "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **place}.items():
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def test_a_function_with_the_name_of_an_operator_is_executed_as_that_operator(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["": 21, "own": 1]>
    graph (float[8,8] x) => (float[8,8] y) { y = own.Relu (x) }
    <domain: "own", opset_import: ["": 21]> Relu (m) => (v) { v = Neg (m) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert found(tmp_path / "model.onnx", RTX) == (("name",), ())
    assert found(tmp_path / "model.onnx", ORT) == ((), ())


def test_a_standard_name_of_another_domain_is_read_by_its_name_alone(tmp_path):
    case = Case("relu of nobody", "y = my.Relu (x)", y="float[2,16,64] y")
    assert found(case.write(tmp_path), RTX) == ((), ("domain",))
    attention = Case("attention", "y = com.microsoft.Attention <num_heads = 2> (x, w)", y="float[2,16,64] y")
    assert found(attention.write(tmp_path), load_target("tensorrt-11")) == (("name",), ())


def test_types_that_tensorrt_does_not_have_are_errors_and_float64_is_a_warning(tmp_path):
    cast = Case("cast", "d = Cast <to = {}> (x) y = Cast <to = 1> (d)", y="float[2,16,64] y")
    for kind, verdict in ((5, (("type",), ())), (11, ((), ("double",))), (7, ((), ()))):
        path = replace(cast, nodes=cast.nodes.replace("{}", str(kind))).write(tmp_path)
        assert found(path, RTX) == verdict


def test_data_beside_the_model_is_read(tmp_path):
    path = Case("float", "y = MatMul (x, w)").write(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(bytes(64 * 32 * 4))
    outside(path, "model.onnx.data")
    assert found(path, RTX) == ((), ())


@pytest.mark.parametrize(
    ("location", "place", "message"),
    [
        ("../secret", {}, r"w: its data is in ../secret, outside the model's folder"),
        ("/etc/passwd", {}, r"w: its data is in /etc/passwd, outside the model's folder"),
        ("link", {}, r"w: its data is in link, outside the model's folder"),
        ("gone", {}, r"w: its data is in gone, which is not there"),
        ("short", {}, r"w: 8192 bytes at 0, but short ends at 100"),
        ("short", {"offset": -8}, r"w: 8192 bytes at -8, but short ends at 100"),
        ("short", {"offset": 10**30}, r"w: 8192 bytes at 1000000000000000000000000000000, but short ends at 100"),
        ("short", {"offset": "far"}, r"w: its place in short is not a number of bytes"),
        ("x" * 5000, {}, r"w: its data is in 'x{40}', which is no possible file name: File name too long"),
        ("a\0b", {}, r"w: its data is in 'a\\x00b', which is no possible file name: .*null"),
    ],
)
def test_data_elsewhere_is_refused(location, place, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = Case("float", "y = MatMul (x, w)").write(folder)
    (tmp_path / "secret").write_bytes(bytes(8192))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "short").write_bytes(bytes(100))
    outside(path, location, **place)
    with pytest.raises(RecipeError, match=message):
        list(lint(path, RTX))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "it has no graph"),
        (b"no protobuf at all", "is no ONNX model"),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "it has no graph"),
        (Case("float", "y = MatMul (x, w)").model().SerializeToString()[:-50], "is no ONNX model"),
    ],
    ids=["missing", "empty", "text", "no-graph", "truncated"],
)
def test_what_is_no_model_is_one_clear_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    done = command(tmp_path / "model.onnx", "--target", "tensorrt-rtx")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


HUGE = 1 << 62


def absurd(*dims: int) -> onnx.TensorProto:
    """A tensor that says it has these dimensions, and holds one byte."""
    return onnx.TensorProto(data_type=TensorProto.INT8, dims=dims, raw_data=b"\1")


@pytest.mark.parametrize(
    ("case", "exit_code", "message"),
    [
        (Case("more than there is", IN + CHANNELS + PRODUCT, tensors={"w8": absurd(HUGE, HUGE)}), 1, "valid"),
        (Case("fewer than none", IN + CHANNELS + PRODUCT, tensors={"w8": absurd(-1, 32)}), 1, "valid"),
        (Case("a scalar weight", IN + CHANNELS + PRODUCT, tensors={"w8": np.int8(1)}), 1, "valid"),
        (Case("an axis that is not there", IN + CHANNELS.replace("= 1", "= 99") + PRODUCT), 1, "valid"),
        (Case("groups of less than one", GROUPS.replace("= 16", "= -16") + "y = MatMul (x, v)"), 1, "groups of -16"),
        (Case("a huge input", "y = Abs (x)", x=f"float[{HUGE},{HUGE}] x", y="float[2] y"), 1, "valid"),
        (Case("a huge range", "r = Range (zero_, far, step) y = Add (x, r)", x="int64[n] x", y="int64[n] y",
              tensors={"zero_": np.int64(0), "far": np.int64(10**15), "step": np.int64(1)}), 1, "Range of more than"),
        (Case("an opset of nobody", "y = Abs (x)", y="float[2,16,64] y", opset=10**6), 1, "opset 1000000"),
    ],
    ids=lambda value: value.name.replace(" ", "-") if isinstance(value, Case) else "",
)  # fmt: skip
def test_absurd_shapes_are_findings(case, exit_code, message, tmp_path):
    done = command(case.write(tmp_path), "--target", "tensorrt-10.16-orin")
    assert done.exit_code == exit_code, done.stderr
    assert message in done.stdout
    assert "Traceback" not in done.stderr


def command(*arguments: object):
    return CliRunner().invoke(app, ["lint", *map(str, arguments)], env={"COLUMNS": "300"})


def test_the_command_prints_findings_as_json(tmp_path):
    determinant = next(case for case in REFUSED if case.name == "determinant")
    done = command(determinant.write(tmp_path), "--target", "tensorrt-rtx", "--json")
    assert done.exit_code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert set(finding) == {"rule", "level", "node", "message", "fix"}
    assert (finding["rule"], finding["level"], finding["node"]) == ("operator", "error", "Det of y")


@pytest.mark.parametrize(("case", "exit_code"), [(LEGAL[0], 0), (WARNED[0], 0), (REFUSED[0], 1)])
def test_the_command_fails_for_errors_alone(case, exit_code, tmp_path):
    done = command(case.write(tmp_path), "--target", "tensorrt-rtx")
    assert done.exit_code == exit_code, done.stderr
    assert all(rule in done.stdout for rule in (*case.rules, *case.warnings))


def test_the_command_lists_its_rules_without_a_model():
    done = command("--rules")
    assert done.exit_code == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[rule.name, rule.level] for rule in RULES]
    assert all(rule.finds and "\n" not in rule.finds and rule.finds in done.stdout for rule in RULES)


def test_an_unknown_target_is_named(tmp_path):
    done = command(LEGAL[0].write(tmp_path), "--target", "tensorrt-rxt")
    assert done.exit_code == 2
    assert "did you mean 'tensorrt-rtx'" in done.stderr
