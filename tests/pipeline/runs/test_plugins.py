"""Metrics, runtimes and commands of other distributions: an edit of their source makes the steps run that use them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_forked
from tiny import save_folder, tiny_dit

from intaglio import Recipe, bind
from intaglio.pipeline.entry_points import COMMANDS, METRICS, RUNTIMES
from intaglio.pipeline.runs.registry import plugin_source

METRIC = """
class Mine:
    def applies(self, reference, context):
        return True

    def compare(self, output, reference, context):
        return {factor} * (output - reference).flatten(1).square().mean(1)
"""
RECIPE = """
model: {path: dit, sampling_steps: 2}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 2}
  - sensitivity: {metrics: {visual: mine}, schemes: [w8a8_token, w8a8_step], buckets: 1, rows: 2, samples: 0}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on the path, as pip would have filled it: a module, and the description of its distribution."""
    described = tmp_path / "site/mine-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[intaglio.metrics]\nmine = mine:Mine\n")
    (tmp_path / "site/mine.py").write_text(METRIC.format(factor=1))
    return tmp_path / "site"


def intaglio(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "intaglio", *arguments]
    return subprocess.run(command, env=environment, cwd=site.parent, capture_output=True, text=True, check=False)


def statuses(site: Path) -> list[str]:
    """Run the recipe in a process of its own, in the current folder, and return the status of every step."""
    exit_code = run_forked("run", "recipe.yaml", "--json", site=site, out=Path("stdout"), err=Path("stderr"))
    assert exit_code == 0, Path("stderr").read_text()
    return [step["status"] for step in json.loads(Path("stdout").read_text())["onnxruntime-cpu"]["steps"]]


def test_sensitivity_runs_again_after_its_metric_was_edited(site: Path) -> None:
    save_folder(tiny_dit(), site.parent / "dit")
    (site.parent / "recipe.yaml").write_text(RECIPE)
    assert statuses(site) == ["done", "done"]
    assert statuses(site) == ["hit", "hit"]
    (site / "mine.py").write_text(METRIC.format(factor=2))
    assert statuses(site) == ["hit", "done"]
    metadata = site / "mine-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert statuses(site) == ["hit", "done"]


def test_metrics_and_runtimes_of_intaglio_are_not_part_of_a_key() -> None:
    assert plugin_source(METRICS, "mse") is None
    assert plugin_source(RUNTIMES, "tensorrt-rtx") is None


def test_the_runtime_belongs_to_steps_that_read_the_target_and_metrics_to_sensitivity() -> None:
    steps = ("calibrate", {"sensitivity": {"metrics": {"visual": "edges"}}}, {"assign": {}})
    recipe = Recipe.model_validate({"model": {"path": "m"}, "targets": ["onnxruntime-cpu"], "steps": steps})
    (chain,) = bind(recipe)
    assert {step.name: set(step.plugins) for step in chain.steps} == {
        "calibrate": set(),
        "sensitivity": {(METRICS, "edges"), (METRICS, "condition-swap"), (METRICS, "temporal")},
        "assign": {(RUNTIMES, "onnxruntime")},
    }


@pytest.mark.parametrize("arguments", [("--help",), ("again",)])
def test_two_distributions_with_one_command_are_refused_in_one_sentence(arguments: tuple[str, ...], site: Path) -> None:
    for name in ("first", "second"):
        described = site / f"{name}-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text(f"[{COMMANDS}]\nagain = {name}:again\n")
    ended = intaglio(site, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert (
        ended.stderr == "intaglio: command 'again' is provided twice, by first (first:again) and by second"
        " (second:again): uninstall one of them\n"
    )
