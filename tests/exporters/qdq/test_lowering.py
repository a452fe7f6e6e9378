from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from layers import float_graph, make
from onnx import numpy_helper
from quantizing import parity

from intaglio.exporters.qdq.lowering import lowering, table
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.session import multiplies_exactly, open_session
from intaglio.exporters.verify.layer_run import run_layer
from intaglio.pipeline.entry_points import named_runtimes
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.formats.known import known_schemes
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import (
    W7A8_STEP,
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
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.numerics.basis import Balance

SHAPES = {"tokens": (2, 5, 64), "rows": (3, 64), "image": (2, 64, 6, 6)}


def layer_for(shape) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Conv2d(64, 32, 3, 2, 1) if len(shape) == 4 else torch.nn.Linear(64, 96)


def test_the_table_has_each_scheme_and_runtime_once():
    rows = Counter((row.op, row.scheme.name, runtime) for runtime in named_runtimes() for row in table(runtime))
    assert set(rows.values()) == {1}
    for name in target_names():
        target = load_target(name)
        for op, schemes in target.formats.items():
            for scheme in set(schemes) - {"float"}:
                assert lowering(op, known_schemes()[scheme], target.runtime).why
    with pytest.raises(TargetError, match="runtime onnxruntime: its `lowerings` has no row for w8a8_token and conv"):
        lowering("conv", W8A8_TOKEN, "onnxruntime")


def test_integer_sums_do_not_saturate(tmp_path):
    """Large codes of one sign: with 16-bit sums of two products they lose more than half."""
    layer = torch.nn.Linear(64, 96)
    torch.nn.init.constant_(layer.weight, 1.0)
    graph, made = make(tmp_path, {"a": layer}, (2, 5, 64), {"a": W8A8_TOKEN}, "onnxruntime")
    x = torch.ones(2, 5, 64)
    with torch.no_grad():
        error, _, _ = parity(graph, "a", made, x, made["a"](x), 0, optimize=True)
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


def rotated(seed: int) -> Balance:
    return Balance.rotated(torch.full((64,), 0.7), 16, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, W8A8_STEP, w4a16(32)])
def test_siblings_in_one_basis_share_it(scheme, tmp_path):
    layers = {name: torch.nn.Linear(64, 32) for name in ("q", "k", "v", "other")}
    balances = dict.fromkeys(("q", "k", "v"), rotated(0)) | {"other": rotated(1)}
    graph, _ = make(tmp_path, layers, (2, 5, 64), dict.fromkeys(layers, scheme), "onnxruntime", balances=balances)
    names = [n.name for n in onnx.load(graph.path).graph.node if "/balance/" in n.name]
    one = ("balance/Mul", "balance/blocks/Reshape", "balance/MatMul", "balance/channels/Reshape")
    assert names == [f"{layer}/{role}" for layer in ("q", "other") for role in one]
    rounded = [n.name for n in onnx.load(graph.path).graph.node if n.op_type == "QuantizeLinear"]
    expected = [] if scheme.name == "w4a16" else ["q/input/QuantizeLinear", "other/input/QuantizeLinear"]
    assert rounded == expected


def test_codes_of_a_rotated_input_differ_by_one_at_most_and_seldom(tmp_path):
    """A rotation sums in float32, and sums in another order may round another way beside a half."""
    layer, shape = torch.nn.Linear(512, 32), (4, 256, 512)
    balances = {"a": Balance.rotated(torch.ones(512), 128, torch.Generator().manual_seed(0))}
    graph, made = make(tmp_path, {"a": layer}, shape, {"a": W8A8_TOKEN}, "onnxruntime", balances=balances)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for optimize in (False, True):
        with torch.no_grad():
            error, off, distance = parity(graph, "a", made, x, made["a"](x), 0, optimize=optimize)
        assert error < 1e-4
        assert off <= 1e-4 * x.numel()
        assert distance <= 1


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
        _, codes = run_layer(graph, "a", x, OnnxRuntime(optimize), 2)
        found = codes.astype(int) - (128 if codes.dtype == np.uint8 else 0)
        assert -8 <= found.min() <= -7
        assert found.max() == 7
        assert len(np.unique(found)) >= 15


def test_inputs_of_other_bits_do_not_share(tmp_path):
    layers = {name: torch.nn.Linear(64, 32) for name in ("q", "k")}
    schemes = {"q": w4a4_token(32), "k": w4a8_token(32)}
    graph, _ = make(tmp_path, layers, (2, 5, 64), schemes, "onnxruntime")
    assert sum(n.op_type == "QuantizeLinear" for n in onnx.load(graph.path).graph.node) == 2


def test_a_shift_is_refused_where_the_padding_depends_on_the_size(tmp_path):
    import onnx_ir as ir

    from intaglio.exporters.float_graph.sites import find_sites
    from intaglio.exporters.qdq.call import Call
    from intaglio.exporters.qdq.writer import Writer
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

    graph = ir.load(float_graph(tmp_path, {"a": convolution()}, SHAPES["image"]).path).graph
    step = ir.Value(name="step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    product = find_sites(graph)["a"][0].product
    product.attributes["auto_pad"] = ir.AttrString("auto_pad", "SAME_UPPER")
    codes, ones = torch.ones(32, 576, dtype=torch.int8), torch.ones(3)
    data = QuantizedLayerData(with_shift(W8A8_STEP), codes, torch.ones(32, 1), tables=LayerTables(ones, ones))
    row = lowering("conv", with_shift(W8A8_STEP), "onnxruntime")
    with pytest.raises(TargetError, match="a: auto_pad SAME_UPPER has no fixed padding"):
        Writer(graph, step, np.uint8(128), {}).write(
            Call(find_sites(graph)["a"][0], data, "a"), row.product, row.entering
        )


def test_shifted_convolutions_on_one_input_share_its_zeros_and_codes(tmp_path):
    """A plain one and a strided one do; others have other zeros around their input, or none."""
    windows = {"a": (3, 1, 1), "b": (3, 2, 1), "wide": (5, 1, 2), "point": (1, 1, 0)}
    layers = {name: torch.nn.Conv2d(64, 32, *window) for name, window in windows.items()}
    schemes = dict.fromkeys(layers, with_shift(W8A8_STEP))
    graph, _ = make(tmp_path, layers, SHAPES["image"], schemes, "onnxruntime")
    nodes = onnx.load(graph.path).graph.node
    ops = Counter(node.op_type for node in nodes)
    assert (ops["Pad"], ops["QuantizeLinear"]) == (2, 3)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("scheme", [with_shift(W8A8_STEP), with_shift(w4a8_step(32))])
def test_a_grouped_padded_convolution_gives_the_simulated_codes_at_every_step(scheme, runtime, tmp_path):
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(64, 32, 3, 2, (1, 2), groups=2, bias=False)
    graph, made = make(tmp_path, {"a": layer}, SHAPES["image"], {"a": scheme}, runtime)
    x = torch.nn.functional.silu(torch.randn(SHAPES["image"], generator=torch.Generator().manual_seed(0)) * 2)
    for step in range(3):
        with torch.no_grad(), made["a"].clock.at(step):
            y = made["a"](x)
        for optimize in (False, True):
            error, differing, _ = parity(graph, "a", made, x, y, step, optimize=optimize)
            assert differing == 0
            assert error < 1e-5  # float32 sums of 288 products


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
@pytest.mark.parametrize(
    "scheme",
    [
        with_output(W8A8_STEP),
        with_output(w4a8_step(32)),
        with_output(w4a4_step(32)),
        with_output(W7A8_STEP),
        with_shift(with_output(W7A8_STEP)),
        with_shift(with_output(W8A8_STEP)),
        with_shift(with_output(w4a4_step(32))),
    ],
)
def test_a_convolution_with_a_rounded_output_runs_on_integers_and_gives_the_simulated_codes(
    scheme, vnni, tmp_path, monkeypatch
):
    settings = {} if vnni else {"session.x64quantprecision": "1"}
    if not multiplies_exactly(settings, 64 if scheme.weight_bits < 8 else 127):
        pytest.skip("the CPU's own 8-bit kernels saturate: it has no VNNI")
    monkeypatch.setattr("intaglio.exporters.runtimes.onnxruntime.session.exact_kernels", lambda code=127: settings)
    shape = (4, 64, 16, 16)
    graph, made = make(tmp_path, {"a": convolution()}, shape, {"a": scheme}, "onnxruntime")
    open_session(graph.path, optimized=tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QLinearConv"] == 1
    assert not {"Conv", "Cast"} & set(ops)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for step in range(3):
        with torch.no_grad(), made["a"].clock.at(step):
            y = made["a"](x)
        found, _ = run_layer(graph, "a", x.numpy(), OnnxRuntime(), step)
        scale = 1.5 / 127 if step == 2 else (2.5 if step == 1 else 4.0) / 127
        assert np.abs(found - y.numpy()).max() < 1e-3 * scale  # float32 after the codes: not one code differs


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

    from intaglio.exporters.float_graph.sites import find_sites
    from intaglio.exporters.qdq.call import Call
    from intaglio.exporters.qdq.lowering import blocks
    from intaglio.exporters.qdq.writer import Writer
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

    graph = ir.load(float_graph(tmp_path, {"a": torch.nn.Linear(80, 32)}, (2, 5, 80)).path).graph
    site = find_sites(graph)["a"][0]
    data = QuantizedLayerData(w4a16(64), torch.zeros(32, 80, dtype=torch.int8), torch.ones(32, 2))
    with pytest.raises(TargetError, match="a: K = 80 is not a multiple of the group size 64"):
        blocks(Writer(graph, ir.Value(name="step"), np.int8(0), {}), Call(site, data, "a"), site.x)


def test_a_layer_runs_on_fewer_tokens_than_a_row_of_the_graph_has(tmp_path):
    """Three tokens in a graph with two tokens in each row: the fourth is not in what comes out."""
    graph, made = make(tmp_path, {"a": torch.nn.Linear(64, 96)}, (2, 2, 64), {"a": W8A8_TOKEN}, "onnxruntime")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    found, codes = run_layer(graph, "a", x.numpy(), OnnxRuntime(), 0)
    with torch.no_grad():
        expected = made["a"](x)
    assert codes.shape == x.shape
    assert found.shape == expected.shape
    assert np.abs(found - expected.numpy()).max() < 1e-5
