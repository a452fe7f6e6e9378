"""The YAML of a recipe, and what the command line changes in it."""

import re
from pathlib import Path

import pytest

from intaglio import Recipe, Step, bind
from intaglio.pipeline.errors import RecipeError

TEXT = """
model: {path: models/dit, sampling_steps: 8}
targets: [onnxruntime-cpu]
seed: 3
steps:
  - calibrate
  - assign: {budget: {size: 0.5}}
  - ./my.py:KeepFirst
  - {uses: verify, name: verify-again, options: {samples: 4}}
"""


def test_the_three_spellings_of_a_step() -> None:
    recipe = Recipe.parse(TEXT)
    assert recipe.steps == (
        Step(name="calibrate", uses="calibrate"),
        Step(name="assign", uses="assign", options={"budget": {"size": 0.5}}),
        Step(name="keep-first", uses="./my.py:KeepFirst"),
        Step(name="verify-again", uses="verify", options={"samples": 4}),
    )
    assert (recipe.model.path, recipe.model.sampling_steps, recipe.seed) == ("models/dit", 8, 3)


def test_a_string_is_the_path_of_the_model() -> None:
    assert Recipe.parse("{model: models/dit, targets: [a], steps: [b]}").model.path == "models/dit"


def test_yaml_reads_back() -> None:
    recipe = Recipe.parse(TEXT)
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_every_problem_of_the_text_is_listed() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("{model: m, target: [a], seed: many, steps: [[], calibrate]}", source="r.yaml")
    assert [problem.split(":")[1].strip() for problem in caught.value.problems] == [
        "targets",
        "seed",
        "steps.0",
        "target",
    ]
    assert "r.yaml: target: no such option: did you mean 'targets'?" in caught.value.problems


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("{path: m, guidanse: 2}", "model.guidanse: no such option: did you mean 'guidance'"),
        ("{path: m, loras: [{path: a, scal: 1}]}", "model.loras.0.scal: no such option: did you mean 'scale'"),
    ],
)
def test_options_at_any_depth_are_guessed(model: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(problem)):
        Recipe.parse(f"{{model: {model}, targets: [a], steps: [b]}}")


def test_options_of_a_pass_are_guessed_at_any_depth() -> None:
    options = "{budget: {sice: 1}, schemes: {conv: [w8a8_stepp]}}"
    with pytest.raises(RecipeError) as caught:
        bind(Recipe.parse(f"{{model: m, targets: [onnxruntime-cpu], steps: [{{assign: {options}}}]}}"))
    assert caught.value.problems == (
        "assign: budget.sice: no such option: did you mean 'size'?",
        "assign: schemes.conv.0: no scheme 'w8a8_stepp': did you mean 'w8a8_step'? (got 'w8a8_stepp')",
    )


def test_a_list_with_a_wrong_item_is_not_called_too_short_as_well() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("{model: m, targets: [1], steps: [[]]}")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("model", "options", "problem"),
    [
        ("{path: m, sampling_steps: true}", "", "recipe: model.sampling_steps: Input should be a number (got true)"),
        (
            "{path: m, loras: [{path: l, scale: no}]}",
            "",
            "recipe: model.loras.0.scale: Input should be a number (got false)",
        ),
        ("m", "assign: {budget: {size: yes}}", "assign: budget.size: Input should be a number (got true)"),
        ("m", "sensitivity: {rows: on}", "sensitivity: rows: Input should be a number (got true)"),
    ],
)
def test_true_and_false_are_no_numbers(model: str, options: str, problem: str) -> None:
    text = f"{{model: {model}, targets: [onnxruntime-cpu], steps: [calibrate, {{{options}}}]}}"
    with pytest.raises(RecipeError, match=re.escape(problem)):
        bind(Recipe.parse(text if options else text.replace(", {}", "")))


@pytest.mark.parametrize("text", ["", "just words", "{a: ["])
def test_what_is_no_recipe_is_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe: "):
        Recipe.parse(text)


def test_a_missing_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        Recipe.read(tmp_path / "none.yaml")


def test_a_file_that_is_no_text_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model: \xc3(")
    with pytest.raises(RecipeError, match=r"r\.yaml: is not text in UTF-8: invalid continuation byte at byte 7"):
        Recipe.read(tmp_path / "r.yaml")


def test_insert_and_options_give_new_recipes() -> None:
    recipe = Recipe.parse(TEXT)
    longer = recipe.insert(Step.model_validate("report"), after="assign")
    assert [step.name for step in longer.steps] == ["calibrate", "assign", "report", "keep-first", "verify-again"]
    changed = recipe.with_option("assign", ("budget", "size"), 0.3).with_option("assign", ("keep",), ["a"])
    assert changed.steps[1].options == {"budget": {"size": 0.3}, "keep": ["a"]}
    assert recipe == Recipe.parse(TEXT)


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(RecipeError, match="no step 'asign' in the recipe: did you mean 'assign'"):
        Recipe.parse(TEXT).insert(Step.model_validate("report"), after="asign")
