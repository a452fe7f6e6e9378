"""The sample policy: its recipe loads, its expert does what it says, and the trained policy reaches its goals."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from intaglio.pipeline.cli.app import app
from intaglio.pipeline.model.sampler import Sampler

SAMPLES = Path(__file__).parents[2] / "samples"
TRAINING = runpy.run_path(str(SAMPLES / "train_policy.py"))
BENCHMARK = runpy.run_path(str(SAMPLES / "benchmarks" / "policy.py"))
TASK = TRAINING["TASK"]
SEEN = torch.tensor([[1.0, 0.0, 0.0, 0.0, -0.5]])
"""A goal straight ahead at the distance 1, and an obstacle of radius 0.1 in the middle of the way."""


@pytest.mark.parametrize(
    "schemes", ["[w8a8_token, w8a16]", "[w8a8_token, w8a8_step]", "[w4a8_token, w8a8_token, w8a16]"]
)
def test_the_recipe_loads_in_every_variant(schemes: str, tmp_path: Path) -> None:
    options = ("--set", f"uniform.schemes={schemes}", "--store", str(tmp_path), "--json")
    planned = CliRunner().invoke(app, ["plan", str(SAMPLES / "policy.yaml"), *options])
    assert planned.exit_code == 0, planned.output
    steps = json.loads(planned.stdout)
    assert set(steps) == {"onnxruntime-cpu", "tensorrt-rtx"}
    assert [step["step"] for step in steps["onnxruntime-cpu"]][-4:] == ["onnxruntime", "verify", "benchmark", "report"]
    assert [step["step"] for step in steps["tensorrt-rtx"]][-3:] == ["tensorrt", "verify", "report"]


def test_the_expert_reaches_every_goal_and_passes_a_central_obstacle_on_both_sides() -> None:
    rng = torch.Generator().manual_seed(0)
    seen = TASK["situations"](2000, rng)
    assert TRAINING["succeeded"](TRAINING["expert"](seen, rng), seen).all()
    left = BENCHMARK["side"](TRAINING["expert"](SEEN.expand(400, 5), rng), SEEN.expand(400, 5))
    assert 0.4 < float(left.float().mean()) < 0.6  # 5 standard errors of 400 coins are 0.125


def test_a_straight_way_through_the_obstacle_fails_and_one_beside_it_succeeds() -> None:
    x = torch.linspace(1 / 16, 1, 16)
    through, beside = torch.stack([x, 0 * x]), torch.stack([x, 0.2 * (torch.pi * x).sin()])
    short = torch.stack([0.9 * x, 0.2 * (torch.pi * x).sin()])
    ways = torch.stack([through, beside, short, -beside.flip(0).flip(0)])
    assert TRAINING["succeeded"](ways, SEEN.expand(4, 5)).tolist() == [False, True, False, False]


def test_figures_of_a_benchmark_tell_which_trajectories_took_the_other_way() -> None:
    x = torch.linspace(1 / 16, 1, 16)
    above, below = torch.stack([x, 0.2 * (torch.pi * x).sin()]), torch.stack([x, -0.2 * (torch.pi * x).sin()])
    found = BENCHMARK["distances"](torch.stack([above, below]), torch.stack([above, above]), SEEN.expand(2, 5))
    assert (found["other_way"], found["success"]) == (1, 1.0)
    assert found["error_max"] == pytest.approx(0.4, rel=0.02)  # twice 0.2, at the waypoint next to the middle
    assert found["cosine_min"] < 0.95


def test_observations_differ_between_samples() -> None:
    model = TASK["make"]()
    start = Sampler(model, 10, 1.0).start(32, torch.Generator().manual_seed(0))
    assert len(start.conditions["observation"].unique(dim=0)) > 28  # drawn from 1024 rows
    assert Sampler(model, 10, 1.0).timesteps == tuple(float(t) for t in range(10, 0, -1))


def test_the_trained_policy_reaches_its_goals() -> None:
    model = TASK["make"]()
    seen = TASK["situations"](200, torch.Generator().manual_seed(7))
    trajectories = TRAINING["drawn"](model, seen)
    assert float(TRAINING["succeeded"](trajectories, seen).float().mean()) > 0.75  # its card says 0.856 of 1000
    several = TRAINING["drawn"](model, SEEN.expand(64, 5))
    left = BENCHMARK["side"](several, SEEN.expand(64, 5)).float().mean()
    assert 0.2 < float(left) < 0.8  # both ways


def test_an_update_of_the_training_changes_every_weight_that_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SAMPLES)  # as where the script itself is run
    torch.manual_seed(0)
    model = TASK["untrained"]()
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    loss = TRAINING["train"](model, 2, 4, 1e-3, 0)
    assert 0.9 < loss < 1.1
    assert [n for n, value in model.module.named_parameters() if torch.equal(value, before[n])] == []
