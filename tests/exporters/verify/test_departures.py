"""A deployed graph that leaves its simulation is found out, and the first place where it does is named."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from harness import Artifacts, run_pass
from onnx import helper, numpy_helper
from quantizing import with_plan

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_values
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRTRTX
from intaglio.exporters.verify.departures import find_departures, value_names
from intaglio.exporters.verify.verify import BETWEEN_HALVES, Verify
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.verification import Departure
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.layer import admitted_schemes
from intaglio.pipeline.formats.schemes import W8A8_STEP, W8A8_TOKEN
from intaglio.pipeline.formats.target import Target, load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import simulate

Fault = Callable[[onnx.GraphProto], None]
BLOCK = "transformer_blocks.0"


def compile_for(dit: Artifacts, target: Target, folder: Path) -> Artifacts:
    def choose(layer):
        return W8A8_STEP if layer.op == "conv" or "ff" in layer.name else W8A8_TOKEN

    made = with_plan(dit, choose) | {TARGET: target}
    return made | run_pass(ExportQdq(), made, folder)


@pytest.fixture(scope="module", params=["onnxruntime-cpu", "tensorrt-rtx"])
def compiled(dit: Artifacts, request, tmp_path_factory) -> Artifacts:
    """In the form of each runtime, in float32: there is nothing between a right graph and its simulation then."""
    target = load_target(request.param).model_copy(update={"float_type": "float32"})
    return compile_for(dit, target, tmp_path_factory.mktemp("qdq"))


@pytest.fixture(scope="module")
def in_half(dit: Artifacts, tmp_path_factory) -> Artifacts:
    return compile_for(dit, load_target("tensorrt-rtx"), tmp_path_factory.mktemp("half"))


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(n for n in graph.node if n.name == name)


def change(graph: onnx.GraphProto, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))


def spoilt_weight(graph: onnx.GraphProto) -> None:
    def edit(codes: np.ndarray) -> np.ndarray:
        codes[3] = -codes[3]
        return codes

    change(graph, f"{BLOCK}.ff.net.2/weight", edit)


def spoilt_scale(graph: onnx.GraphProto) -> None:
    change(graph, "transformer_blocks.1.attn1.to_v/scale", lambda scale: scale * np.float32(1.001))


def spoilt_zero_point(graph: onnx.GraphProto) -> None:
    dequantize = node(graph, f"{BLOCK}.attn1.to_out.0/input/DequantizeLinear")
    zero = numpy_helper.to_array(next(t for t in graph.initializer if t.name == dequantize.input[2]))
    graph.initializer.append(numpy_helper.from_array(np.array(zero + 1, zero.dtype), "other/zero"))
    dequantize.input[2] = "other/zero"


def swapped_residual(graph: onnx.GraphProto) -> None:
    """The second residual sum takes the stream as it was before the first."""
    stream = [n.input[0] for n in graph.node if n.op_type == "LayerNormalization"]
    second = next(n for n in graph.node if stream[2] in n.output)
    second.input[list(second.input).index(stream[1])] = stream[0]


def missing_activation(graph: onnx.GraphProto) -> None:
    gelu = next(n for n in graph.node if n.op_type == "Gelu")
    gelu.op_type = "Identity"
    del gelu.attribute[:]


def negated_output(graph: onnx.GraphProto) -> None:
    last = graph.node[-1]
    before = last.input[0]
    last.input[0] = "negated"
    graph.node.insert(len(graph.node) - 1, helper.make_node("Neg", [before], ["negated"], name="negated"))


def spoil(graph: Graph, fault: Fault, folder: Path) -> Graph:
    model = onnx.load(graph.path)
    fault(model.graph)
    onnx.save(model, folder / "model.onnx")
    return replace(graph, path=folder / "model.onnx")


def departures(artifacts: Artifacts, graph: Graph, *, optimize: bool) -> tuple[dict[str, Departure], float]:
    model, trajectory = artifacts[MODEL].open(), artifacts[TRAJECTORY]
    clock = simulate(model.module, artifacts[QUANTIZED])
    layers = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantizedLayer)}
    runtime = TensorRTRTX() if artifacts[TARGET].name == "tensorrt-rtx-blackwell" else OnnxRuntime(optimize)
    values = graph_values(graph, runtime, value_names(graph))
    with clock.at(1):
        return find_departures(layers, denoise_with(model.module, model), graph, values, trajectory.call(1))


@pytest.mark.parametrize("optimize", [False, True])
def test_a_right_graph_leaves_the_simulation_nowhere(compiled, optimize):
    found, output = departures(compiled, compiled[GRAPH], optimize=optimize)
    assert found.keys() == compiled[QUANTIZED].layers.keys()
    assert max(d.own_rel_l2 for d in found.values()) < 1e-5  # float32 sums
    assert max(d.input_rel_l2 for d in found.values()) < 1e-5
    assert output < 1e-5
    order = list(found)
    assert order.index(f"{BLOCK}.attn1.to_q") < order.index(f"{BLOCK}.ff.net.2") < order.index("proj_out_2")


def test_a_right_graph_in_half_precision_stays_within_its_roundings(in_half):
    found, output = departures(in_half, in_half[GRAPH], optimize=False)
    assert found.keys() == in_half[QUANTIZED].layers.keys()
    assert max(d.own_rel_l2 for d in found.values()) < BETWEEN_HALVES
    assert 1e-5 < max(d.input_rel_l2 for d in found.values()) < BETWEEN_HALVES
    assert output < BETWEEN_HALVES


@pytest.mark.parametrize("scheme", ["nvfp4_step", "w4a4_token"])
def test_codes_of_4_bits_are_compared_on_the_input_that_the_layer_reads(dit, scheme, tmp_path):
    """An input that is rounded to float16 first gives other codes, which moves the output by 1e-2."""

    def choose(layer):
        admitted = {each.name: each for each in admitted_schemes(layer, (32,))}
        return admitted.get(scheme, admitted["w8a8_step"])

    made = with_plan(dit, choose) | {TARGET: load_target("tensorrt-rtx-blackwell")}
    made |= run_pass(ExportQdq(), made, tmp_path)
    found, output = departures(made, made[GRAPH], optimize=False)
    four = [name for name, data in made[QUANTIZED].layers.items() if data.scheme.name == scheme]
    assert len(four) > 10
    assert max(found[name].own_rel_l2 for name in four) < 1e-3
    assert output < BETWEEN_HALVES


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (spoilt_weight, rf"{BLOCK}.ff.net.2: relative L2 error .* inside the whole graph, compared"),
        (missing_activation, rf"{BLOCK}.ff.net.2: its input in the whole graph differs by 8.9\de-01"),
    ],
)
def test_faults_are_named_in_half_precision_too(in_half, fault, message, tmp_path):
    spoilt = in_half | {GRAPH: spoil(in_half[GRAPH], fault, tmp_path)}
    with pytest.raises(StepFailed, match=r"in(side)? the whole graph") as caught:
        run_pass(Verify(samples=2, rows=4, bisect=True), spoilt, tmp_path)
    assert re.match(message, caught.value.problems[0])


@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        (spoilt_weight, f"{BLOCK}.ff.net.2"),
        (spoilt_scale, "transformer_blocks.1.attn1.to_v"),
        (spoilt_zero_point, f"{BLOCK}.attn1.to_out.0"),
    ],
)
def test_a_spoilt_layer_is_the_only_one_named(compiled, fault, layer, tmp_path):
    found, output = departures(compiled, spoil(compiled[GRAPH], fault, tmp_path), optimize=False)
    assert [name for name, d in found.items() if d.own_rel_l2 > 1e-4] == [layer]
    assert max(d.input_rel_l2 for d in found.values()) < 1e-5
    assert output < 1e-5


@pytest.mark.parametrize(
    ("fault", "first"),
    [(swapped_residual, "transformer_blocks.1.attn1.to_q"), (missing_activation, f"{BLOCK}.ff.net.2")],
)
def test_a_fault_between_layers_is_named_by_the_first_it_reaches(compiled, fault, first, tmp_path):
    found, _ = departures(compiled, spoil(compiled[GRAPH], fault, tmp_path), optimize=False)
    assert next(name for name, d in found.items() if d.input_rel_l2 > 1e-4) == first
    assert max(d.own_rel_l2 for d in found.values()) < 1e-5


def test_a_fault_behind_all_layers_is_in_the_output(compiled, tmp_path):
    found, output = departures(compiled, spoil(compiled[GRAPH], negated_output, tmp_path), optimize=False)
    assert output == pytest.approx(2)
    assert max(d.input_rel_l2 for d in found.values()) < 1e-5


def test_a_value_of_another_shape_has_departed_without_end(compiled):
    names = value_names(compiled[GRAPH])
    values = graph_values(compiled[GRAPH], OnnxRuntime(optimize=False), names)(compiled[TRAJECTORY].call(1))
    assert set(values) == set(names)
    cut = {
        name: value[..., :-1] if name == compiled[GRAPH].nodes["proj_out_2"][0] else value
        for name, value in values.items()
    }
    model = compiled[MODEL].open()
    clock = simulate(model.module, compiled[QUANTIZED])
    layers = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantizedLayer)}
    call = compiled[TRAJECTORY].call(1)
    with clock.at(1):
        found, _ = find_departures(layers, denoise_with(model.module, model), compiled[GRAPH], lambda _: cut, call)
    assert found["proj_out_2"] == Departure(torch.inf, torch.inf)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            spoilt_scale,
            r"transformer_blocks.1.attn1.to_v: relative L2 error 1.00e-03 inside the whole graph, compared",
        ),
        (
            missing_activation,
            rf"{BLOCK}.ff.net.2: its input in the whole graph differs by 8.9\de-01",
        ),
        (negated_output, r"the output: its value in the whole graph differs by 2.00e\+00"),
    ],
)
def test_verify_names_the_place_on_request(compiled, fault, message, tmp_path):
    spoilt = compiled | {GRAPH: spoil(compiled[GRAPH], fault, tmp_path)}
    with pytest.raises(StepFailed, match=r"in(side)? the whole graph") as caught:
        run_pass(Verify(samples=2, rows=4, bisect=True), spoilt, tmp_path)
    assert re.match(message, caught.value.problems[0])
