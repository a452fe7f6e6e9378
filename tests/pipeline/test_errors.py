"""Messages and exit codes."""

import pytest

from intaglio.pipeline.errors import (
    ContractError,
    IntaglioError,
    MissingExtra,
    RecipeError,
    StepFailed,
    StoreError,
    TargetError,
    did_you_mean,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(RecipeError, 2), (ContractError, 3), (TargetError, 4), (StepFailed, 5), (StoreError, 6), (MissingExtra, 7)],
)
def test_each_error_has_its_exit_code(kind: type[IntaglioError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, IntaglioError)


def test_one_problem_is_a_sentence_and_more_are_a_numbered_list() -> None:
    assert str(RecipeError("a")) == "a"
    assert str(RecipeError("a", "b")) == "2 problems:\n  1. a\n  2. b"


def test_a_missing_extra_names_the_command() -> None:
    error = MissingExtra("rtx", "building for tensorrt-rtx")
    assert str(error) == "building for tensorrt-rtx needs the extra 'rtx': pip install 'intaglio[rtx]'"
    assert MissingExtra.together([*error.problems, "b"]).exit_code == 7


def test_did_you_mean() -> None:
    assert did_you_mean("asign", ["assign", "merge"]) == ": did you mean 'assign'?"
    assert did_you_mean("zzz", ["merge", "assign"]) == ": known are assign, merge"
    assert did_you_mean("zzz", []) == ": none is known"
    assert did_you_mean("PLAM", ["Plan", "merge"]) == ": did you mean 'Plan'?"
    assert did_you_mean("zzz", [f"{n:02}" for n in range(30)]).endswith("22, 23 and 6 more")
