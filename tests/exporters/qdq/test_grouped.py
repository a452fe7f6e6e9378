"""Depthwise convolutions and convolutions in groups, from calibration to both runtimes."""

from pathlib import Path

import onnx
import pytest
import torch
from diffusers import DDIMScheduler
from harness import Artifacts, run_pass
from quantizing import planned, written
from torch import nn
from torch.nn import functional

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.verify.verify import Verify
from intaglio.passes.balance import BalanceLayers
from intaglio.passes.calibrate import Calibrate
from intaglio.passes.imports.calibrated import QuantizeWithModelopt
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.pipeline.artifacts.keys import (
    ENGINE,
    GRAPH,
    MODEL,
    PLAN,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
    WORKLOAD,
)
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.ref import ModelRef

GROUPS = {"first": 1, "depthwise": 128, "grouped": 2, "line": 8, "last": 1}
SMALL = {"depthwise", "line"}
"""Convolutions whose groups are so small that ONNX Runtime computes them faster in float."""


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 128, 3, padding=1)
        self.depthwise = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.grouped = nn.Conv2d(128, 128, 3, padding=1, groups=2, padding_mode="circular")
        self.line = nn.Conv1d(128, 128, 3, padding=1, groups=8, bias=False)
        self.last = nn.Conv2d(128, 4, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.first(sample)) + timestep.float().reshape(-1, 1, 1, 1) / 1000
        x = x + functional.silu(self.grouped(functional.silu(self.depthwise(x))))
        return self.last(self.line(x.flatten(2)).reshape(len(x), -1, *x.shape[2:]))


def make() -> DenoiserModel:
    torch.manual_seed(0)
    return DenoiserModel(Grouped().eval(), DDIMScheduler(timestep_spacing="trailing"), (4, 8, 8))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Artifacts:
    folder = tmp_path_factory.mktemp("grouped")
    made: Artifacts = {
        MODEL: Checkpoint.resolve(ModelRef(path="./test_grouped.py:make", sampling_steps=2), Path(__file__).parent)
    }
    made |= run_pass(Calibrate(samples=4), made, folder / "calibrate")
    return made | run_pass(ExportFloat(), made, folder / "export")


def test_they_are_layers_with_their_groups(start):
    assert {layer.name.removesuffix(".conv"): layer.groups for layer in start[MODEL].layers()} == GROUPS
    assert start[WORKLOAD].rows["depthwise"] == start[WORKLOAD].rows["line"] == 64


@pytest.mark.parametrize("scheme", ["w8a8_step", "w8a8so8_step", "w8a16"])
def test_onnxruntime_computes_what_is_simulated(start, scheme, tmp_path):
    made = written(planned(start, (scheme,), "onnxruntime-cpu", tmp_path), tmp_path)
    found = run_pass(Verify(samples=2, rows=2), made, tmp_path / "verify")[VERIFICATION]
    assert len(found.layers) == len(GROUPS) - (0 if scheme == "w8a16" else len(SMALL))
    assert max(layer.rel_l2 for layer in found.layers.values()) < 1e-6


def test_onnxruntime_multiplies_the_codes_where_the_output_is_rounded_too(start, tmp_path):
    made = written(planned(start, ("w8a8o8_step",), "onnxruntime-cpu", tmp_path), tmp_path)
    open_session(made[GRAPH].path, optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    groups = [a.i for node in nodes if node.op_type == "QLinearConv" for a in node.attribute if a.name == "group"]
    assert sorted(groups) == [1, 1, 2]


@pytest.mark.parametrize(("scheme", "count"), [("w4a8_step", 2), ("w8a8s_step", 3)])
def test_groups_are_balanced_and_trained(start, scheme, count, tmp_path):
    made = planned(start, (scheme,), "onnxruntime-cpu", tmp_path)
    made |= run_pass(BalanceLayers(steps=1, rows=2, gain_db=0.0, branch=2), made, tmp_path / "balance")
    assert made[PLAN].balances
    assert not set(made[PLAN].branches) - {"first", "last"}
    made = written(made, tmp_path, updates=2, samples=1, rank=2, start="gptq")
    verify = Verify(samples=2, rows=2, layer_tolerance=1e-3)  # one of 16384 rotated inputs of `last` is a tie
    found = run_pass(verify, made, tmp_path / "verify")[VERIFICATION]
    assert all(layer.rel_l2 < 1e-6 for name, layer in found.layers.items() if name != "last")
    assert len(found.layers) == count


def test_their_errors_are_predicted_in_every_basis(start, tmp_path):
    step = MeasureSensitivity(buckets=1, rows=2, samples=2, schemes=("w8a8_step", "w8a16"), bases=("scaled", "rotated"))
    table = run_pass(step, start, tmp_path)[SENSITIVITY]
    assert all(table.total(name, "w8a8_step") > 0 for name in ("depthwise", "grouped.conv", "line"))
    assert "depthwise" not in table.bases.get("rotated", {})


def test_tensorrt_multiplies_the_codes_of_groups_and_a_depthwise_convolution_stays_in_float(start, tmp_path, caplog):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with caplog.at_level("INFO"):
        made = planned(start, ("w8a8_step",), "tensorrt-rtx", tmp_path)
    assert made[PLAN].quantized == len(GROUPS) - 1
    assert "128 groups have 1 input channels each, and with fewer than 4, tensorrt-rtx is faster if" in caplog.text
    made = written(made, tmp_path)
    engine = run_pass(BuildTensorRT(), made, tmp_path / "engine")[ENGINE]
    assert (engine.low_precision_products, engine.float_products) == (len(GROUPS) - 1, 1)


def test_other_tools_may_round_depthwise_inputs_too(start, tmp_path):
    made = start | {TARGET: load_target("onnxruntime-cpu")}
    made |= run_pass(QuantizeWithModelopt(config="INT8_DEFAULT_CFG"), made, tmp_path / "modelopt")
    assert {scheme.name for scheme in made[PLAN].schemes.values()} == {"w8a8_step"}
    made |= run_pass(ExportQdq(), made, tmp_path / "qdq")
    found = run_pass(Verify(samples=2, rows=2), made, tmp_path / "verify")[VERIFICATION]
    assert max(found.layers[name].rel_l2 for name in GROUPS.keys() - {"grouped"}) < 1e-6
