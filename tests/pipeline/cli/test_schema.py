"""The JSON schema takes the recipes that run, and refuses what a recipe would be refused for."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from intaglio.pipeline.cli.app import app
from intaglio.pipeline.cli.schema import recipe_schema

SAMPLES = sorted((Path(__file__).parents[3] / "samples").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def recipe(**changes: object) -> dict[str, object]:
    return {"model": "m", "targets": ["onnxruntime-cpu"], "steps": ["calibrate"], **changes}


def test_every_sample_fits(validator: Any) -> None:
    assert len(SAMPLES) >= 5
    for path in SAMPLES:
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "step",
    [
        "calibrate",
        {"calibrate": None},
        {"assign": {"budget": {"size": 0.5}, "profile": "times.json"}},
        {"assign": {"profile": ["times.json", "other.json"]}},
        "./mine.py:KeepFirst",
        {"./mine.py:KeepFirst": {"anything": 1}},
        {"package.module:KeepFirst": {}},
        {"uses": "verify", "name": "again", "options": {"samples": 4}},
        {"uniform": {"schemes": ["w4a8_token"]}},
    ],
)
def test_each_spelling_of_a_step_fits(step: object, validator: Any) -> None:
    """The validator would raise for a step that does not fit."""
    validator.validate(recipe(steps=[step]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": ["calibrat"]},
        {"steps": []},
        {"steps": [{"calibrate": {"sample": 4}}]},
        {"steps": [{"calibrate": {"samples": 0}}]},
        {"steps": [{"assign": {"budget": {"size": 2}}}]},
        {"steps": [{"assign": {"budget": {"sice": 0.5}}}]},
        {"steps": [{"assign": {"schemes": {"linear": ["w3a3"]}}}]},
        {"steps": [{"calibrate": {}, "merge": {}}]},
        {"steps": ["uniform"]},
        {"steps": [{"uses": "verify", "options": {"sample": 4}}]},
        {"steps": [{"name": "again"}]},
        {"targets": ["tensorrt-9"]},
        {"targets": []},
        {"model": {"path": "m", "guidance": 0.5}},
        {"model": {"sampling_steps": 4}},
        {"sead": 1},
    ],
)
def test_what_is_no_recipe_does_not_fit(wrong: dict[str, object], validator: Any) -> None:
    assert not validator.is_valid(recipe(**wrong))


def test_the_command_prints_it_or_writes_it_and_says_how_it_is_used(validator: Any, tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["schema"]).stdout
    written = CliRunner().invoke(app, ["schema", "--out", "recipe.schema.json"]).stdout
    assert "# yaml-language-server: $schema=recipe.schema.json" in written
    assert (tmp_path / "recipe.schema.json").read_text() == printed
    assert json.loads(printed) == validator.schema
