"""Layers are timed alone, each distinct one once, as the runtime executes them."""

import time

import onnx
import pytest
from harness import run_pass
from tiny import save_folder, tiny_dit

from intaglio.exporters.measure import time_layers
from intaglio.exporters.measure.single_layer import input_shape, single_layer
from intaglio.exporters.measure.time_layers import TimeLayers
from intaglio.exporters.measure.turns import spent
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.pipeline.artifacts.keys import LAYER_TIMES, MODEL, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W7A8_STEP,
    W8A8_STEP,
    W8A8_TOKEN,
    w4a8_token,
    with_output,
    with_shift,
)
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef

CPU = load_target("onnxruntime-cpu")
LINEAR = Layer(name="a", op="linear", shape=(96, 64), bias=True)
CONV = Layer(name="a", op="conv", shape=(32, 64, 3, 3), bias=False, padded=True)


def test_equal_layers_are_timed_once_and_layers_that_are_not_called_never(tmp_path, monkeypatch):
    save_folder(tiny_dit(), tmp_path / "dit")
    checkpoint = Checkpoint.resolve(ModelRef(path="dit"), tmp_path)
    queries = [f"transformer_blocks.{block}.attn1.{part}" for block in (0, 1) for part in ("to_q", "to_k")]
    state = {MODEL: checkpoint, TARGET: CPU, WORKLOAD: Workload({**dict.fromkeys(queries, 16.0), "proj_out_2": 16.0})}
    built = []

    def counted(folder, layer, rows, scheme, target):
        built.append((layer.shape, rows, scheme.name))
        return single_layer(folder, layer, rows, scheme, target)

    monkeypatch.setattr("intaglio.exporters.measure.single_layer.single_layer", counted)
    step = TimeLayers(schemes=("w8a8_token", "w8a8_step"), rounds=1)
    times = run_pass(step, state, tmp_path / "scratch")[LAYER_TIMES]
    assert times.seconds.keys() == {*queries, "proj_out_2"}
    assert len({id(times.seconds[name]) for name in queries}) == 1
    assert times.seconds["proj_out_2"].keys() == {"float", "w8a8_token", "w8a8_step"}
    assert len(built) == len(set(built)) == 6
    assert min(min(by.values()) for by in times.seconds.values()) > 0
    assert 0 < times.element_s < 1e-6


def test_a_large_layer_is_timed_on_a_part_of_its_rows(tmp_path, monkeypatch):
    save_folder(tiny_dit(), tmp_path / "dit")
    state = {
        MODEL: Checkpoint.resolve(ModelRef(path="dit"), tmp_path),
        TARGET: CPU,
        WORKLOAD: Workload({"proj_out_2": 1000.0}),
    }
    monkeypatch.setattr(time_layers, "MOST_PRODUCTS", 100 * 16 * 64)
    timed = []

    def half_a_second(self, layer, rows, target, runtime):
        timed.append(rows * layer.n * layer.k)
        return {"float": 0.5}

    monkeypatch.setattr(TimeLayers, "_times", half_a_second)
    times = run_pass(TimeLayers(), state, tmp_path / "scratch")[LAYER_TIMES]
    assert timed[0] <= 100 * 16 * 64
    assert times.seconds["proj_out_2"]["float"] > 0.5


@pytest.mark.parametrize(
    ("layer", "rows", "shape"),
    [
        (LINEAR, 7, (1, 7, 64)),
        (CONV, 16, (1, 64, 4, 4)),
        (CONV, 32, (1, 64, 5, 7)),  # 35 pixels: the smallest such image with 32 or more
        (CONV.model_copy(update={"padded": False}), 16, (1, 64, 6, 6)),
        (CONV.model_copy(update={"shape": (64, 64, 5)}), 9, (1, 64, 9)),
        (CONV.model_copy(update={"shape": (64, 64, 3, 3, 3)}), 27, (1, 64, 3, 3, 3)),
    ],
)
def test_an_input_gives_about_the_rows_that_are_asked_for(layer, rows, shape):
    assert input_shape(layer, rows) == shape


@pytest.mark.parametrize(
    ("layer", "scheme", "product"),
    [
        (LINEAR, FLOAT, "Gemm"),
        (LINEAR, W8A8_TOKEN, "MatMulIntegerToFloat"),
        (LINEAR, w4a8_token(32), "MatMulIntegerToFloat"),
        (CONV, W8A8_STEP, "Conv"),
        (CONV, with_output(W7A8_STEP), "QLinearConv"),
        (CONV, with_shift(with_output(W8A8_STEP)), "QLinearConv"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_layer_is_written_as_it_will_be_executed(layer, scheme, product, tmp_path):
    graph = single_layer(tmp_path, layer, 16, scheme, CPU)
    open_session(graph.path, optimized=tmp_path / "optimized.onnx")
    assert product in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


def test_calls_take_turns_and_the_first_of_each_is_not_counted():
    order = []
    found = spent({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert found.keys() == {"a", "b"}


def test_processor_time_leaves_out_what_a_call_waits_for():
    waiting = {"waits": lambda: time.sleep(0.2)}
    assert spent(waiting, rounds=1)["waits"] >= 0.2
    assert spent(waiting, rounds=1, clock=time.process_time)["waits"] < 0.1


def test_only_targets_of_the_cpu_are_timed_here():
    assert TimeLayers.applies(CPU)
    assert not TimeLayers.applies(load_target("onnxruntime-cuda"))
    assert not TimeLayers.applies(load_target("tensorrt-rtx"))
    assert OnnxRuntime().here(CPU).fast_code in (64, 127)


def test_a_target_of_another_kind_of_cpu_has_no_times_of_this_one():
    kinds = [load_target(name) for name in ("onnxruntime-avx2", "onnxruntime-vnni")]
    here = OnnxRuntime().here(CPU).fast_code
    assert [kind.fast_code for kind in kinds if TimeLayers.applies(kind)] == [here]
