"""Every name there is has an explanation, as text and for machines."""

import json

import pytest
from typer.testing import CliRunner

from intaglio.pipeline.cli.app import app
from intaglio.pipeline.cli.explain import explain, names_by_kind
from intaglio.pipeline.errors import RecipeError


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_every_name_is_explained() -> None:
    for kind, names in names_by_kind().items():
        assert len(names) >= 5, kind
        for name in names:
            (found,) = explain(name)
            assert found.doc.strip(), name
            assert json.dumps(found.to_json())
            assert next(found.lines()) == f"{name}: {found.kind}"


def test_a_pass_has_its_options_at_every_depth_with_what_they_are() -> None:
    lines = said("assign").splitlines()
    assert "    budget.size: float | None = None  bytes, relative to fp16" in lines
    assert "provides     FRONT, PLAN" in lines
    uniform = said("uniform").splitlines()
    assert "    schemes: tuple[str, ...] required  names of schemes, the most wanted first" in uniform


def test_a_scheme_says_how_it_rounds_and_what_runs_it() -> None:
    facts = json.loads(said("w4a8_token", "--json"))["scheme"]["facts"]
    assert facts["weight"].startswith("4 bits; 4.125 with the scales of groups of 64; Two levels of scales, w: (N, K)")
    assert facts["input"].startswith("8 bits; One scale for each token, x: (..., K) -> scale: (..., 1)")
    assert list(facts["runs on"]) == ["linear"]
    assert "tensorrt-rtx" in facts["runs on"]["linear"]
    assert "tensorrt-10.3-orin" not in facts["runs on"]["linear"]
    assert json.loads(said("w8a8o8_step", "--json"))["scheme"]["facts"]["runs on"] == {
        "conv": ["onnxruntime-avx2", "onnxruntime-cpu", "onnxruntime-vnni"]
    }


def test_a_rule_says_what_to_do_and_why() -> None:
    shown = said("shared-zero-point")
    assert "fix          give each weight a zero point of its own" in shown
    assert "why          with session.x64quantprecision=1" in shown


def test_an_artifact_says_who_makes_and_who_reads_it() -> None:
    (sensitivity,) = explain("SENSITIVITY")
    assert sensitivity.facts["provided by"] == ["sensitivity"]
    assert "assign" in sensitivity.facts["required by"]
    (workload,) = explain("WORKLOAD")
    assert "assign" in workload.facts["wanted by"]


def test_a_target_is_shown_as_by_targets() -> None:
    assert said("tensorrt-rtx") == CliRunner().invoke(app, ["targets", "tensorrt-rtx"]).stdout


def test_a_pass_of_a_file_is_explained() -> None:
    assert said("toys:Append").startswith("toys:Append: pass\n\nRefines NUMBERS.\n")


def test_without_a_name_the_names_are_listed() -> None:
    assert "schemes: float, w8a8_token" in said()
    assert json.loads(said("--json")) == names_by_kind()


@pytest.mark.parametrize(
    ("name", "near"), [("calibrat", "calibrate"), ("plan", "PLAN"), ("w8a8_tokn", "w8a8_token"), ("opsett", "opset")]
)
def test_an_unknown_name_is_guessed(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"nothing is called '{name}': did you mean '{near}'"):
        explain(name)
