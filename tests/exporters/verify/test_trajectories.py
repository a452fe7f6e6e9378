"""A robot's policy goes through the compiler: its samples are trajectories, and its observations differ."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intaglio import Recipe, Store, compile
from intaglio.exporters.report.curves import HEIGHT, WIDTH
from intaglio.pipeline.artifacts.keys import ENGINE, PLAN, REPORT, VERIFICATION
from intaglio.pipeline.runs.runner import CompiledTarget

POLICY = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from intaglio import DenoiserModel


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Conv1d(2, 32, 3, padding=1)
        self.seen, self.time = nn.Linear(4, 32), nn.Linear(1, 32)
        self.hidden, self.out = nn.Linear(32, 32), nn.Conv1d(32, 2, 1)

    def forward(self, sample, timestep, observation):
        x = self.into(sample) + (self.seen(observation) + self.time(timestep.view(-1, 1))).unsqueeze(-1)
        return self.out(self.hidden(x.transpose(1, 2).relu()).transpose(1, 2))


def make():
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=4)
    return DenoiserModel(Policy(), scheduler, (2, 8), conditions={"observation": torch.randn(32, 4)})
"""
RECIPE = """
model: {path: ./policy.py:make, sampling_steps: 4}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 4}
  - uniform: {schemes: [w8a8_token, w8a8_step]}
  - distill: {updates: 0}
  - merge
  - export-float
  - export-qdq
  - onnxruntime
  - verify: {samples: 8, rows: 2, gap_error_db: 0}
  - report
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> CompiledTarget:
    folder: Path = tmp_path_factory.mktemp("policy")
    (folder / "policy.py").write_text(POLICY)
    return compile(Recipe.parse(RECIPE), Store(folder / "store"), base=folder)["onnxruntime-cpu"]


def test_cosine_and_largest_error_are_those_of_the_trajectories(done: CompiledTarget) -> None:
    verified = done[VERIFICATION]
    full, deployed = (verified.samples[name].double().numpy().reshape(8, 16) for name in ("full_precision", "deployed"))
    cosines = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(full, deployed, strict=True)]
    assert verified.figures.cosine == pytest.approx(np.mean(cosines), abs=1e-12)
    assert verified.figures.cosine_min == pytest.approx(np.min(cosines), abs=1e-12)
    assert verified.figures.error_max == pytest.approx(np.abs(deployed - full).max(), rel=1e-6)  # float32 differences
    assert 0.999 < verified.figures.cosine_min <= verified.figures.cosine < 1
    assert verified.figures.error_max > 0
    assert done[REPORT].metrics["cosine"] == verified.figures.cosine


def test_all_layers_are_quantized_and_linear_ones_multiply_integers(done: CompiledTarget) -> None:
    assert {name: scheme.name for name, scheme in done[PLAN].schemes.items()} == {
        **dict.fromkeys(("into", "out"), "w8a8_step"),
        **dict.fromkeys(("seen", "time", "hidden"), "w8a8_token"),
    }
    assert done[ENGINE].low_precision_products == 3


def test_the_loop_moves_trajectories_in_float32(done: CompiledTarget) -> None:
    samples = done[VERIFICATION].samples
    assert {x.dtype for x in samples.values()} == {torch.float32}
    assert {tuple(x.shape) for x in samples.values()} == {(8, 2, 8)}


def test_the_report_plots_the_trajectories(done: CompiledTarget, tmp_path: Path) -> None:
    done[REPORT].save(tmp_path)
    assert "The same 8 seeds: " in done[REPORT].html
    assert Image.open(tmp_path / "samples.png").size == (8 * WIDTH, 2 * HEIGHT)
