"""A run with --minutes computes as much as ends in time, and what the recipe says stays."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_folder, tiny_dit
from typer.testing import CliRunner

from intaglio import Recipe
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.model import cost as cost_module
from intaglio.pipeline.model.cost import ModelCost
from intaglio.pipeline.runs.effort import A_LAYER_S, START_S, choose_effort, estimated_s
from intaglio.pipeline.runs.manifest import Manifest

ESTIMATED = r"estimated time on this machine: (1 minute|[2-9] minutes|\d\d+ minutes)"
TEXT = """
model: {path: model, sampling_steps: 2, guidance: 2.0}
targets: [onnxruntime-cpu, onnxruntime-vnni]
steps:
  - calibrate: {samples: 3}
  - uniform: {schemes: [w8a8_token, w8a8_step]}
  - distill
  - merge
  - export-float
  - export-qdq
  - onnxruntime
  - verify: {rows: 2, gap_db_tolerance: 60}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that gives the samples of calibration; a row of its model takes a tenth of a second."""
    save_folder(tiny_dit(), tmp_path / "model")
    measured = cost_module.measure_cost
    monkeypatch.setattr(cost_module, "measure_cost", lambda model: replace(measured(model), seconds_per_row=0.1))
    return Recipe.parse(TEXT)


def test_the_largest_amounts_that_end_in_time_are_chosen_and_given_ones_stay(recipe, tmp_path):
    every = choose_effort(recipe, 1e6, tmp_path)
    assert every.taken.amounts == {"distill.updates": 120, "verify.samples": 32}
    assert (every.more, every.given) == ([], {"calibrate.samples": 3})
    least = choose_effort(recipe, 0, tmp_path)
    assert least.taken.amounts == {"distill.updates": 0, "verify.samples": 1}
    assert [each.amounts["verify.samples"] for each in least.more] == [2, 8, 16, 32, 32]
    seconds = [least.taken.seconds, *(each.seconds for each in least.more)]
    assert seconds == sorted(set(seconds))
    for effort in least.more:
        assert choose_effort(recipe, effort.seconds / 60 + 1e-9, tmp_path).taken.amounts == effort.amounts
    assert next(step for step in least.taken.recipe.steps if step.name == "calibrate").options == {"samples": 3}


def test_the_lines_say_what_was_chosen_what_stays_and_what_more_time_buys(recipe, tmp_path):
    least = choose_effort(recipe, 0, tmp_path)
    first, too_long, given, *more = least.lines()
    assert re.fullmatch(rf"{ESTIMATED}, with --set distill\.updates=0 --set verify\.samples=1", first)
    assert too_long == "these are the smallest amounts; they take longer than the 0 minutes of --minutes"
    assert given == "amounts that the recipe gives are not changed: calibrate.samples=3"
    assert more[0] == f"with --minutes {least.more[0].minutes}, the run would use verify.samples=2"
    assert (
        more[-1] == f"with --minutes {least.more[-1].minutes}, the run would use distill.updates=120, verify.samples=32"
    )


def test_steps_that_read_the_target_count_for_each_target(recipe, tmp_path):
    from intaglio import bind

    cost = ModelCost(layers=10, steps=2, rows_per_sample=2, seconds_per_row=1.0)
    steps = recipe.with_option("distill", ("updates",), 0).with_option("verify", ("samples",), 5)
    once, verified = 2 * 3 * 2 + (2 * 4 + 1), 3 * 2 * 5 * 2  # calibrated and exported
    for targets in (recipe.targets[:1], recipe.targets):
        chains = bind(steps.model_copy(update={"targets": targets}), base=tmp_path)
        rows, count = once + len(targets) * verified, len(targets)
        assert estimated_s(chains, cost, 0) == pytest.approx(1.6 * rows + START_S + 10 * A_LAYER_S * count)


def test_a_recipe_that_gives_every_amount_leaves_nothing_to_choose(recipe, tmp_path):
    given = recipe.with_option("distill", ("updates",), 0).with_option("verify", ("samples",), 2)
    choice = choose_effort(given, 5, tmp_path)
    assert (choice.taken.recipe, choice.more) == (given, [])
    first, second = choice.lines()
    assert re.fullmatch(f"{ESTIMATED}, with the recipe's own amounts", first)
    assert (
        second
        == "amounts that the recipe gives are not changed: calibrate.samples=3, distill.updates=0, verify.samples=2"
    )


def test_the_same_recipe_and_minutes_get_the_same_choice_on_a_machine_that_is_slower_by_then(
    recipe, tmp_path, store, monkeypatch
):
    more = choose_effort(recipe, 0, tmp_path).more[1]
    minutes = more.seconds / 60 + 1e-9
    first = choose_effort(recipe, minutes, tmp_path, store)
    assert (first.taken.amounts, first.repeated) == (more.amounts, False)
    quick = cost_module.measure_cost
    monkeypatch.setattr(cost_module, "measure_cost", lambda model: replace(quick(model), seconds_per_row=1.0))
    assert choose_effort(recipe, minutes, tmp_path).taken.amounts["verify.samples"] < more.amounts["verify.samples"]
    again = choose_effort(recipe, minutes, tmp_path, store)
    assert (again.taken.amounts, again.repeated) == (more.amounts, True)
    assert "its stored steps are used again" in [*again.lines()][1]
    assert not choose_effort(recipe, minutes + 1, tmp_path, store).repeated
    for file in (store.root / "chosen").iterdir():
        file.write_text("[" * 100_000)
    assert not choose_effort(recipe, minutes, tmp_path, store).repeated


def test_the_command_runs_what_was_chosen(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT.replace("onnxruntime-cpu, onnxruntime-vnni", "onnxruntime-cpu"))
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "--minutes", "0", "--out", "out"])
    assert result.exit_code == 0, result.output
    run = Recipe.read(tmp_path / "out" / "onnxruntime-cpu" / "recipe.yaml")
    options = {step.name: step.options for step in run.steps}
    assert options["verify"]["samples"] == 1
    assert options["distill"]["updates"] == 0
    assert options["calibrate"]["samples"] == 3
    assert Manifest.read(tmp_path / "out" / "onnxruntime-cpu")
