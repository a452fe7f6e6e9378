"""Compile models whose forward computes in another type than float32: one error that says what to change."""

from pathlib import Path

import pytest
from harness import run_pass

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.errors import IntaglioError, RecipeError, StepFailed
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef

FACTORY = """
import torch
from diffusers import DDIMScheduler
from intaglio import DenoiserModel


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 3, 1)
        self.last = torch.nn.Linear(8, 8)

    def forward(self, sample):
        %s


def make():
    torch.manual_seed(0)
    return DenoiserModel(Net(), DDIMScheduler(timestep_spacing="trailing"), (3, 8, 8))
"""
AUTOCAST = """with torch.autocast("cpu", dtype=torch.%s):
            return self.last(self.first(sample)).float()"""
CONV = """h = torch.nn.functional.conv2d(sample.bfloat16(), self.first.weight.bfloat16())
        return self.last(h.float())"""
MATMUL = "return self.first((sample.bfloat16() @ self.last.weight.bfloat16()).float())"


def refused(forward: str, folder: Path) -> IntaglioError:
    with pytest.raises(IntaglioError) as raised:
        exported(forward, folder)
    return raised.value


def exported(forward: str, folder: Path) -> None:
    (folder / "net.py").write_text(FACTORY % forward)
    checkpoint = Checkpoint.resolve(ModelRef(path="./net.py:make", sampling_steps=1), folder)
    recorded = run_pass(Calibrate(samples=1), {MODEL: checkpoint}, folder / "calibrate")
    run_pass(ExportFloat(), {MODEL: checkpoint, **recorded}, folder / "export")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layers_under_autocast_are_named_when_they_are_first_called(dtype: str, tmp_path: Path) -> None:
    error = refused(AUTOCAST % dtype, tmp_path)
    assert isinstance(error, RecipeError)
    assert f"2 of 2 layers, the first is first, compute in {dtype}," in str(error)
    assert "remove torch.autocast" in str(error)


@pytest.mark.parametrize(
    ("forward", "message"),
    [(CONV, "not valid ONNX: [ShapeInferenceError] (op_type:Conv"), (MATMUL, "cannot execute the exported graph: ")],
)
def test_products_outside_layers_in_another_type_are_named(forward: str, message: str, tmp_path: Path) -> None:
    error = refused(forward, tmp_path)
    assert isinstance(error, StepFailed)
    assert message in str(error)
    assert str(error).endswith("it may cast to another type than float32")


def test_layers_in_float32_are_not_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY % "return self.last(self.first(sample))")
    checkpoint = Checkpoint.resolve(ModelRef(path="./net.py:make", sampling_steps=1), tmp_path)
    recorded = run_pass(Calibrate(samples=1), {MODEL: checkpoint}, tmp_path / "scratch")
    assert {*recorded[TRAJECTORY].amax} == {"first", "last"}
