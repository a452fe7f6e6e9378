"""Layers that are called several times, under several names, or not at all, from calibration to verification."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import planned, written
from unusual import Unusual

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.report.figures import float_rows
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.verify.verify import Verify
from intaglio.passes.assign.assign import AssignPrecision
from intaglio.passes.balance import BalanceLayers
from intaglio.passes.calibrate import Calibrate
from intaglio.passes.layer_ranges import expected_ends
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import (
    ENGINE,
    FLOAT_GRAPH,
    GRAPH,
    MODEL,
    PLAN,
    QUANTIZED,
    TARGET,
    TRAJECTORY,
    VERIFICATION,
    WORKLOAD,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.simulation.layer import QuantizedLayer, channel_axis
from intaglio.pipeline.simulation.model import quantize_model

REASONS = {
    "never": "it is never called",
    "dead": "its result does not reach the output",
    "by_value": "the model also uses its weight outside the layer",
    "spare": "it is never called",
}
CALLS = {"twice": 2, "blocks.0.up": 2, "blocks.0.down": 2, "thrice": 3, "two_sizes": 2}
QUANTIZED_LAYERS = {*CALLS, "first", "side", "one", "tied", "named", "last"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Artifacts:
    folder = tmp_path_factory.mktemp("unusual")
    model = ModelRef(path="./unusual.py:make", sampling_steps=2)
    made: Artifacts = {MODEL: Checkpoint.resolve(model, Path(__file__).parents[2])}
    made |= run_pass(Calibrate(samples=4), made, folder / "calibrate")
    return made | run_pass(ExportFloat(), made, folder / "export")


def check(made: Artifacts, folder: Path) -> None:
    """Every layer and the whole graph compute what is simulated."""
    verify = Verify(samples=2, rows=2, gap_db_tolerance=6.0)
    found = run_pass(verify, made, folder / "verify")[VERIFICATION]
    assert set(found.layers) == set(made[GRAPH].nodes)


def test_layers_without_a_part_in_the_calls_are_recorded_with_the_reason(start, tmp_path):
    assert start[WORKLOAD].float_reasons == REASONS
    assert set(start[TRAJECTORY].low) == QUANTIZED_LAYERS
    assert set(start[FLOAT_GRAPH].nodes) == QUANTIZED_LAYERS
    start[WORKLOAD].save(tmp_path)
    assert Workload.load(tmp_path) == start[WORKLOAD]


def test_ranges_are_those_of_all_calls_of_a_layer(start):
    model, trajectory = start[MODEL].open(), start[TRAJECTORY]
    seen = []
    model.module.thrice.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        denoise_with(model.module, model)(trajectory.call(0))
    assert len(seen) == 3
    assert trajectory.amax["thrice"][0] == pytest.approx(max(abs(end) for x in seen for end in expected_ends(x)))


def test_the_plan_names_them_and_counts_what_is_quantized(start, tmp_path, caplog):
    with caplog.at_level("INFO"):
        plan = planned(start, ("w8a8_token", "w8a8_step"), "onnxruntime-cpu", tmp_path)[PLAN]
    assert plan.reasons == REASONS
    assert plan.quantized == len(QUANTIZED_LAYERS)
    assert "11 of 15 layers quantized" in caplog.text
    assert "2 layers stay in float, it is never called: never, spare" in caplog.text
    plan.save(tmp_path)
    assert QuantPlan.load(tmp_path) == plan
    assert plan.replace({"never": W8A8_TOKEN}).reasons.keys() == REASONS.keys() - {"never"}


def test_the_ends_are_those_that_are_called(start, tmp_path):
    made = start | {TARGET: load_target("onnxruntime-cpu")}
    step = UniformPlan(schemes=("w4a16",), ends=("w8a16",), groups=(32,))
    plan = run_pass(step, made, tmp_path)[PLAN]
    assert (plan.schemes["first"].name, plan.schemes["last"].name) == ("w8a16", "w8a16")
    assert plan.schemes["named"].name == "w4a16"


def test_a_plan_that_was_made_before_calibration_ends_in_the_same_graph(start, tmp_path):
    early = {key: value for key, value in start.items() if key != WORKLOAD}
    made = planned(early, ("w8a8_token", "w8a8_step"), "onnxruntime-cpu", tmp_path)
    assert made[PLAN].schemes["never"] == W8A8_TOKEN
    made = made | run_pass(BalanceLayers(steps=1, rows=2), made, tmp_path / "balance")
    made = written(made, tmp_path)
    assert set(made[QUANTIZED].layers) == set(made[GRAPH].nodes) == QUANTIZED_LAYERS
    assert {name for name, scheme in made[PLAN].schemes.items() if scheme == FLOAT} == REASONS.keys()
    assert set(made[PLAN].reasons.values()) == {"the exported graph does not compute it"}


def test_measured_plans_name_them_too_and_may_keep_them(start, tmp_path, caplog):
    made = start | {TARGET: load_target("onnxruntime-cpu")}
    step = MeasureSensitivity(buckets=1, rows=2, samples=1, drift_samples=1, groups=(32,))
    made = made | run_pass(step, made, tmp_path / "sensitivity")
    with caplog.at_level("INFO"):
        made = made | run_pass(AssignPrecision(keep=("never", "named")), made, tmp_path / "assign")
    assert made[PLAN].reasons == REASONS
    assert {layer.name for layer in made[PLAN].layers} == QUANTIZED_LAYERS | REASONS.keys()
    assert "10 of 15 layers quantized" in caplog.text
    assert "1 layer stays in float, assign.keep names it: named" in caplog.text
    assert set(written(made, tmp_path)[GRAPH].nodes) == QUANTIZED_LAYERS - {"named"}


def test_the_report_names_layers_in_float_with_the_reason(start, tmp_path):
    target = load_target("tensorrt-rtx")
    plan = planned(start, ("w8a8_token", "w8a8_step"), "tensorrt-rtx", tmp_path)[PLAN].replace({"named": FLOAT})
    assert dict(float_rows(plan, target)) == {
        "the plan leaves it in float": ("named",),
        "it is never called": ("never", "spare"),
        "its result does not reach the output": ("dead",),
        "the model also uses its weight outside the layer": ("by_value",),
    }


SHARED = [
    ("onnxruntime-cpu", ("w8a8_token", "w8a8_step")),
    ("onnxruntime-cpu", ("w8a8_step",)),
    ("onnxruntime-cpu", ("w4a8_token", "w4a8_step")),
    ("onnxruntime-cpu", ("w8a8s_token", "w8a8s_step")),
    ("onnxruntime-cpu", ("w8a8s_token", "w8a8so8_step")),
    ("tensorrt-rtx", ("w8a8_token", "w8a8_step")),
    ("tensorrt-rtx", ("w8a8s_step",)),
    ("tensorrt-rtx", ("w4a8_step",)),
    ("tensorrt-rtx", ("w4a16", "w8a8_step")),
]


@pytest.mark.parametrize(("target", "schemes"), SHARED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_call_of_a_layer_is_quantized_and_the_runtime_takes_the_graph(start, target, schemes, tmp_path):
    made = written(planned(start, schemes, target, tmp_path), tmp_path)
    check(made, tmp_path)
    if target == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        assert run_pass(BuildTensorRT(), made, tmp_path / "engine")[ENGINE].plan
        return
    for settings in ({}, {"session.x64quantprecision": "1"}):  # kernels of CPUs with and without VNNI
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        optimized = tmp_path / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        onnxruntime.InferenceSession(made[GRAPH].path, options, providers=["CPUExecutionProvider"])
        products = [
            node for node in onnx.load(optimized, load_external_data=False).graph.node if "MatMul" in node.op_type
        ]
        integer = [node for node in products if node.op_type == "MatMulIntegerToFloat"]
        assert len(integer) == 2 + 2 + 2 + 3 + 3  # twice, up, down, thrice; one, tied, named


@pytest.mark.parametrize(
    "schemes",
    [("w4a8_token", "w4a8_step"), ("w4a8s_token", "w4a8s_step"), ("w4a4s_token", "w4a4so8_step")],
    ids=lambda v: v[1],
)
def test_layers_that_are_called_again_are_balanced_and_trained_over_all_calls(start, schemes, tmp_path):
    made = planned(start, schemes, "onnxruntime-cpu", tmp_path)
    made = made | run_pass(BalanceLayers(steps=1, rows=2, gain_db=0.0), made, tmp_path / "balance")
    name = next(name for name in CALLS if name in made[PLAN].balances)
    model, trajectory, basis = start[MODEL].open(), start[TRAJECTORY], made[PLAN].balances[name]
    layer, seen = model.module.get_submodule(name), []
    axis = channel_axis(layer)
    layer.register_forward_pre_hook(lambda _, args: seen.append(basis.balance.input(args[0], axis)))
    with torch.no_grad():
        denoise_with(model.module, model)(trajectory.call(1, trajectory.some_rows(2)))
    assert len(seen) == CALLS[name]
    assert basis.high_T[1] == pytest.approx(max(expected_ends(x)[1] for x in seen))
    check(written(made, tmp_path, updates=2, samples=1, rank=2, start="gptq"), tmp_path)


def test_the_simulation_replaces_a_layer_under_all_its_names():
    model = Unusual()
    quantize_model(model, {"twice": W8A8_TOKEN, "blocks.0.up": W8A8_TOKEN}, StepClock((0.0,)))
    assert isinstance(model.same, QuantizedLayer)
    assert model.same is model.twice
    assert model.again.up is model.blocks[0].up


def test_a_quantized_layer_has_the_attributes_of_the_layer_that_it_replaces():
    linear, conv = (
        QuantizedLayer(layer, scheme, StepClock((0.0,)))
        for layer, scheme in ((torch.nn.Linear(8, 4), W8A8_TOKEN), (torch.nn.Conv2d(8, 4, 3, stride=2), FLOAT))
    )
    assert (linear.in_features, linear.out_features, linear.weight.shape) == (8, 4, (4, 8))
    assert (linear.weight.dtype, linear.weight.device.type, linear.bias.shape) == (torch.float32, "cpu", (4,))
    assert (conv.stride, conv.kernel_size, conv.groups) == ((2, 2), (3, 3), 1)
    with pytest.raises(AttributeError, match=r"Linear.* no attribute 'stride'"):
        _ = linear.stride
