import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import HALF_TOLERANCE, Simulation, parity, rel_l2, with_plan

from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.build import BuildOnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.verify.layer_run import layer_model, run_layer
from intaglio.pipeline.artifacts.graph import TensorSpec
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.quantized import Quantized
from intaglio.pipeline.errors import ContractError, TargetError
from intaglio.pipeline.formats.layer import Layer, structural_schemes
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W8A8_STEP,
    W8A8_TOKEN,
    IntInput,
    LayerScheme,
    w4a8_step,
    w4a8_token,
    w4a16,
    with_output,
    with_shift,
)
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.numerics.step_tables import refine

RUNTIMES = ("onnxruntime-cpu", "tensorrt-rtx")


def mixed(layer: Layer) -> LayerScheme:
    """Every scheme somewhere, siblings alike."""
    if layer.op == "conv":
        if layer.name in ("conv_in", "conv_out"):
            return FLOAT
        if layer.name.endswith("conv_shortcut"):
            return with_shift(W8A8_STEP)  # 1 x 1: nothing is added around its input
        return w4a8_step(32) if layer.name.startswith("mid_block") else W8A8_STEP
    if "ff.net.0" in layer.name:
        return with_shift(w4a8_token(32))
    if "to_k" in layer.name or "to_out" in layer.name:
        return w4a8_token(32)
    if "attn" in layer.name or "attention" in layer.name:
        return W8A8_TOKEN
    if layer.k >= 128 and "time_embedding" not in layer.name:
        return w4a16(64)
    return W8A8_STEP if layer.n % 64 == 0 else FLOAT


def rotated(layer: Layer) -> Balance | None:
    """Attention's inputs, alike for all that read one, and convolutions between others."""
    block = 16 if "attn" in layer.name or "attention" in layer.name else 8 if "conv2" in layer.name else 0
    if not block or layer.shape[1] % block:
        return None
    return Balance.rotated(torch.full((layer.shape[1],), 0.8), block, torch.Generator().manual_seed(0))


def write(artifacts: Artifacts, runtime: str, folder: Path) -> Artifacts:
    target: Artifacts = {TARGET: load_target(runtime)}
    return artifacts | target | run_pass(ExportQdq(), artifacts | target, folder)


@pytest.fixture(scope="module", params=["dit", "unet"])
def planned(request) -> Artifacts:
    return with_plan(request.getfixturevalue(request.param), mixed, rotated)


@pytest.fixture(scope="module")
def simulation(planned) -> Simulation:
    return Simulation(planned)


@pytest.fixture(scope="module", params=RUNTIMES)
def written(request, planned, tmp_path_factory) -> Artifacts:
    return write(planned, request.param, tmp_path_factory.mktemp("qdq"))


def test_every_layer_computes_what_is_simulated(written, simulation):
    step, layers = 1, simulation.layers
    seen, _ = simulation.at(step)
    assert set(written[GRAPH].nodes) == set(layers)
    halves = written[TARGET].float_type == "float16"
    for optimize, tolerance in ((False, 1e-5), (True, 1e-4)):  # the order of float32 sums; integer kernels
        for name, layer in layers.items():
            error, off, distance = parity(written[GRAPH], name, layers, *seen[name], step, optimize=optimize)
            half = halves and not isinstance(layer.scheme.input, IntInput)
            assert error <= (HALF_TOLERANCE if half else tolerance), name
            assert off <= 1, name  # a tie
            assert distance <= 1, name


def test_the_whole_graph_runs_and_finds_its_step(written, simulation):
    """The distance to the simulation is not what is tested: one tie that rounds otherwise moves all later layers."""
    denoise = graph_denoise(written[GRAPH], OnnxRuntime())
    for step in range(3):
        _, expected = simulation.at(step)
        call = written[TRAJECTORY].call(step)
        assert rel_l2(denoise(call), expected) < 0.05
        assert rel_l2(denoise(call), written[TRAJECTORY].outputs[step]) < 0.1
    assert written[GRAPH].timesteps == written[TRAJECTORY].timesteps
    assert written[GRAPH].inputs["step"] == TensorSpec("int64", ())


def test_a_bias_may_be_computed_after_the_product(dit, tmp_path):
    """torch's `addmm` multiplies the bias by 1 behind the product; a large bias is not folded with it."""
    planned = with_plan(dit, mixed)
    model = onnx.load(planned[FLOAT_GRAPH].path)
    nodes = model.graph.node
    weights = {tensor.name for tensor in model.graph.initializer}
    products = {node.output[0] for node in nodes if node.op_type == "MatMul"}
    sums = [
        node for node in nodes if node.op_type == "Add" and set(node.input) & weights and set(node.input) & products
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "one"))
    for node in sums:
        (bias,) = (place for place, name in enumerate(node.input) if name in weights)
        once = onnx.helper.make_node("Mul", [node.input[bias], "one"], [f"{node.name}:bias"], name=f"{node.name}/Mul")
        once.metadata_props.extend(node.metadata_props)
        node.input[bias] = once.output[0]
        nodes.insert(list(nodes).index(node), once)
    onnx.save(model, tmp_path / "model.onnx")
    changed: Artifacts = {FLOAT_GRAPH: replace(planned[FLOAT_GRAPH], path=tmp_path / "model.onnx")}
    graphs = [write(planned | each, "onnxruntime-cpu", tmp_path / f"{len(each)}")[GRAPH] for each in ({}, changed)]
    call = planned[TRAJECTORY].call(1)
    plain, scaled = (graph_denoise(graph, OnnxRuntime(optimize=False))(call) for graph in graphs)
    assert len(sums) > 10
    assert torch.equal(plain, scaled)


def test_tensorrt_rtx_executes_every_integer_layer_on_integers(planned, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    engine = run_pass(BuildTensorRT(), write(planned, "tensorrt-rtx", tmp_path), tmp_path / "engine")[ENGINE]
    assert engine.low_precision_products == sum(isinstance(s.input, IntInput) for s in planned[PLAN].schemes.values())


def test_rows_are_picked_from_tables_in_float16(dit, tmp_path):
    artifacts = write(with_plan(dit, lambda _: FLOAT), "onnxruntime-cpu", tmp_path)
    tables = {
        name: onnx.TensorProto.DataType.Name(tensor.data_type)
        for name, tensor in ((t.name, t) for t in onnx.load(artifacts[GRAPH].path).graph.initializer)
        if "embedding_table" in name
    }
    assert set(tables.values()) == {"FLOAT16"}
    assert len(tables) == 2  # a block each
    simulation = Simulation(artifacts)
    _, expected = simulation.at(1)
    call = artifacts[TRAJECTORY].call(1)
    whole = rel_l2(artifacts[TRAJECTORY].outputs[1], expected)
    found = graph_denoise(artifacts[GRAPH], OnnxRuntime(optimize=False))(call)
    assert rel_l2(found, expected) < 1e-6 < whole  # the simulation rounds them too; without, it would be `whole` away


def test_values_and_nodes_are_named_once_and_know_their_layer(written):
    graph = onnx.load(written[GRAPH].path).graph
    names = [node.name for node in graph.node]
    values = [v for node in graph.node for v in node.output] + [i.name for i in graph.input]
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    assert {v for ends in written[GRAPH].nodes.values() for v in ends} <= set(values)
    layer_of = {node.name: p.value for node in graph.node for p in node.metadata_props if p.key == LAYER_KEY}
    for name in (n.name for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")):
        assert name.startswith(f"{layer_of[name]}/")


def test_only_standard_operators_and_no_float_weight_of_a_quantized_layer(written):
    model = onnx.load(written[GRAPH].path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    used = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= used
    assert written[GRAPH].size_bytes < 0.5 * written[FLOAT_GRAPH].size_bytes


def test_equal_inputs_give_equal_bytes(planned, tmp_path):
    def digest(folder: Path) -> list[str]:
        write(planned, "tensorrt-rtx", folder)
        return [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("model.onnx*"))]

    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_a_layer_without_a_scale_for_each_step_does_not_look_at_it(dit, tmp_path):
    artifacts = with_plan(dit, lambda layer: W8A8_TOKEN if layer.op == "linear" else FLOAT)
    graph = write(artifacts, "onnxruntime-cpu", tmp_path)[GRAPH]
    assert "step" not in graph.inputs
    assert graph.timesteps == ()


def test_a_layer_alone_has_its_codes_as_second_output(written):
    scheme = written[PLAN].schemes
    for name in written[GRAPH].nodes:
        model = layer_model(written[GRAPH], name)
        onnx.checker.check_model(model, full_check=True)
        assert len(model.graph.output) == (1 if scheme[name].name == "w4a16" else 2)
        assert [i.name for i in model.graph.input][1:] == (["step"] if scheme[name].name.endswith("_step") else [])


def test_layers_on_one_input_in_one_basis_share_it(written):
    rotations = ("/balance/MatMul", "/balance/Conv")
    rotated = [n.name for n in onnx.load(written[GRAPH].path).graph.node if n.name.endswith(rotations)]
    assert any(name.endswith("to_q/balance/MatMul") for name in rotated)
    assert not any("to_k" in name or "to_v" in name for name in rotated)
    assert len(written[PLAN].balances) > len(rotated)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", [W8A8_TOKEN, with_shift(W8A8_STEP), w4a8_token(32), w4a16(32)])
def test_channel_scales_cost_nothing_where_something_before_them_takes_them(dit, scheme, runtime, tmp_path):
    """Those behind a modulated normalization are in its constants, those behind an attention in the layer before it."""

    def of_attention(layer: Layer) -> LayerScheme:
        return scheme if "attn" in layer.name else FLOAT

    written = write(with_plan(dit, of_attention, rotated), runtime, tmp_path)
    graph, simulation = written[GRAPH], Simulation(written)
    left = {n.name for n in onnx.load(graph.path).graph.node if n.name.endswith("/balance/Mul")}
    outputs = {n for n in graph.nodes if n.endswith("to_out.0")}
    signs = scheme.name == "w4a16" and runtime == "tensorrt-rtx"  # it takes no negative scales of codes
    assert left == ({f"{name}/balance/Mul" for name in outputs} if signs else set())
    folded = {n for n in graph.nodes if "to_" in n} - (outputs if signs else set())
    assert {graph.nodes[n][0] for n in folded} <= set(graph.scaled)
    seen, _ = simulation.at(1)
    half = runtime == "tensorrt-rtx" and scheme.name == "w4a16"
    for name in simulation.layers:
        error, off, _ = parity(graph, name, simulation.layers, *seen[name], 1, optimize=True)
        assert error < (3 * HALF_TOLERANCE if half else 1e-4), name
        assert off <= 1, name
        unscaled = parity(replace(graph, scaled={}), name, simulation.layers, *seen[name], 1, optimize=True)[0]
        assert name not in folded or unscaled > 0.1


def test_the_plan_is_held_against_the_target_first(unet, tmp_path):
    artifacts = with_plan(unet, lambda layer: w4a16(16) if layer.name == "conv_out" else FLOAT)
    with pytest.raises(TargetError, match=r"conv_out: group size 16, but tensorrt-rtx takes 32, 64, 128"):
        write(artifacts, "tensorrt-rtx", tmp_path)


def test_a_planned_layer_that_the_graph_does_not_have_stays_in_float_and_is_named(dit, tmp_path, caplog):
    artifacts = with_plan(dit, mixed)
    model = onnx.load(dit[FLOAT_GRAPH].path)
    for node in model.graph.node:
        if node.name.startswith("proj_out_1/"):
            del node.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    nodes = {name: ends for name, ends in dit[FLOAT_GRAPH].nodes.items() if name != "proj_out_1"}
    artifacts |= {FLOAT_GRAPH: replace(dit[FLOAT_GRAPH], path=tmp_path / "model.onnx", nodes=nodes)}
    artifacts[TARGET] = load_target("onnxruntime-cpu")
    with caplog.at_level("INFO"):
        made = run_pass(ExportQdq(), artifacts, tmp_path / "qdq")
    assert made[PLAN].schemes["proj_out_1"] == FLOAT
    assert made[PLAN].reasons == {"proj_out_1": "the exported graph does not compute it"}
    assert made[PLAN].quantized == len(made[GRAPH].nodes)
    assert "1 layer stays in float, the exported graph does not compute it: proj_out_1" in caplog.text


def test_integers_that_the_plan_does_not_have_are_refused(dit, tmp_path):
    artifacts = with_plan(dit, mixed)
    fewer = dict(artifacts[QUANTIZED].layers)
    del fewer["proj_out_1"]
    artifacts |= {QUANTIZED: Quantized(artifacts[QUANTIZED].timesteps, fewer)}
    with pytest.raises(ContractError, match="have different schemes for proj_out_1: run `merge` after"):
        write(artifacts, "onnxruntime-cpu", tmp_path)


def test_a_call_beside_the_recorded_ones_takes_the_nearest_step(dit, tmp_path):
    graph = write(with_plan(dit, mixed), "onnxruntime-cpu", tmp_path)[GRAPH]
    call = dict(dit[TRAJECTORY].call(0))
    predictions = []
    for timestep in (dit[TRAJECTORY].timesteps[2], dit[TRAJECTORY].timesteps[2] + 1):
        call["timestep"] = torch.full_like(call["timestep"], int(timestep))
        predictions.append(graph_denoise(graph, OnnxRuntime())(call))
    assert rel_l2(*predictions) < 0.1  # another timestep embedding, the same scales


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_finer_table_is_used_between_the_calibrated_timesteps(dit, runtime, tmp_path):
    finer = refine(dit[TRAJECTORY].timesteps, 3)
    artifacts = write(with_plan(dit, lambda layer: W8A8_STEP, timesteps=finer), runtime, tmp_path)
    graph, simulation = artifacts[GRAPH], Simulation(artifacts)
    assert graph.timesteps == finer
    between = (finer[4] + finer[5]) / 2 - 1
    call = {**dit[TRAJECTORY].call(1), "timestep": torch.full((4,), int(between))}
    assert simulation.clock.index(between) == 5
    with torch.no_grad(), simulation.clock.at(5):
        simulated = simulation.denoise(call)
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), simulated) < 0.02
    for name in simulation.layers:
        assert parity(graph, name, simulation.layers, *simulation.seen[name], 5, optimize=False)[0] < 1e-5, name
        x = simulation.seen[name][0].numpy()
        at_4, at_5 = (torch.from_numpy(run_layer(graph, name, x, OnnxRuntime(), step)[0]) for step in (4, 5))
        assert rel_l2(at_4, at_5) > 1e-5, name


def test_onnxruntime_executes_every_convolution_with_a_rounded_output_on_integers(unet, tmp_path):
    def choose(layer: Layer) -> LayerScheme:
        return with_output(W8A8_STEP) if layer.op == "conv" else FLOAT

    artifacts = write(with_plan(unet, choose), "onnxruntime-cpu", tmp_path)
    engine = run_pass(BuildOnnxRuntime(), artifacts, tmp_path / "engine")[ENGINE]
    assert engine.low_precision_products == sum(s != FLOAT for s in artifacts[PLAN].schemes.values())
    simulation = Simulation(artifacts)
    seen, _ = simulation.at(1)
    for name in simulation.layers:
        error, off, distance = parity(artifacts[GRAPH], name, simulation.layers, *seen[name], 1, optimize=True)
        assert (error < 1e-5, off, distance) == (True, 0, 0), name  # codes in, codes out: only float32 scaling is left


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_clipped_tokens_have_the_codes_that_are_simulated(dit, runtime, tmp_path):
    """A learnt factor on the magnitude of tokens: what is beyond it is clipped, at 4 bits and at 8."""

    def choose(layer: Layer) -> LayerScheme:
        return next((s for s in structural_schemes(layer, (32,), ("w4a4_token",)) if s != FLOAT), W8A8_TOKEN)

    planned = with_plan(dit, lambda layer: FLOAT if layer.op == "conv" else choose(layer))
    quantized, clipped = planned[QUANTIZED], LayerTables(factor_T=torch.tensor([0.9, 0.5, 0.7]))
    layers = {n: replace(data, tables=data.tables.replaced_by(clipped)) for n, data in quantized.layers.items()}
    written = write(planned | {QUANTIZED: replace(quantized, layers=layers)}, runtime, tmp_path)
    simulation, step = Simulation(written), 1
    seen, _ = simulation.at(step)
    for name, layer in simulation.layers.items():
        error, off, distance = parity(written[GRAPH], name, simulation.layers, *seen[name], step, optimize=True)
        assert error <= 1e-4, name
        assert (off <= 1, distance <= 1) == (True, True), name  # a tie
        with simulation.clock.at(step):
            codes = layer.input_codes(seen[name][0]).codes
        assert codes.max() == (7 if layer.scheme.name == "w4a4_token" else 127)
