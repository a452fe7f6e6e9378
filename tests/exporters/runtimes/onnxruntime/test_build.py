from dataclasses import replace

import pytest
from harness import run_pass
from quantizing import with_plan

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.onnxruntime import session as _session
from intaglio.exporters.runtimes.onnxruntime.build import BuildOnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.session import exact_kernels, multiplies_exactly, open_session
from intaglio.pipeline.artifacts.graph import Engine
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH, TARGET
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import load_target


def build(artifacts, folder, target="onnxruntime-cpu") -> Engine:
    start = artifacts | {TARGET: load_target(target)}
    start |= run_pass(ExportQdq(), start, folder / "qdq")
    return run_pass(BuildOnnxRuntime(), start, folder / "engine")[ENGINE]


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, W8A8_STEP])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_every_integer_linear_is_executed_on_integers(name, scheme, request, tmp_path):
    engine = build(
        with_plan(request.getfixturevalue(name), lambda layer: scheme if layer.op == "linear" else FLOAT), tmp_path
    )
    linear, convolutions, attentions = {"dit": (20, 1, 2), "unet": (26, 25, 4)}[name]
    assert engine.low_precision_products == linear
    assert engine.float_products == convolutions + 2 * attentions
    fused = [line for line in engine.layers if line.startswith("com.microsoft.MatMulIntegerToFloat ")]
    assert len(fused) == linear
    assert engine.plan is None


def test_four_bit_weights_stay_packed(dit, tmp_path):
    engine = build(with_plan(dit, lambda x: w4a16(32) if x.op == "linear" and x.k > 32 else FLOAT), tmp_path)
    assert sum(line.startswith("com.microsoft.MatMulNBits ") for line in engine.layers) == 20
    assert engine.low_precision_products == 0


def test_a_graph_that_does_not_load_is_the_targets_fault(dit, tmp_path):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    artifacts = {GRAPH: replace(dit[FLOAT_GRAPH], path=broken), TARGET: load_target("onnxruntime-cpu")}
    with pytest.raises(TargetError, match=r"ONNX Runtime .* does not load the graph"):
        run_pass(BuildOnnxRuntime(), artifacts, tmp_path / "engine")


def test_it_is_for_onnx_runtime_alone():
    assert BuildOnnxRuntime.applies(load_target("onnxruntime-cpu"))
    assert not BuildOnnxRuntime.applies(load_target("tensorrt-rtx"))


def test_without_its_provider_nothing_is_counted(dit, tmp_path):
    engine = build(with_plan(dit, lambda layer: FLOAT), tmp_path, "onnxruntime-cuda")
    assert (engine.low_precision_products, engine.float_products, engine.layers) == (None, None, ())


EXACT = {"session.x64quantprecision": "1"}


def test_the_kernels_that_are_taken_are_exact_on_this_cpu():
    assert multiplies_exactly(exact_kernels())
    assert multiplies_exactly(EXACT)  # everywhere


@pytest.fixture
def chosen(monkeypatch):
    """`exact_kernels`, on a CPU where these settings multiply exactly."""

    def choose(*exact: dict[str, str]):
        monkeypatch.setattr(
            "intaglio.exporters.runtimes.onnxruntime.session.multiplies_exactly", lambda settings, _: settings in exact
        )
        return exact_kernels.__wrapped__()

    return choose


def test_the_first_exact_kernels_of_the_target_are_taken(chosen):
    assert chosen({}, EXACT) == {}
    assert chosen(EXACT) == EXACT
    with pytest.raises(TargetError, match=r"no 8-bit kernels .* are exact on this CPU: tried the CPU's own, uint8 by"):
        chosen()


@pytest.mark.parametrize("product", ["y = MatMul (d, v)", "z = DequantizeLinear (q3, sum, zero)"])
def test_wrong_sums_are_noticed(product, monkeypatch):
    right, _, made = product.partition(" = ")
    wrong = _session._PROBE.replace(product, f"other = {made} {right} = Sin (other)")
    monkeypatch.setattr(_session, "_PROBE", wrong)
    assert not multiplies_exactly({})


def test_a_provider_that_is_not_there_is_not_asked_for(dit):
    session = open_session(dit[FLOAT_GRAPH].path, providers=["NoSuchExecutionProvider"], threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
