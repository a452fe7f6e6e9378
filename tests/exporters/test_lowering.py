from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
import torch
from harness import run_pass
from onnx import helper, numpy_helper
from quantizing import HALF_TOLERANCE, integers, parity

from intaglio.exporters._layer import LAYER_KEY, layer_model, run_layer
from intaglio.exporters._lowering import LOWERINGS, lowering
from intaglio.exporters._session import open_session
from intaglio.exporters.lint import lint
from intaglio.exporters.onnx_qdq import ExportQdq
from intaglio.exporters.tensorrt import BuildTensorRT
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.graph import Graph
from intaglio.pipeline.keys import ENGINE, FLOAT_GRAPH, GRAPH, PLAN, QUANTIZED, TARGET
from intaglio.pipeline.plan import Layer, QuantPlan
from intaglio.pipeline.quant.affine import eight_bit_codes
from intaglio.pipeline.quant.modules import StepClock, quantize_model
from intaglio.pipeline.quant.spec import (
    W8A8_STEP,
    W8A8_TOKEN,
    w4a4_step,
    w4a4_token,
    w4a8_step,
    w4a8_token,
    w4a16,
    with_output,
    with_shift,
)
from intaglio.pipeline.target import load_target, target_names

SCHEMES = {
    "w8a8_token": W8A8_TOKEN,
    "w8a8_step": W8A8_STEP,
    "w4a16": w4a16(32),
    "w4a8_token": w4a8_token(32),
    "w4a8_step": w4a8_step(32),
    "w4a4_token": w4a4_token(32),
    "w4a4_step": w4a4_step(32),
    "w8a8o8_step": with_output(W8A8_STEP),
    "w4a8o8_step": with_output(w4a8_step(32)),
    "w4a4o8_step": with_output(w4a4_step(32)),
    "w8a8s_token": with_shift(W8A8_TOKEN),
    "w8a8s_step": with_shift(W8A8_STEP),
    "w4a8s_token": with_shift(w4a8_token(32)),
    "w4a8s_step": with_shift(w4a8_step(32)),
    "w4a4s_token": with_shift(w4a4_token(32)),
    "w4a4s_step": with_shift(w4a4_step(32)),
}
SHAPES = {"tokens": (2, 5, 64), "rows": (3, 64), "image": (2, 64, 6, 6)}
TIMESTEPS = (900.0, 500.0, 100.0)


def target_of(runtime: str):
    """A target of this runtime that takes every scheme, so that a row is tested before a target offers it."""
    shipped = load_target("onnxruntime-cpu" if runtime == "onnxruntime" else "tensorrt-rtx")
    formats = {"linear": tuple(SCHEMES), "conv": tuple(SCHEMES)}
    return shipped.model_copy(update={"runtime": runtime, "formats": formats, "group_sizes": (32, 64)})


def float_graph(folder: Path, layers: dict[str, torch.nn.Module], shape: tuple[int, ...]) -> Graph:
    """Layers side by side on one input, written as torch's exporter writes them."""
    nodes, constants = [], []
    for name, layer in layers.items():
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        convolution = isinstance(layer, torch.nn.Conv2d)
        apart = len(shape) == 3
        constants += [numpy_helper.from_array(weight.T.copy() if apart else weight, f"{name}.weight")]
        constants += [numpy_helper.from_array(bias, f"{name}.bias")]
        ends = ["x", f"{name}.weight"], [f"{name}.y"]
        if convolution:
            pads = [*layer.padding, *layer.padding]
            nodes += [helper.make_node("Conv", [*ends[0], f"{name}.bias"], ends[1], strides=layer.stride, pads=pads)]
        elif apart:
            nodes += [helper.make_node("MatMul", ends[0], [f"{name}.product"])]
            nodes += [helper.make_node("Add", [f"{name}.product", f"{name}.bias"], ends[1])]
        else:
            nodes += [helper.make_node("Gemm", [*ends[0], f"{name}.bias"], ends[1], transB=1)]
        for node in nodes:
            if not node.name:
                node.name = f"{name}/{node.op_type}"
                node.metadata_props.add(key=LAYER_KEY, value=name)
    outputs = [helper.make_tensor_value_info(f"{n}.y", 1, ["batch", *[None] * (len(shape) - 1)]) for n in layers]
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", *shape[1:]])]
    graph = helper.make_graph(nodes, "float", inputs, outputs, constants)
    folder.mkdir(exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return Graph(folder / "model.onnx", {}, {}, (), {name: ("x", f"{name}.y") for name in layers})


def make(folder: Path, layers: dict[str, torch.nn.Module], shape, schemes, runtime, amax=None):
    """The layers quantized, written for the runtime, and their simulation."""
    graph = float_graph(folder, layers, shape)
    op = "conv" if len(shape) == 4 else "linear"
    table = tuple(Layer(name=n, op=op, shape=tuple(m.weight.shape), bias=True) for n, m in layers.items())
    model = torch.nn.ModuleDict(layers).eval()
    amax = amax or {name: torch.tensor([3.0, 2.0, 0.5]) for name in layers}
    output_amax = {name: torch.tensor([4.0, 2.5, 1.5]) for name in layers}
    shift = {name: torch.tensor([0.6, -0.4, 0.2]) for name in layers}
    made = quantize_model(model, schemes, StepClock(TIMESTEPS), amax, output_amax, shift)
    quantized = integers(made, TIMESTEPS)
    artifacts = {FLOAT_GRAPH: graph, QUANTIZED: quantized, PLAN: QuantPlan(table, schemes), TARGET: target_of(runtime)}
    return run_pass(ExportQdq(), artifacts, folder / "qdq")[GRAPH], made


def layer_for(shape, scheme: str = "") -> torch.nn.Module:
    torch.manual_seed(1)
    padding = 0 if "s_" in scheme else 1
    return torch.nn.Conv2d(64, 32, 3, 2, padding) if len(shape) == 4 else torch.nn.Linear(64, 96)


CASES = [
    pytest.param(row, runtime, shape, id=f"{row.scheme}-{runtime}-{name}")
    for row in LOWERINGS
    for runtime in row.runtimes
    for name, shape in SHAPES.items()
    if (row.op == "conv") == (name == "image")
]


@pytest.mark.parametrize(("row", "runtime", "shape"), CASES)
def test_every_row_computes_what_is_simulated(row, runtime, shape, tmp_path):
    layer = layer_for(shape, row.scheme)
    graph, made = make(tmp_path, {"a": layer}, shape, {"a": SCHEMES[row.scheme]}, runtime)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    step = 2
    made["a"].clock.step = step
    with torch.no_grad():
        y = made["a"](x)
        plain, codes_off, _ = parity(graph, "a", made["a"], x, y, step, optimize=False)
        fused, fused_off, _ = parity(graph, "a", made["a"], x, y, step, optimize=True)
    half = runtime != "onnxruntime" and row.scheme == "w4a16"  # products of integers are scaled in float32
    assert plain < (HALF_TOLERANCE if half else 1e-5)  # the order of float32 sums
    assert fused < (HALF_TOLERANCE if half else 1e-4)  # integer kernels round nothing else
    assert (codes_off, fused_off) == (0, 0)


@pytest.mark.parametrize(("row", "runtime", "shape"), CASES)
def test_no_row_is_what_lint_refuses(row, runtime, shape, tmp_path):
    layer = layer_for(shape, row.scheme)
    graph, _ = make(tmp_path, {"a": layer}, shape, {"a": SCHEMES[row.scheme]}, runtime)
    errors = [finding for finding in lint(graph.path, target_of(runtime)) if finding.level == "error"]
    assert not errors


def test_the_table_has_each_scheme_and_runtime_once():
    rows = Counter((row.op, row.scheme, runtime) for row in LOWERINGS for runtime in row.runtimes)
    assert set(rows.values()) == {1}
    for name in target_names():
        target = load_target(name)
        for op, schemes in target.formats.items():
            for scheme in set(schemes) - {"float"}:
                assert lowering(op, scheme, target.runtime).why
    with pytest.raises(TargetError, match="no way to write w8a8_token of a conv for onnxruntime"):
        lowering("conv", "w8a8_token", "onnxruntime")


def test_an_all_zero_token_stays_zero(tmp_path):
    graph, made = make(tmp_path, {"a": layer_for((2, 5, 64))}, (2, 5, 64), {"a": W8A8_TOKEN}, "onnxruntime")
    session = open_session(layer_model(graph, "a").SerializeToString())
    y, codes = session.run(None, {"x": np.zeros((1, 5, 64), np.float32)})
    np.testing.assert_allclose(y[0, 0], made["a"].layer.bias.detach().numpy())
    assert (codes == 128).all()


def test_integer_sums_do_not_saturate(tmp_path):
    """Large codes of one sign: with 16-bit sums of two products they lose more than half."""
    layer = torch.nn.Linear(64, 96)
    torch.nn.init.constant_(layer.weight, 1.0)
    graph, made = make(tmp_path, {"a": layer}, (2, 5, 64), {"a": W8A8_TOKEN}, "onnxruntime")
    x = torch.ones(2, 5, 64)
    with torch.no_grad():
        error, _, _ = parity(graph, "a", made["a"], x, made["a"](x), 0, optimize=True)
    assert error < 1e-5


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, W8A8_STEP])
def test_siblings_share_a_rounded_input_and_a_carrier(scheme, tmp_path):
    layers = {name: torch.nn.Linear(64, 32) for name in ("q", "k", "v")}
    graph, _ = make(tmp_path, layers, (2, 5, 64), dict.fromkeys(layers, scheme), "tensorrt-rtx")
    proto = onnx.load(graph.path)
    assert sum(n.op_type == "QuantizeLinear" for n in proto.graph.node) == 1
    assert len({n.input[1] for n in proto.graph.node if n.name.endswith("weight/DequantizeLinear")}) == 1
    carriers = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.startswith("weight/scale/")]
    assert len(carriers) == 1
    mantissa, _ = np.frexp(carriers[0])
    assert mantissa == 0.5  # a power of two: dividing by it is exact


def test_siblings_with_other_ranges_do_not_share(tmp_path):
    layers = {name: torch.nn.Linear(64, 32) for name in ("q", "k")}
    amax = {"q": torch.tensor([1.0, 2.0, 3.0]), "k": torch.tensor([3.0, 2.0, 1.0])}
    graph, _ = make(tmp_path, layers, (2, 5, 64), dict.fromkeys(layers, W8A8_STEP), "onnxruntime", amax)
    assert sum(n.op_type == "QuantizeLinear" for n in onnx.load(graph.path).graph.node) == 2


@pytest.mark.parametrize(("runtime", "zero"), [("onnxruntime", np.uint8(128)), ("tensorrt-rtx", np.int8(0))])
def test_the_input_is_rounded_with_a_scalar(runtime, zero, tmp_path):
    """A scale of shape (1,) is one for each channel to TensorRT-RTX, and keeps a convolution in float."""
    shape = SHAPES["image"]
    graph, _ = make(tmp_path, {"a": layer_for(shape)}, shape, {"a": W8A8_STEP}, runtime)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(graph.path).graph.initializer}
    assert constants["input/scale"].shape == constants["input/zero"].shape == ()
    assert constants["input/scale"] == np.float32(1 / 127)
    assert constants["input/zero"] == zero
    assert constants["input/zero"].dtype == zero.dtype


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, w4a8_token(32), w4a8_step(32), w4a4_step(32)])
@pytest.mark.parametrize("shape", [SHAPES["tokens"], SHAPES["rows"]])
def test_onnxruntime_multiplies_integers_and_folds_what_makes_them(scheme, shape, tmp_path):
    graph, _ = make(tmp_path, {"a": layer_for(shape)}, shape, {"a": scheme}, "onnxruntime")
    open_session(graph.path, optimized=tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm", "Cast", "Reshape", "DequantizeLinear"} & set(ops)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("scheme", [w4a4_token(32), w4a4_step(32)])
def test_four_bit_inputs_never_leave_their_sixteen_codes(scheme, runtime, tmp_path):
    graph, _ = make(tmp_path, {"a": layer_for((3, 64))}, (3, 64), {"a": scheme}, runtime)
    x = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)  # four times the calibrated range
    for optimize in (False, True):
        _, codes = run_layer(graph, "a", x, 2, optimize=optimize)
        found = codes.astype(int) - (128 if codes.dtype == np.uint8 else 0)
        assert -8 <= found.min() <= -7
        assert found.max() == 7
        assert len(np.unique(found)) >= 15


def test_inputs_of_other_bits_do_not_share(tmp_path):
    layers = {name: torch.nn.Linear(64, 32) for name in ("q", "k")}
    schemes = {"q": w4a4_token(32), "k": w4a8_token(32)}
    graph, _ = make(tmp_path, layers, (2, 5, 64), schemes, "onnxruntime")
    assert sum(n.op_type == "QuantizeLinear" for n in onnx.load(graph.path).graph.node) == 2


@pytest.mark.parametrize("scheme", [with_shift(W8A8_TOKEN), with_shift(W8A8_STEP), with_shift(w4a4_token(32))])
def test_a_shifted_input_equals_the_integer_oracle(scheme, tmp_path):
    high = 7 if scheme.name == "w4a4s_token" else 127
    graph, made = make(tmp_path, {"a": layer_for((3, 64))}, (3, 64), {"a": scheme}, "onnxruntime")
    layer = made["a"]
    x = torch.nn.functional.gelu(torch.randn(3, 64, generator=torch.Generator().manual_seed(2)))
    codes, scale = layer.weight_codes(), layer.weight_scale.detach().numpy()[:, 0]
    eight = codes if layer.weight_group is None else eight_bit_codes(codes, layer.weight_group, scheme.weight)
    ranges = None if scheme.name.endswith("_token") else (2.0, -0.4)
    bias = layer.layer.bias.detach().numpy()
    x_codes, y = oracle.shifted_linear(x.numpy(), eight.numpy(), scale, bias, high, ranges)
    layer.clock.step = 1
    with torch.no_grad():
        assert np.array_equal(layer.input_codes(x)[0].numpy(), x_codes)
        np.testing.assert_allclose(layer(x).numpy(), y, rtol=1e-5, atol=2e-6)
    for optimize in (False, True):
        found, found_codes = run_layer(graph, "a", x.numpy(), 1, optimize=optimize)
        assert np.array_equal(found_codes.astype(int) - 128, x_codes)
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=2e-6)


def test_a_shift_is_refused_where_zeros_are_added(tmp_path):
    import onnx_ir as ir

    from intaglio.exporters._layer import find_sites
    from intaglio.exporters._lowering import Call, Writer
    from intaglio.pipeline.quantized import QuantizedLayerData

    graph = ir.load(float_graph(tmp_path, {"a": convolution()}, SHAPES["image"]).path).graph
    step = ir.Value(name="step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    codes, ones = torch.ones(32, 576, dtype=torch.int8), torch.ones(3)
    data = QuantizedLayerData(with_shift(W8A8_STEP), codes, torch.ones(32, 1), ones, shift_T=ones)
    row = lowering("conv", "w8a8s_step", "onnxruntime")
    with pytest.raises(TargetError, match="a: zeros around a shifted input do not shift"):
        Writer(graph, step, np.uint8(128), {}).write(Call(find_sites(graph)["a"][0], data, "a"), row.product)


@pytest.mark.parametrize("scheme", [with_shift(W8A8_TOKEN), with_shift(w4a8_step(32))])
def test_a_shift_leaves_the_product_on_integers_in_onnxruntime(scheme, tmp_path):
    graph, _ = make(tmp_path, {"a": layer_for((2, 5, 64))}, (2, 5, 64), {"a": scheme}, "onnxruntime")
    open_session(graph.path, optimized=tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(ops)


def convolution(**options: int) -> torch.nn.Conv2d:
    torch.manual_seed(1)
    return torch.nn.Conv2d(64, 32, 3, 2, 1, **options)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("scheme", [with_output(W8A8_STEP), with_output(w4a8_step(32)), with_output(w4a4_step(32))])
def test_a_convolution_with_a_rounded_output_runs_on_integers_and_gives_the_simulated_codes(
    scheme, vnni, tmp_path, monkeypatch
):
    monkeypatch.setattr("intaglio.exporters._session.has_vnni", lambda: vnni)
    shape = (4, 64, 16, 16)
    graph, made = make(tmp_path, {"a": convolution()}, shape, {"a": scheme}, "onnxruntime")
    open_session(graph.path, optimized=tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QLinearConv"] == 1
    assert not {"Conv", "Cast"} & set(ops)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for step in range(3):
        made["a"].clock.step = step
        with torch.no_grad():
            y = made["a"](x)
        found, _ = run_layer(graph, "a", x.numpy(), step)
        scale = 1.5 / 127 if step == 2 else (2.5 if step == 1 else 4.0) / 127
        assert np.abs(found - y.numpy()).max() < 1e-3 * scale  # float32 after the codes: not one code differs


def test_a_rounded_output_equals_the_integer_oracle(tmp_path):
    graph, made = make(tmp_path, {"a": convolution()}, SHAPES["image"], {"a": with_output(W8A8_STEP)}, "onnxruntime")
    x = torch.randn(SHAPES["image"], generator=torch.Generator().manual_seed(2))
    layer = made["a"]
    codes, scale = layer.weight_codes().numpy().reshape(32, 64, 3, 3), layer.weight_scale.detach().numpy()[:, 0]
    y_codes, y = oracle.step_convolution(
        x.numpy(), codes, scale, layer.layer.bias.detach().numpy(), amax=2.0, output_amax=2.5, stride=2, pad=1
    )
    layer.clock.step = 1
    with torch.no_grad():
        simulated = layer(x).numpy()
    np.testing.assert_allclose(simulated, y, rtol=1e-5, atol=1e-6)
    assert len(np.unique(y_codes)) > 100
    for optimize in (False, True):
        np.testing.assert_allclose(run_layer(graph, "a", x.numpy(), 1, optimize=optimize)[0], y, rtol=1e-5, atol=1e-6)


def test_integers_of_groups_take_a_byte_each(tmp_path):
    graph, _ = make(tmp_path, {"a": torch.nn.Linear(64, 96)}, (3, 64), {"a": w4a8_token(32)}, "onnxruntime")
    tensors = {t.name: t for t in onnx.load(graph.path).graph.initializer}
    assert tensors["a/weight"].data_type == onnx.TensorProto.INT4
    assert len(tensors["a/weight"].raw_data) == 64 * 96 // 2
    assert tensors["a/group"].data_type == onnx.TensorProto.INT8
    assert list(tensors["a/group"].dims) == [2, 1, 96]


def test_four_bit_codes_take_half_a_byte(tmp_path):
    graph, _ = make(tmp_path, {"a": torch.nn.Linear(64, 96)}, (3, 64), {"a": w4a16(32)}, "tensorrt-rtx")
    (weight,) = [t for t in onnx.load(graph.path).graph.initializer if t.name == "a/weight"]
    assert weight.data_type == onnx.TensorProto.INT4
    assert list(weight.dims) == [64, 96]
    assert len(weight.raw_data) == 64 * 96 // 2


def test_a_group_that_does_not_divide_is_refused(tmp_path):
    """TensorRT-RTX would take K / groups for its size, and compute something else."""
    import onnx_ir as ir

    from intaglio.exporters._layer import find_sites
    from intaglio.exporters._lowering import Call, Writer, blocks
    from intaglio.pipeline.quantized import QuantizedLayerData

    graph = ir.load(float_graph(tmp_path, {"a": torch.nn.Linear(80, 32)}, (2, 5, 80)).path).graph
    site = find_sites(graph)["a"][0]
    data = QuantizedLayerData(w4a16(64), torch.zeros(32, 80, dtype=torch.int8), torch.ones(32, 2), None)
    with pytest.raises(TargetError, match="a: K = 80 is not a multiple of the group size 64"):
        blocks(Writer(graph, ir.Value(name="step"), np.int8(0), {}), Call(site, data, "a"), site.x)


@pytest.mark.parametrize(("row", "runtime", "shape"), [c for c in CASES if "tensorrt-rtx" in c.id])
def test_every_integer_row_executes_on_integers_in_tensorrt_rtx(row, runtime, shape, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    layer = layer_for(shape, row.scheme)
    graph, _ = make(tmp_path, {"a": layer}, shape, {"a": SCHEMES[row.scheme]}, runtime)
    engine = run_pass(BuildTensorRT(), {GRAPH: graph, TARGET: target_of(runtime)}, tmp_path / "engine")[ENGINE]
    assert (engine.int8_gemm, engine.fp_gemm) == ((0, 1) if row.scheme == "w4a16" else (1, 0))
    assert any("Int4" in layer for layer in engine.layers) == row.scheme.startswith("w4")
