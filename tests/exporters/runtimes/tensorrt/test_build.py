"""Engines are really built, ahead of time and without a GPU; what the builder's log says is counted, not assumed."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.pipeline.artifacts.graph import Engine, Graph, TensorSpec
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import MissingExtra, TargetError
from intaglio.pipeline.formats.target import Target, load_target

RTX = load_target("tensorrt-rtx")
JETSON = load_target("tensorrt-10.3-orin")

TOKEN_LINEARS = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 16, 64] x) => (float[batch, 16, 64] q, float[batch, 16, 64] k, float[batch, 16, 64] v)
<int64[1] last = {-1}, float eps = {1e-7}, float unit = {0.007874016}, int8 zero = {0}, float s0 = {0.01}>
{
    magnitude = Abs (x)
    largest = ReduceMax <keepdims = 1> (magnitude, last)
    a = Max (largest, eps)
    x1 = Div (x, a)
    code = QuantizeLinear (x1, unit, zero)
    x2 = DequantizeLinear (code, unit, zero)
    wq = DequantizeLinear (q_codes, s0)
    wk = DequantizeLinear (k_codes, s0)
    wv = DequantizeLinear (v_codes, s0)
    [to_q] q1 = MatMul (x2, wq)
    [to_k] k1 = MatMul (x2, wk)
    [to_v] v1 = MatMul (x2, wv)
    q2 = Mul (q1, ratio)
    k2 = Mul (k1, ratio)
    v2 = Mul (v1, ratio)
    q = Mul (q2, a)
    k = Mul (k2, a)
    v = Mul (v2, a)
}
"""

STEP_CONVOLUTION = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 32, 8, 8] x, int64 step) => (float[batch, 64, 8, 8] y)
<float unit = {0.007874016}, int8 zero = {0}, float[3] inverse = {0.5, 0.4, 0.3}, float[3] amax = {2.0, 2.5, 3.333}>
{
    r = Gather (inverse, step)
    a = Gather (amax, step)
    x1 = Mul (x, r)
    code = QuantizeLinear (x1, unit, zero)
    x2 = DequantizeLinear (code, unit, zero)
    w = DequantizeLinear <axis = 0> (codes, scales)
    y1 = Conv <pads = [1, 1, 1, 1]> (x2, w)
    y2 = Mul (y1, a)
    y = Add (y2, bias)
}
"""

FLOAT_ATTENTION = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 16, 32] q, float[batch, 32, 16] k, float[batch, 16, 32] v) => (float[batch, 16, 32] y)
{
    scores = MatMul (q, k)
    weights = Softmax <axis = -1> (scores)
    y = MatMul (weights, v)
}
"""

BLOCK_LINEAR = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 16, K] x) => (float[batch, 16, 32] y)
{
    [dequantize] w = DequantizeLinear <axis = 0, block_size = 64> (codes, scales)
    y = MatMul (x, w)
}
"""

INTEGER_INPUT_BLOCK_WEIGHT = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[16, 256] x) => (float[16, 32] y)
<float unit = {0.03}, int8 zero = {0}>
{
    code = QuantizeLinear (x, unit, zero)
    x2 = DequantizeLinear (code, unit, zero)
    w = DequantizeLinear <axis = 0, block_size = 64> (codes, scales)
    [proj] y = MatMul (x2, w)
}
"""

HALF_PER_CHANNEL = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float16[16, 256] x) => (float16[16, 32] y)
<int8 zero = {0}>
{
    code = QuantizeLinear (x, unit, zero)
    x2 = DequantizeLinear (code, unit, zero)
    w = DequantizeLinear <axis = 1> (codes, scales)
    [proj] y = MatMul (x2, w)
}
"""

TWO_UNKNOWN_OPERATORS = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[8, 8] x) => (float y, int64[2, n] z)
{
    [first] y = Det (x)
    [second] code, unit, zero = DynamicQuantizeLinear (x)
    z = NonZero (code)
}
"""


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-127, 128, shape).astype(np.int8)


def int4_codes(name: str, *shape: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT4, shape, np.random.default_rng(7).integers(-8, 8, np.prod(shape)))


def scales(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.linspace(0.01, 0.02, int(np.prod(shape)), dtype=dtype).reshape(shape)


def write(folder: Path, text: str, **tensors: np.ndarray | onnx.TensorProto) -> Graph:
    """The model with these initializers besides those in its text."""
    model = onnx.parser.parse_model(text)
    for name, tensor in tensors.items():
        model.graph.initializer.append(
            tensor if isinstance(tensor, onnx.TensorProto) else numpy_helper.from_array(tensor, name)
        )
    onnx.save(model, folder / "model.onnx")
    return Graph(folder / "model.onnx", _specs(model.graph.input), _specs(model.graph.output))


def _specs(values) -> Mapping[str, TensorSpec]:
    return {
        v.name: TensorSpec("any", tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
        for v in values
    }


def build(graph: Graph, target: Target = RTX, **options: object) -> Engine:
    if target is RTX:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine can be built")
    step = BuildTensorRT.model_validate(options)
    state = State({GRAPH: graph, TARGET: target}, reader="tensorrt")
    engine = step.run(state, Context(scratch=graph.path.parent, log=logging.getLogger("test")))[ENGINE]
    assert isinstance(engine, Engine)
    return engine


def token_linears(folder: Path) -> Graph:
    weights = {f"{end}_codes": codes(64, 64) for end in "qkv"}
    return write(folder, TOKEN_LINEARS, **weights, ratio=scales(64))


def step_convolution(folder: Path) -> Graph:
    return write(
        folder, STEP_CONVOLUTION, codes=codes(64, 32, 3, 3), scales=scales(64), bias=np.ones((1, 64, 1, 1), np.float32)
    )


def test_linears_with_a_shared_input_count_one_by_one_though_they_run_as_one(tmp_path):
    engine = build(token_linears(tmp_path))
    assert (engine.low_precision_products, engine.float_products) == (3, 0)
    assert [layer.split()[0] for layer in engine.layers].count("gemm") == 1
    assert engine.plan


def test_convolution_with_a_scale_per_step_runs_on_integers(tmp_path):
    engine = build(step_convolution(tmp_path))
    assert (engine.low_precision_products, engine.float_products) == (1, 0)


def test_attention_products_are_floating_point(tmp_path):
    engine = build(write(tmp_path, FLOAT_ATTENTION))
    assert (engine.low_precision_products, engine.float_products) == (0, 2)


def test_grouped_int4_weight_is_floating_point_and_stays_4_bit(tmp_path):
    graph = write(tmp_path, BLOCK_LINEAR.replace("K", "256"), codes=int4_codes("codes", 256, 32), scales=scales(4, 32))
    engine = build(graph)
    assert (engine.low_precision_products, engine.float_products) == (0, 1)
    assert any("Int4[256,32]" in layer for layer in engine.layers)


def test_same_graph_gives_the_same_artifact(tmp_path):
    graph = token_linears(tmp_path)
    assert build(graph) == build(graph)


def test_engine_builds_for_the_listed_compute_capabilities(tmp_path):
    engine = build(step_convolution(tmp_path), compute_capabilities=["SM86", "SM89"])
    assert engine.low_precision_products == 1


def test_what_a_listed_gpu_cannot_run_is_an_error_with_the_builders_reason(tmp_path):
    with pytest.raises(TargetError, match="turing"):
        build(token_linears(tmp_path), compute_capabilities=["SM75"])


def test_every_refused_node_is_named(tmp_path):
    graph = write(tmp_path, TWO_UNKNOWN_OPERATORS)
    with pytest.raises(TargetError, match=r"first \(Det\)") as caught:
        build(graph)
    assert len(caught.value.problems) == 2
    assert caught.value.problems[1].startswith("second (DynamicQuantizeLinear)")


def test_short_last_group_is_an_error_because_the_parser_would_regroup(tmp_path):
    graph = write(tmp_path, BLOCK_LINEAR.replace("K", "200"), codes=int4_codes("codes", 200, 32), scales=scales(4, 32))
    with pytest.raises(TargetError, match="dequantize: 200 input features are not a multiple of the group size 64"):
        build(graph)


def test_lost_group_scales_are_an_error(tmp_path):
    graph = write(tmp_path, INTEGER_INPUT_BLOCK_WEIGHT, codes=codes(256, 32), scales=scales(4, 32))
    with pytest.raises(TargetError, match=r"proj.*: 128 weight scales on a product 32 wide"):
        build(graph)


def test_unscaled_sum_in_half_precision_is_an_error(tmp_path):
    graph = write(
        tmp_path,
        HALF_PER_CHANNEL,
        codes=codes(256, 32),
        scales=scales(32, dtype=np.float16),
        unit=scales(dtype=np.float16),
    )
    with pytest.raises(TargetError, match=r"proj.*written to FP16 before it is scaled"):
        build(graph)


def test_dynamic_axis_without_sizes_is_an_error(tmp_path):
    with pytest.raises(TargetError, match="x: axis 'batch' is dynamic"):
        build(token_linears(tmp_path), dynamic={})


def test_an_axis_without_sizes_has_those_it_was_exported_at(tmp_path):
    graph = step_convolution(tmp_path)
    shape = ("batch", 32, "height", 8)
    graph = replace(graph, inputs={"x": TensorSpec("float32", shape)}, sizes={"height": (8, 4)})
    assert BuildTensorRT().profile(graph) == {"x": ((1, 32, 4, 8), (2, 32, 8, 8), (8, 32, 8, 8))}


def test_sizes_of_an_axis_are_ordered():
    with pytest.raises(ValidationError, match="not in the order smallest, usual, largest"):
        BuildTensorRT.model_validate({"dynamic": {"batch": [2, 1, 8]}})


def test_jetson_engine_is_a_command_for_the_device(tmp_path):
    engine = build(step_convolution(tmp_path), JETSON, workspace_mib=512)
    assert engine.plan is None
    assert engine.low_precision_products is None
    assert engine.command == (
        "trtexec --onnx=model.onnx --saveEngine=engine.plan --stronglyTyped --memPoolSize=workspace:512M "
        "--profilingVerbosity=detailed --exportLayerInfo=engine.layers.json --skipInference "
        "--minShapes=x:1x32x8x8 --optShapes=x:2x32x8x8 --maxShapes=x:8x32x8x8"
    )
    engine.save(tmp_path)
    assert json.loads((tmp_path / "engine.json").read_text())["command"] == engine.command


@pytest.mark.parametrize(
    ("target", "module", "extra"), [(RTX, "tensorrt_rtx", "rtx"), (JETSON, "tensorrt", "tensorrt")]
)
def test_missing_builder_names_its_extra(tmp_path, monkeypatch, target, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    step = BuildTensorRT(build_on="host")
    with pytest.raises(MissingExtra, match=rf"intaglio\[{extra}\]"):
        step.check(target)
    state = State({GRAPH: token_linears(tmp_path), TARGET: target}, reader="tensorrt")
    with pytest.raises(MissingExtra, match=rf"intaglio\[{extra}\]"):
        step.run(state, Context(scratch=tmp_path))


def test_device_build_needs_nothing_installed(monkeypatch):
    """The check would raise if it needed the package."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    BuildTensorRT().check(JETSON)


def test_applies_to_the_tensorrt_family_alone():
    assert BuildTensorRT.applies(RTX)
    assert BuildTensorRT.applies(JETSON)
    assert not BuildTensorRT.applies(load_target("onnxruntime-cpu"))
