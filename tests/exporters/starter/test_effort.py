"""A first recipe does as much as the given time allows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio.exporters.starter.effort import EFFORTS, Effort, choose_effort, limited, seconds_of
from intaglio.exporters.starter.found import Found
from intaglio.exporters.starter.starter import look_at, recipe_text
from intaglio.exporters.starter.steps import amounts_of
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.runs.binding import bind


@pytest.fixture
def found(tmp_path):
    save_folder(tiny_dit(), tmp_path / "dit")
    return look_at(str(tmp_path / "dit"), ("onnxruntime-vnni",), tmp_path)


def chosen(found, **changes):
    found = replace(found, cost=replace(found.cost, **changes.pop("cost", {})), **changes)
    return choose_effort(found, lambda effort: amounts_of(found, effort)), found


def test_a_small_model_gets_everything_and_a_large_one_a_choice_of_formats_without_training(found):
    assert chosen(found)[0] == EFFORTS[0]
    assert chosen(found, cost={"operations_per_row": 2e10})[0].updates == 0
    with_formats = [effort for effort in EFFORTS if effort.screened is not None]
    assert chosen(found, cost={"operations_per_row": 1e13})[0] == with_formats[-1]


def test_without_minutes_a_large_model_gets_what_thirty_minutes_allow_on_the_cores_that_are_here(found, monkeypatch):
    def large(operations: float) -> tuple[Found, Effort]:
        made = limited(replace(found, cost=replace(found.cost, operations_per_row=operations)), amounts)
        return made, choose_effort(made, amounts)

    def amounts(effort: Effort) -> Iterator[tuple[str, int]]:
        return amounts_of(found, effort)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    small, _ = large(1e9)
    assert (small.minutes, small.assumed_threads) == (None, None)
    assert "Estimated time" not in recipe_text(small)
    limit, effort = large(2e11)  # 2 s a row
    assert (limit.minutes, limit.assumed_threads, limit.cost.seconds_per_row) == (30, 2, 2)
    assert effort.screened is None
    assert seconds_of(limit, amounts(effort)) <= 30 * 60
    text = recipe_text(limit)
    assert "# Estimated time with 2 CPU threads: " in text
    assert "# it: `intaglio init --minutes` does. Without this option, the limit is 30 minutes." in text
    assert ": formats chosen layer by layer for a quality" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert large(2e11)[0].minutes is None


def test_efforts_take_less_and_less(found):
    found = replace(found, cost=replace(found.cost, seconds_per_row=1.0))
    seconds = [seconds_of(found, amounts_of(found, effort)) for effort in EFFORTS]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == len(seconds)


def test_the_most_that_ends_in_time_is_chosen_and_the_least_if_nothing_does(found):
    for minutes in (1, 10, 60, 600):
        effort, timed = chosen(found, cost={"seconds_per_row": 0.5}, minutes=minutes)
        inside = [each for each in EFFORTS if seconds_of(timed, amounts_of(timed, each)) <= 60 * minutes]
        assert effort == (inside[0] if inside else EFFORTS[-1])
    assert chosen(found, cost={"seconds_per_row": 1e3}, minutes=1)[0] == EFFORTS[-1]


def test_every_effort_is_a_recipe_that_can_be_run(found, tmp_path):
    found = replace(found, cost=replace(found.cost, seconds_per_row=0.5))
    for effort in EFFORTS:
        minutes = seconds_of(found, amounts_of(found, effort)) / 60 + 0.01
        (tmp_path / "recipe.yaml").write_text(recipe_text(replace(found, minutes=minutes)))
        recipe = Recipe.read(tmp_path / "recipe.yaml")
        assert bind(recipe, base=tmp_path)
        assert recipe.steps[0].options["samples"] == effort.calibrated
        assert ("sensitivity" in [step.name for step in recipe.steps]) == (effort.screened is not None)


def test_the_recipe_says_what_more_time_would_add(found):
    found = replace(found, cost=replace(found.cost, seconds_per_row=10.0), minutes=1.0)
    comments = [line for line in recipe_text(found).splitlines() if "minutes" in line]
    assert comments[0].startswith("# Estimated time on this machine: ")
    assert comments[0].endswith("; asked for: 1 minutes.")
    assert comments[1].endswith(": more verified samples")
    assert "formats chosen layer by layer for a quality" in comments[2]
    assert "training" in comments[-1]


def test_without_weights_no_call_is_timed(tmp_path):
    save_folder(tiny_dit(), tmp_path / "dit")
    for file in Path(tmp_path / "dit").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(RecipeError, match="--minutes: without weights no call can be timed: add them"):
        look_at(str(tmp_path / "dit"), ("onnxruntime-vnni",), tmp_path, minutes=5)


def test_without_a_choice_of_formats_convolutions_are_on_integers_in_every_target(tmp_path):
    save_folder(tiny_unet(), tmp_path / "unet")
    for targets, schemes in (
        (("onnxruntime-vnni",), "[w8a8_token, w8a8o8_step]"),
        (("tensorrt-rtx",), "[w8a8_token, w8a8_step]"),
        (("onnxruntime-vnni", "tensorrt-rtx"), "[w8a8_token, w8a8o8_step, w8a8_step]"),
    ):
        found = look_at(str(tmp_path / "unet"), targets, tmp_path, minutes=0)
        assert f"uniform: {{schemes: {schemes}}}" in recipe_text(found)
