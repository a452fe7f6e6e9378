# ruff: noqa: E501 - a form is a row of a table
"""TensorRT's parser understands each form of an operator as ONNX does, refuses it, or lint says that it does not.

Parsing takes milliseconds and no GPU: the network that the parser makes is executed in numpy, from the attributes of its
layers, and held against ONNX Runtime.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tensorrt_layers import compute, parse

from intaglio.exporters.lint.lint import lint
from intaglio.pipeline.formats.target import load_target

TARGET = load_target("tensorrt-rtx")


@dataclass(frozen=True)
class Form:
    """Nodes that make y of x, in the syntax of onnx.parser; `x` is an array, or the shape of noise."""

    name: str
    nodes: str
    x: object = (2, 8, 4, 4)
    opset: int = 21
    constants: dict[str, object] = field(default_factory=dict)

    def feed(self) -> dict[str, np.ndarray]:
        if isinstance(self.x, tuple):
            return {"x": np.random.default_rng(5).normal(size=self.x).astype(np.float32) * 3}
        return {"x": np.asarray(self.x)}

    def model(self) -> onnx.ModelProto:
        x = self.feed()["x"]
        kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
        text = f'<ir_version: 10, opset_import: ["": {self.opset}]> g (float x) => (float y) {{ {self.nodes} }}'
        model = onnx.parser.parse_model(text)
        model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", kind, x.shape))
        model.graph.output[0].ClearField("type")
        arrays = {**CONSTANTS, **self.constants}
        read = dict.fromkeys(name for node in model.graph.node for name in node.input)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(arrays[n]), n) for n in read if n in arrays)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        if not model.graph.output[0].type.tensor_type.elem_type:  # of deprecated operators nothing is inferred
            model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
        return model


def i64(*values):
    return np.array(values, np.int64)


def f32(*values):
    return np.array(values, np.float32)


def ramp(*shape):
    return np.linspace(-1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)


CONSTANTS = {
    "s8": ramp(8), "b8": ramp(8)[::-1], "s4": ramp(4), "b4": ramp(4)[::-1], "s1": f32(1.5), "b1": f32(0.25),
    "var8": np.abs(ramp(8)) + 0.5, "s44": ramp(4, 4), "b44": ramp(4, 4)[::-1], "s844": ramp(8, 4, 4),
    "m1": i64(-1), "m2": i64(-2), "zero": i64(0), "one": i64(1), "two": i64(2), "three": i64(3), "far": i64(2**62),
    "least": i64(-(2**62)), "last2": i64(-2, -1), "a13": i64(1, 3), "none": np.zeros(0, np.int64),
    "k3": ramp(8, 8, 3, 3) / 8, "k2": ramp(8, 8, 2, 2) / 8, "dw3": ramp(8, 1, 3, 3),
}  # fmt: skip


def several(name, nodes, choices, **more):
    return [Form(f"{name} {choice}", nodes.replace("{}", str(choice)), **more) for choice in choices]


NORMALIZATIONS = [
    *several("group norm 21, groups", "y = GroupNormalization <num_groups = {}, epsilon = 0.01> (x, s8, b8)", (1, 2, 4, 8)),
    *several("group norm 21 in 3-D, groups", "y = GroupNormalization <num_groups = {}> (x, s8, b8)", (1, 2, 8), x=(2, 8, 6)),
    *several("group norm 21 in 5-D, groups", "y = GroupNormalization <num_groups = {}> (x, s8, b8)", (1, 2), x=(2, 8, 2, 3, 2)),
    Form("group norm 21 in 2-D", "y = GroupNormalization <num_groups = 2> (x, s8, b8)", x=(2, 8)),
    Form("group norm 21 of one channel", "y = GroupNormalization <num_groups = 1> (x, s1, b1)", x=(2, 1, 4, 4)),
    Form("group norm 18", "y = GroupNormalization <num_groups = 4> (x, s4, b4)", opset=20),
    Form("group norm 18, one group", "y = GroupNormalization <num_groups = 1> (x, s1, b1)", opset=20),
    Form("group norm 18, a group a channel", "y = GroupNormalization <num_groups = 8> (x, s8, b8)", opset=20),
    Form("instance norm", "y = InstanceNormalization <epsilon = 0.01> (x, s8, b8)"),
    Form("instance norm in 3-D", "y = InstanceNormalization (x, s8, b8)", x=(2, 8, 6)),
    Form("instance norm in 5-D", "y = InstanceNormalization (x, s8, b8)", x=(2, 8, 2, 3, 2)),
    *several("layer norm, axis", "y = LayerNormalization <axis = {}, epsilon = 0.01> (x, s, b)", (-1, 3), constants={"s": ramp(4), "b": ramp(4)}),
    *several("layer norm, axis", "y = LayerNormalization <axis = {}> (x, s44, b44)", (-2, 2)),
    *several("layer norm, axis", "y = LayerNormalization <axis = {}> (x, s844)", (1, -3)),
    Form("layer norm without bias", "y = LayerNormalization (x, s4)"),
    Form("layer norm, stash type 1", "y = LayerNormalization <stash_type = 1> (x, s4, b4)"),
    Form("layer norm, scalar-like scale", "y = LayerNormalization <axis = 1> (x, s1, b1)"),
    Form("layer norm of 2-D", "y = LayerNormalization <axis = -1> (x, s8, b8)", x=(3, 8)),
    *several("rms norm, axis", "y = RMSNormalization <axis = {}, epsilon = 0.01> (x, s)", (-1, 3), opset=23, constants={"s": ramp(4)}),
    *several("rms norm, axis", "y = RMSNormalization <axis = {}> (x, s44)", (-2, 2), opset=23),
    Form("rms norm, axis 1", "y = RMSNormalization <axis = 1> (x, s844)", opset=23),
    *several("lp norm, p", "y = LpNormalization <axis = -1, p = {}> (x)", (1, 2)),
    *several("lp norm, axis", "y = LpNormalization <axis = {}> (x)", (0, 1, -2)),
    Form("batch norm", "y = BatchNormalization <epsilon = 0.01> (x, s8, b8, b8, var8)"),
    Form("batch norm in 3-D", "y = BatchNormalization (x, s8, b8, b8, var8)", x=(2, 8, 6)),
    Form("batch norm in 2-D", "y = BatchNormalization (x, s8, b8, b8, var8)", x=(2, 8)),
    *several("lrn, size", "y = LRN <size = {}, alpha = 0.3, beta = 0.7, bias = 2.0> (x)", (3, 5)),
    *several("mean variance norm, axes", "y = MeanVarianceNormalization <axes = {}> (x)", ("[0, 2, 3]", "[1]", "[-1]")),
]  # fmt: skip
NORMALIZATIONS += [
    Form(f"instance norm of {g} groups in {rank}-D", "r = Reshape (x, to) i = InstanceNormalization (r, s, b) z = Shape (x) y = Reshape (i, z)",
         constants={"to": to, "s": ramp(g) + 2, "b": ramp(g)})
    for g in (1, 2, 8) for rank, to in ((3, i64(0, g, -1)), (4, i64(0, g, -1, 4)))
]  # fmt: skip

REDUCE = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
          "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
REDUCTIONS = [
    *(Form(f"{op} of axis -2", f"a = Abs (x) y = {op} <keepdims = 0> (a, m2)") for op in REDUCE),
    *(Form(f"{op} of all", f"a = Abs (x) y = {op} (a)") for op in REDUCE),
    *(Form(f"{op} of two, kept", f"a = Abs (x) y = {op} (a, a13)") for op in REDUCE),
    *(Form(f"{op} of no axis, noop", f"a = Abs (x) y = {op} <noop_with_empty_axes = 1> (a)") for op in REDUCE),
    *(Form(f"{op} of no axis, noop, empty axes", f"a = Abs (x) y = {op} <noop_with_empty_axes = 1> (a, none)") for op in ("ReduceSum", "ReduceMean", "ReduceL2")),
    *(Form(f"{op} of empty axes", f"a = Abs (x) y = {op} (a, none)") for op in ("ReduceSum", "ReduceMax")),
    *(Form(f"{op} of opset 13, axes as attribute", f"a = Abs (x) y = {op} <axes = [-1, 1], keepdims = 0> (a)", opset=13) for op in ("ReduceMean", "ReduceMax", "ReduceL2")),
    *several("arg max, axis", "y = ArgMax <axis = {}, keepdims = 0> (x)", (-1, 0, 2)),
    Form("arg max of equals", "y = ArgMax <axis = 1> (x)", x=f32(*[[[1, 3, 3, 2], [5, 5, 5, 5]]] * 2)[:, 0]),
    Form("arg max of equals, last", "y = ArgMax <axis = 1, select_last_index = 1> (x)", x=f32(*[[[1, 3, 3, 2], [5, 5, 5, 5]]] * 2)[:, 0]),
    *several("arg min, axis", "y = ArgMin <axis = {}> (x)", (-1, 1)),
    *several("softmax, axis", "y = Softmax <axis = {}> (x)", (-1, 0, 1, 2)),
    *several("softmax of opset 11, axis", "y = Softmax <axis = {}> (x)", (1, 2, 3), opset=11),
    Form("softmax of opset 11 by default", "y = Softmax (x)", opset=11),
    Form("softmax by default", "y = Softmax (x)"),
    *several("log softmax, axis", "y = LogSoftmax <axis = {}> (x)", (-1, 1)),
    Form("log softmax of opset 11", "y = LogSoftmax <axis = 1> (x)", opset=11),
    *several("hardmax, axis", "y = Hardmax <axis = {}> (x)", (-1, 1)),
    Form("hardmax of opset 11", "y = Hardmax <axis = 1> (x)", opset=11),
    *several("cumsum", "y = CumSum <exclusive = 0, reverse = {}> (x, one_)", (0, 1), constants={"one_": np.int64(1)}),
    *several("cumsum, exclusive, reverse", "y = CumSum <exclusive = 1, reverse = {}> (x, last)", (0, 1), constants={"last": np.int64(-1)}),
    *several("global pool", "y = Global{} (x)", ("AveragePool", "MaxPool", "LpPool")),
]  # fmt: skip

SCALES, SIZES = {"s": f32(1, 1, 2, 2)}, {"z": i64(2, 8, 7, 9)}
DOWN = {"s": f32(1, 1, 0.55, 0.82)}
RESIZES = [
    *(
        Form(f"resize {mode} {transform} {nearest} by {by}".replace("  ", " "),
             f'y = Resize <mode = "{mode}", coordinate_transformation_mode = "{transform}"{more}> (x, , {inputs})',
             constants=constants)
        for mode, nearest, more in (
            *(("nearest", n, f', nearest_mode = "{n}"') for n in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
            ("linear", "", ""), ("cubic", "", ""), ("cubic", "a -0.5", ", cubic_coeff_a = -0.5"), ("cubic", "outside", ", exclude_outside = 1"),
        )
        for transform in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
        for by, inputs, constants in (("scales", "s", SCALES), ("smaller scales", "s", DOWN), ("sizes", ", z", SIZES))
    ),
    *several("resize to one pixel", 'y = Resize <mode = "linear", coordinate_transformation_mode = "{}"> (x, , , z)', ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"), constants={"z": i64(2, 8, 1, 1)}),
    Form("resize of some axes", 'y = Resize <mode = "linear", axes = [2, 3]> (x, , s)', constants={"s": f32(2, 3)}),
    Form("resize of axes in another order", 'y = Resize <mode = "linear", axes = [3, 2]> (x, , s)', constants={"s": f32(2, 3)}),
    Form("resize of negative axes", 'y = Resize <mode = "nearest", axes = [-1]> (x, , s)', constants={"s": f32(2)}),
    *several("resize, keep aspect ratio", 'y = Resize <mode = "nearest", keep_aspect_ratio_policy = "{}", axes = [2, 3]> (x, , , z)', ("stretch", "not_larger", "not_smaller"), constants={"z": i64(7, 10)}),
    Form("resize with tf_crop_and_resize", 'y = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (x, roi, s)', constants={"roi": f32(0, 0, 0.1, 0.2, 1, 1, 0.8, 0.9), **SCALES}),
    Form("resize of opset 10", 'y = Resize <mode = "nearest"> (x, s)', opset=10, constants=SCALES),
    Form("resize of opset 11 by sizes", 'y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, e, e, z)', opset=11, constants={**SIZES, "e": f32()}),
    *several("upsample", 'y = Upsample <mode = "{}"> (x, s)', ("nearest", "linear"), opset=9, constants=SCALES),
    Form("resize of channels", 'y = Resize <mode = "nearest"> (x, , s)', constants={"s": f32(1, 2, 1, 1)}),
    Form("resize in 3-D", 'y = Resize <mode = "linear"> (x, , s)', x=(2, 4, 5), constants={"s": f32(1, 1, 2)}),
    Form("resize in 5-D", 'y = Resize <mode = "nearest"> (x, , s)', x=(1, 2, 3, 4, 2), constants={"s": f32(1, 1, 2, 2, 2)}),
]  # fmt: skip

POOLS = [
    *(
        Form(f"average pool, count {count}, ceil {ceil}, {name}",
             f"y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], count_include_pad = {count}, ceil_mode = {ceil}{more}> (x)", x=(1, 8, 6, 7))
        for count in (0, 1) for ceil in (0, 1)
        for name, more in (("no pads", ""), ("pads", ", pads = [1, 1, 1, 1]"), ("uneven pads", ", pads = [0, 1, 1, 0]"), ("same upper", ', auto_pad = "SAME_UPPER"'), ("same lower", ', auto_pad = "SAME_LOWER"'), ("valid", ', auto_pad = "VALID"'))
    ),
    *(
        Form(f"max pool, ceil {ceil}, {name}", f"y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = {ceil}{more}> (x)", x=(1, 8, 6, 7))
        for ceil in (0, 1)
        for name, more in (("no pads", ""), ("pads", ", pads = [1, 1, 1, 1]"), ("uneven pads", ", pads = [0, 1, 1, 0]"), ("same upper", ', auto_pad = "SAME_UPPER"'), ("same lower", ', auto_pad = "SAME_LOWER"'), ("dilations", ", dilations = [2, 1]"))
    ),
    Form("average pool, dilations", "y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x)", x=(1, 8, 6, 7)),
    Form("average pool in 3-D", "y = AveragePool <kernel_shape = [3], pads = [1, 1], count_include_pad = 1> (x)", x=(1, 8, 7)),
    Form("average pool in 5-D", "y = AveragePool <kernel_shape = [2, 2, 2], pads = [1, 0, 0, 0, 1, 0]> (x)", x=(1, 2, 4, 4, 4)),
    Form("max pool in 3-D", "y = MaxPool <kernel_shape = [3], pads = [1, 0]> (x)", x=(1, 8, 7)),
    *several("lp pool, p", "y = LpPool <kernel_shape = [2, 2], p = {}> (x)", (1, 2)),
]  # fmt: skip

CONVOLUTIONS = [
    Form("convolution", "y = Conv <pads = [1, 1, 1, 1]> (x, k3, b8)"),
    Form("convolution, uneven pads", "y = Conv <pads = [0, 1, 2, 0]> (x, k3)"),
    Form("convolution, strides and dilations", "y = Conv <pads = [2, 2, 2, 2], dilations = [2, 1], strides = [1, 2]> (x, k3)"),
    *several("convolution", 'y = Conv <auto_pad = "{}", strides = [2, 2]> (x, k3)', ("SAME_UPPER", "SAME_LOWER", "VALID"), x=(1, 8, 6, 7)),
    *several("convolution, stride 1", 'y = Conv <auto_pad = "{}"> (x, k2)', ("SAME_UPPER", "SAME_LOWER"), x=(1, 8, 6, 7)),
    *several("convolution, dilated", 'y = Conv <auto_pad = "{}", dilations = [2, 2]> (x, k2)', ("SAME_UPPER", "SAME_LOWER"), x=(1, 8, 6, 7)),
    Form("depthwise convolution", "y = Conv <group = 8, pads = [1, 1, 1, 1]> (x, dw3, b8)"),
    Form("convolution in 3-D", "y = Conv <pads = [1, 0]> (x, k, b8)", x=(2, 8, 6), constants={"k": ramp(8, 8, 3)}),
    Form("convolution in 5-D", "y = Conv <pads = [1, 0, 0, 0, 1, 0]> (x, k)", x=(1, 2, 4, 4, 4), constants={"k": ramp(3, 2, 2, 2, 2)}),
    Form("convolution by computed weights", "k = Mul (k3, two_) y = Conv <pads = [1, 1, 1, 1]> (x, k)", constants={"two_": f32(2)}),
    Form("transposed convolution", "y = ConvTranspose <strides = [2, 2]> (x, k3, b8)"),
    Form("transposed convolution, pads", "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1]> (x, k3)"),
    Form("transposed convolution, output padding", "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]> (x, k3)"),
    *several("transposed convolution, output shape", 'y = ConvTranspose <strides = [2, 2], output_shape = [8, 8], auto_pad = "{}"> (x, k3)', ("NOTSET", "SAME_UPPER", "SAME_LOWER")),
    *several("transposed convolution", 'y = ConvTranspose <strides = [2, 2], auto_pad = "{}"> (x, k3)', ("SAME_UPPER", "SAME_LOWER", "VALID")),
    Form("transposed convolution, dilations", "y = ConvTranspose <dilations = [2, 1]> (x, k3)"),
    Form("transposed convolution, groups", "y = ConvTranspose <group = 2, strides = [2, 2]> (x, k)", constants={"k": ramp(8, 3, 2, 2)}),
    Form("transposed convolution in 3-D", "y = ConvTranspose <strides = [2], output_padding = [1]> (x, k)", x=(2, 8, 6), constants={"k": ramp(8, 4, 3)}),
]  # fmt: skip

SLICES = [
    *(Form(f"slice {name}", "y = Slice (x, a, b, c, d)", constants={"a": i64(a), "b": i64(b), "c": i64(axis), "d": i64(step)}, x=(2, 3, 7))
      for name, a, b, axis, step in (
          ("forward", 1, 5, 2, 1), ("by two", 0, 7, 2, 2), ("by three", 1, 7, 2, 3), ("negative axis", 1, 4, -1, 1), ("negative ends", -4, -1, 2, 1), ("beyond", 2, 2**62, 2, 1),
          ("before", -100, 3, 2, 1), ("nothing", 5, 2, 2, 1), ("start beyond", 9, 12, 2, 1), ("backward", 5, 1, 2, -1), ("backward by two", 6, 0, 2, -2), ("backward to the start", -1, -100, 2, -1),
          ("backward to least", 6, -(2**62), 2, -1), ("backward from beyond", 100, -100, 2, -1), ("backward by three", -1, -(2**63) + 1, 2, -3), ("backward to negative", 5, -6, 2, -1),
          ("backward nothing", 2, 5, 2, -1), ("end int max", 0, 2**63 - 1, 2, 1), ("by four beyond", 0, 100, 2, 4),
      )),
    Form("slice of two axes", "y = Slice (x, a, b, c, d)", constants={"a": i64(-1, 0), "b": i64(-9, 2), "c": i64(-1, 1), "d": i64(-2, 1)}, x=(2, 3, 7)),
    Form("slice without axes", "y = Slice (x, a, b)", constants={"a": i64(0, 1, 2), "b": i64(2, 3, 5)}, x=(2, 3, 7)),
    Form("slice of opset 9", "y = Slice <starts = [-3], ends = [100], axes = [2]> (x)", opset=9, x=(2, 3, 7)),
    *(Form(f"pad {mode}", f'y = Pad <mode = "{mode}"> (x, p)', constants={"p": i64(0, 1, 2, 1, 0, 3)}, x=(2, 3, 7)) for mode in ("constant", "edge", "wrap")),
    Form("pad reflect", 'y = Pad <mode = "reflect"> (x, p)', constants={"p": i64(0, 1, 2, 1, 0, 3)}, x=(2, 3, 7)),
    Form("pad with a value", "y = Pad (x, p, v)", constants={"p": i64(0, 1, 2, 1, 0, 3), "v": np.float32(2.5)}, x=(2, 3, 7)),
    Form("pad by less than nothing", "y = Pad (x, p)", constants={"p": i64(0, 0, -2, 0, 0, 1)}, x=(2, 3, 7)),
    Form("pad by less than nothing, edge", 'y = Pad <mode = "edge"> (x, p)', constants={"p": i64(0, 0, 1, 0, -1, -2)}, x=(2, 3, 7)),
    Form("pad by less than nothing, reflect", 'y = Pad <mode = "reflect"> (x, p)', constants={"p": i64(0, 0, 2, 0, -1, -2)}, x=(2, 3, 7)),
    Form("pad of some axes", "y = Pad (x, p, v, c)", constants={"p": i64(1, 2, 3, 4), "v": np.float32(0.5), "c": i64(-1, 0)}, x=(2, 3, 7)),
    Form("pad of opset 2", 'y = Pad <mode = "constant", pads = [0, 1, 2, 1, 0, 3], value = 1.5> (x)', opset=10, x=(2, 3, 7)),
    *several("gather, axis", "y = Gather <axis = {}> (x, i)", (0, 1, -1), constants={"i": i64(0, -1, 1)}, x=(2, 3, 7)),
    Form("gather by a scalar", "y = Gather <axis = 1> (x, i)", constants={"i": np.int64(-2)}, x=(2, 3, 7)),
    Form("gather by a table", "y = Gather <axis = 1> (x, i)", constants={"i": np.array([[0, -1], [2, 1]])}, x=(2, 3, 7)),
    Form("gather elements", "y = GatherElements <axis = -1> (x, i)", constants={"i": np.array([[[0, -1]] * 3] * 2)}, x=(2, 3, 7)),
    Form("gather nd", "y = GatherND (x, i)", constants={"i": np.array([[0, 1], [-1, -2]])}, x=(2, 3, 7)),
    Form("gather nd, batch", "y = GatherND <batch_dims = 1> (x, i)", constants={"i": np.array([[1], [-1]])}, x=(2, 3, 7)),
    *several("scatter nd", "y = ScatterND (x, i, u)", ("",), constants={"i": np.array([[0, 1], [-1, -2]]), "u": ramp(2, 7)}, x=(2, 3, 7)),
    *several("scatter nd, reduction", 'y = ScatterND <reduction = "{}"> (x, i, u)', ("add", "mul", "max", "min"), constants={"i": np.array([[0, 1], [0, 1]]), "u": ramp(2, 7)}, x=(2, 3, 7)),
    *several("scatter elements, axis", "y = ScatterElements <axis = {}> (x, i, u)", (1, -1), constants={"i": np.array([[[0, -1, 1]]]), "u": ramp(1, 1, 3)}, x=(2, 3, 7)),
    *several("scatter elements, reduction", 'y = ScatterElements <axis = 2, reduction = "{}"> (x, i, u)', ("add", "mul", "max", "min"), constants={"i": np.array([[[0, 0, 1]]]), "u": ramp(1, 1, 3)}, x=(2, 3, 7)),
    *several("split", "y, z = Split <axis = {}> (x, n)", (2, -1), constants={"n": i64(2, 5)}, x=(2, 3, 7)),
    Form("split, uneven", "y, z, w = Split <axis = 2, num_outputs = 3> (x)", x=(2, 3, 7)),
    Form("split, uneven, the last", "a, b, y = Split <axis = 2, num_outputs = 3> (x)", x=(2, 3, 7)),
    Form("split, even", "a, y = Split <axis = 1, num_outputs = 2> (x)"),
    Form("split of opset 11", "a, y = Split <axis = 2, split = [3, 4]> (x)", opset=11, x=(2, 3, 7)),
    Form("concat", "y = Concat <axis = -1> (x, x)", x=(2, 3, 7)),
    Form("expand", "y = Expand (x, z)", constants={"z": i64(5, 1, 3, 7)}, x=(1, 3, 1)),
    Form("expand by less", "y = Expand (x, z)", constants={"z": i64(1, 1)}, x=(2, 3, 7)),
    Form("tile", "y = Tile (x, z)", constants={"z": i64(2, 1, 3)}, x=(2, 3, 7)),
    Form("where", "c = Greater (x, w) y = Where (c, x, w)", constants={"w": ramp(7)}, x=(2, 3, 7)),
    *several("trilu, upper", "y = Trilu <upper = {}> (x)", (0, 1), x=(2, 3, 4)),
    *(Form(f"trilu by {k}, upper {u}", f"y = Trilu <upper = {u}> (x, k)", constants={"k": np.int64(k)}, x=(2, 3, 4)) for k in (-1, 2) for u in (0, 1)),
    *several("depth to space", 'y = DepthToSpace <blocksize = 2, mode = "{}"> (x)', ("DCR", "CRD")),
    Form("space to depth", "y = SpaceToDepth <blocksize = 2> (x)"),
    Form("top k", "y, i = TopK <axis = -1> (x, k)", constants={"k": i64(3)}, x=(2, 3, 7)),
    Form("top k, places", "v, y = TopK <axis = 1> (x, k)", constants={"k": i64(2)}, x=(2, 3, 7)),
    Form("top k, smallest", "y, i = TopK <axis = -1, largest = 0> (x, k)", constants={"k": i64(3)}, x=(2, 3, 7)),
    Form("one hot", "y = OneHot <axis = 1> (x, d, v)", x=i64(0, 2, -1), constants={"d": np.int64(4), "v": f32(-1, 2)}),
    Form("reverse sequence", "y = ReverseSequence <time_axis = 0, batch_axis = 1> (x, n)", constants={"n": i64(2, 4, 1)}, x=(4, 3)),
    Form("eye like", "y = EyeLike <k = 1> (x)", x=(3, 4)),
    Form("flatten", "y = Flatten <axis = 2> (x)"), Form("flatten, negative", "y = Flatten <axis = -1> (x)"), Form("flatten at 0", "y = Flatten <axis = 0> (x)"),
    Form("reshape with zero", "y = Reshape (x, z)", constants={"z": i64(0, -1, 4)}),
    Form("reshape to nothing, allowzero", "y = Reshape <allowzero = 1> (x, z)", x=(0, 4), constants={"z": i64(0, 2)}),
    Form("squeeze all", "y = Squeeze (x)", x=(2, 1, 3, 1)), Form("squeeze some", "y = Squeeze (x, m1)", x=(2, 1, 3, 1)),
    Form("unsqueeze", "y = Unsqueeze (x, a)", x=(2, 3), constants={"a": i64(-1, 0)}),
    Form("transpose", "y = Transpose <perm = [2, 0, 1]> (x)", x=(2, 3, 7)), Form("transpose by default", "y = Transpose (x)", x=(2, 3, 7)),
    Form("shape from, to", "y = Shape <start = -3, end = -1> (x)"), Form("size", "y = Size (x)"),
    Form("range", "r = Range (a, b, c) q = Cast <to = 1> (r) y = Add (x, q)", constants={"a": np.int64(7), "b": np.int64(-2), "c": np.int64(-2)}, x=(5,)),
    Form("constant of shape", "c = ConstantOfShape <value = float[1] {2.5}> (z) y = Add (x, c)", x=(2, 3), constants={"z": i64(2, 3)}),
    *several("grid sample", 'y = GridSample <mode = "{}"> (x, g)', ("linear", "nearest", "cubic"), constants={"g": ramp(2, 3, 3, 2) * 0.7}),
    *(Form(f"grid sample {pad} {corners}", f'y = GridSample <padding_mode = "{pad}", align_corners = {corners}> (x, g)', constants={"g": ramp(2, 3, 3, 2)}) for pad in ("zeros", "border", "reflection") for corners in (0, 1)),
]  # fmt: skip

HALVES = f32(-2.5, -1.5, -0.7, -0.5, 0.0, 0.5, 0.7, 1.5, 2.5, 3.0)
SIGNED = f32(-7, -5.5, -3, -1, 0, 1, 3, 5.5, 7)
ARITHMETIC = [
    *(Form(f"cast to {kind}", f"y = Cast <to = {to}> (x)", x=HALVES) for kind, to in (("int32", 6), ("int64", 7), ("bool", 9), ("float16", 10))),
    Form("cast to uint8", "y = Cast <to = 2> (x)", x=f32(0, 0.7, 3.5, 254.6)),
    Form("cast of int64 to bool", "y = Cast <to = 9> (x)", x=i64(-2, 0, 1, 256)), Form("cast of bool", "y = Cast <to = 1> (x)", x=np.array([True, False])),
    Form("cast of int64 to float", "y = Cast <to = 1> (x)", x=i64(-2, 0, 1, 256)),
    *(Form(f"{op}", f"y = {op} (x)", x=HALVES) for op in ("Round", "Floor", "Ceil", "Sign", "Abs", "Neg", "Exp", "Sigmoid", "Tanh", "Relu", "Softplus", "Softsign", "Erf", "Sin", "Cos", "Elu", "Selu", "Celu", "LeakyRelu", "HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Identity")),
    Form("Swish", "y = Swish (x)", x=HALVES, opset=24), Form("Swish, alpha", "y = Swish <alpha = 1.7> (x)", x=HALVES, opset=24),
    *several("hard sigmoid", "y = HardSigmoid <alpha = {}, beta = 0.4> (x)", (0.1666667, 0.3), x=HALVES),
    Form("elu, alpha", "y = Elu <alpha = 0.3> (x)", x=HALVES), Form("celu, alpha", "y = Celu <alpha = 0.3> (x)", x=HALVES),
    Form("selu, alpha and gamma", "y = Selu <alpha = 1.3, gamma = 0.7> (x)", x=HALVES), Form("leaky relu, alpha", "y = LeakyRelu <alpha = 0.3> (x)", x=HALVES),
    Form("thresholded relu", "y = ThresholdedRelu <alpha = 0.6> (x)", x=HALVES), Form("shrink", "y = Shrink <lambd = 0.6, bias = 0.2> (x)", x=HALVES),
    Form("p relu", "y = PRelu (x, s)", constants={"s": ramp(8, 1, 1)}),
    *several("gelu", 'y = Gelu <approximate = "{}"> (x)', ("none", "tanh"), x=HALVES),
    Form("clip", "y = Clip (x, a, b)", x=HALVES, constants={"a": np.float32(-1), "b": np.float32(0.6)}), Form("clip from below", "y = Clip (x, a)", x=HALVES, constants={"a": np.float32(-1)}),
    Form("clip from above", "y = Clip (x, , b)", x=HALVES, constants={"b": np.float32(0.6)}), Form("clip, crossed", "y = Clip (x, a, b)", x=HALVES, constants={"a": np.float32(1), "b": np.float32(-1)}),
    Form("clip of int64", "y = Clip (x, a, b)", x=i64(-9, 0, 9), constants={"a": np.int64(-2), "b": np.int64(3)}), Form("clip of opset 6", "y = Clip <min = -1.0, max = 0.6> (x)", x=HALVES, opset=10),
    Form("mod of floats, fmod", "y = Mod <fmod = 1> (x, d)", x=SIGNED, constants={"d": f32(3)}), Form("mod of floats, fmod, negative", "y = Mod <fmod = 1> (x, d)", x=SIGNED, constants={"d": f32(-3)}),
    *(Form(f"mod of integers by {d}, fmod {m}", f"y = Mod <fmod = {m}> (x, d)", x=i64(-7, -3, -1, 0, 1, 3, 7), constants={"d": i64(d)}) for d in (3, -3) for m in (0, 1)),
    Form("division of integers", "y = Div (x, d)", x=i64(-7, -3, -1, 0, 1, 3, 7), constants={"d": i64(2)}), Form("division of floats", "y = Div (x, d)", x=SIGNED, constants={"d": f32(2)}),
    Form("power", "y = Pow (x, d)", x=SIGNED, constants={"d": f32(2)}), Form("power of mixed types", "y = Pow (x, d)", x=SIGNED, constants={"d": i64(3)}), Form("reciprocal", "y = Reciprocal (x)", x=f32(-2, 0.5)),
    *(Form(f"{op}", f"y = {op} (x, d)", x=SIGNED, constants={"d": f32(3)}) for op in ("Add", "Sub", "Mul", "Max", "Min", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Mean", "Sum")),
    *(Form(f"{op} of three", f"y = {op} (x, d, x)", x=SIGNED, constants={"d": f32(3)}) for op in ("Max", "Min", "Mean", "Sum")),
    *(Form(f"{op}", f"c = Greater (x, d) e = Less (x, f) y = {op} (c, e)", x=SIGNED, constants={"d": f32(-3), "f": f32(2)}) for op in ("And", "Or", "Xor")),
    Form("not", "c = Greater (x, d) y = Not (c)", x=SIGNED, constants={"d": f32(-3)}), Form("is nan", "y = IsNaN (x)", x=f32(0, np.nan, np.inf)), *several("is inf, negative", "y = IsInf <detect_negative = {}> (x)", (0, 1), x=f32(0, np.nan, np.inf, -np.inf)),
    Form("is inf, positive off", "y = IsInf <detect_positive = 0> (x)", x=f32(0, np.nan, np.inf, -np.inf)),
    *(Form(f"gemm {a}{b}", f"y = Gemm <transA = {a}, transB = {b}, alpha = 0.5, beta = 2.0> (x, w, c)", x=(4, 4), constants={"w": ramp(4, 4), "c": ramp(4)}) for a in (0, 1) for b in (0, 1)),
    Form("gemm without c", "y = Gemm <alpha = 0.5> (x, s44)", x=(4, 4)), Form("gemm by column", "y = Gemm (x, s44, c)", x=(4, 4), constants={"c": ramp(4, 1)}),
    Form("product of vectors", "y = MatMul (x, s4)", x=(4,)), Form("product of matrix and vector", "y = MatMul (x, s4)", x=(3, 4)), Form("product of vector and matrix", "y = MatMul (x, s44)", x=(4,)), Form("product, broadcast", "y = MatMul (x, s44)", x=(2, 3, 5, 4)),
    Form("product of vector and batch", "y = MatMul (x, w)", x=(4,), constants={"w": ramp(2, 4, 3)}),
    *(Form(f"einsum {e}", f'y = Einsum <equation = "{e}"> (x, w)', x=(2, 3, 4), constants={"w": ramp(2, 4, 3)}) for e in ("bij,bjk->bik", "bij,bjk->ik", "bij,bji->b", "bij, bjk", "...ij,...jk->...ik", "bij,bkl->bi")),
    *(Form(f"einsum {e}", f'y = Einsum <equation = "{e}"> (x)', x=(3, 3, 4)) for e in ("ijk->kji", "iij->ij", "ijk->", "ijk->i")),
    *(Form(f"quantize and back, {name}", f"q = QuantizeLinear {attrs} (x, s, z) y = DequantizeLinear {attrs} (q, s, z)", x=(2, 8, 3), constants={"s": s, "z": np.zeros(np.shape(s), np.int8)})
      for name, attrs, s in (("tensor", "", np.float32(0.1)), ("channel", "<axis = 1>", np.abs(ramp(8)) + 0.1), ("negative axis", "<axis = -2>", np.abs(ramp(8)) + 0.1), ("axis by default", "", np.abs(ramp(8)) + 0.1))),
    *(Form(f"weight in blocks, {name}", f"w = DequantizeLinear <axis = {axis}, block_size = 2> (q, s) y = MatMul (x, w)", x=(3, 8), constants={"q": np.arange(-16, 16, dtype=np.int8).reshape(8, 4), "s": s})
      for name, axis, s in (("rows", 0, np.abs(ramp(4, 4)) + 0.1), ("negative axis", -2, np.abs(ramp(4, 4)) + 0.1), ("columns", 1, np.abs(ramp(8, 2)) + 0.1))),
]  # fmt: skip
ROTARY = {"c": ramp(2, 3, 2), "n": ramp(2, 3, 2)[::-1]}
TABLE = {"c": ramp(5, 2), "n": ramp(5, 2)[::-1], "p": np.array([[0, 2, 4], [3, 1, 0]])}
OTHERS = [
    *several("rotary embedding, interleaved", "y = RotaryEmbedding <interleaved = {}> (x, c, n)", (0, 1), opset=23, x=(2, 2, 3, 4), constants=ROTARY),
    *several("rotary embedding of positions, interleaved", "y = RotaryEmbedding <interleaved = {}> (x, c, n, p)", (0, 1), opset=23, x=(2, 2, 3, 4), constants=TABLE),
    Form("rotary embedding in 3-D", "y = RotaryEmbedding <num_heads = 2> (x, c, n)", opset=23, x=(2, 3, 8), constants=ROTARY),
    Form("rotary embedding of a part", "y = RotaryEmbedding <rotary_embedding_dim = 4> (x, c, n)", opset=23, x=(2, 2, 3, 6), constants=ROTARY),
    Form("dropout", "y = Dropout (x)"), Form("non zero", "y = NonZero (x)", x=f32(0, 1, 0, 3)),
    Form("layer norm in float16", "h = Cast <to = 10> (x) n = LayerNormalization (h, s) y = Cast <to = 1> (n)", constants={"s": ramp(4).astype(np.float16)}),
    Form("cast like", "y = CastLike (x, zero_)", constants={"zero_": np.int64(0)}, x=HALVES),
    Form("reduction of integers", "y = ReduceMean <keepdims = 0> (x)", x=i64(-7, 2, 4)), Form("greatest of truths", "c = Greater (x, d) y = ReduceMax (c)", x=SIGNED, constants={"d": f32(0)}, opset=20),
    Form("shift of integers", "y = Add (x, d)", x=np.array([1, 2**31 - 1], np.int32), constants={"d": np.array([1], np.int32)}),
    Form("upsample by pixel shuffle", "r = Reshape (x, a) t = Transpose <perm = [0, 1, 4, 2, 5, 3]> (r) y = Reshape (t, b)", constants={"a": i64(2, 2, 2, 2, 4, 4), "b": i64(2, 2, 8, 8)}),
    Form("attention by parts", "t = Transpose <perm = [0, 2, 1]> (x) p = MatMul (x, t) w = Softmax <axis = -1> (p) y = MatMul (w, x)", x=(2, 5, 4)),
    Form("modulation", "a, b = Split <axis = 1, num_outputs = 2> (x) c = Add (b, one_) y = Mul (a, c)", constants={"one_": np.float32(1)}),
    Form("timestep embedding", "c = Cast <to = 1> (x) u = Unsqueeze (c, m1) p = Mul (u, f) s = Sin (p) o = Cos (p) y = Concat <axis = -1> (o, s)", x=i64(3, 999), constants={"f": ramp(4) ** 2}),
]  # fmt: skip
FORMS = [*NORMALIZATIONS, *REDUCTIONS, *RESIZES, *POOLS, *CONVOLUTIONS, *SLICES, *ARITHMETIC, *OTHERS]
MISREAD = {
    "group norm 21, groups 1", "group norm 21 in 3-D, groups 1", "group norm 21 in 5-D, groups 1",
    "group norm 18, one group", "ReduceLogSum of no axis, noop", "ReduceSumSquare of no axis, noop",
    "transposed convolution, output shape NOTSET",
}  # fmt: skip
"""Forms that the parser takes for something else: exactly these."""
CAREFUL = {"ReduceL1 of no axis, noop", "ReduceL2 of no axis, noop", "ReduceL2 of no axis, noop, empty axes"}
"""Errors of lint although they are right here, where no value is below zero."""


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def expected(form):
    """Return the output of ONNX Runtime, or that of onnx's reference if ONNX Runtime refuses the form."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    content = form.model().SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return session.run(None, form.feed())[0]
    except Exception:  # its errors have no common class
        return ReferenceEvaluator(form.model()).run(None, form.feed())[0]


def differs(form, trt):
    """Describe the first difference of the parser's network, or its error; None if it computes the same."""
    network, errors, _alive = parse(trt, form.model().SerializeToString())
    if errors:
        return f"refused: {errors[0]}"
    found, right = compute(trt, network, form.feed())[0], expected(form)
    if found.shape != right.shape:
        return f"shape {found.shape}, and not {right.shape}"
    same = np.allclose(found.astype(np.float64), right.astype(np.float64), rtol=2e-3, atol=2e-3, equal_nan=True)
    return None if same else f"off by {np.abs(found.astype(np.float64) - right.astype(np.float64)).max():.3g}"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_read_as_it_is_meant_or_lint_says_so(form, trt, tmp_path):
    problem = differs(form, trt)
    onnx.save(form.model(), tmp_path / "model.onnx")
    errors = {finding.rule for finding in lint(tmp_path / "model.onnx", TARGET) if finding.level == "error"}
    assert bool(errors) == (problem is not None or form.name in CAREFUL), problem
    misread = problem is not None and not problem.startswith("refused")
    assert misread == (form.name in MISREAD), problem
