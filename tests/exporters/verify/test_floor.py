"""A run whose samples are below the floor ends well, and its summary, its report and `show` say so."""

import json
from pathlib import Path

import pytest
from reporting import Page
from tiny import save_folder, tiny_dit
from typer.testing import CliRunner, Result

from intaglio import Store
from intaglio.exporters.verify.verify import Verify
from intaglio.pipeline.artifacts.keys import VERIFICATION
from intaglio.pipeline.artifacts.verification import Verification
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.runs.publish import made_from

RECIPE = """
model: {path: model, sampling_steps: 3, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 4}
  - uniform: {schemes: [w8a8_token, w8a8_step]}
  - distill: {updates: 0}
  - merge
  - export-float
  - export-qdq
  - verify: {samples: 4, rows: 2, gap_db_tolerance: 6.0}
  - report
"""
FOUR_BITS = "uniform.schemes=[w4a4_token, w4a4_step]"
FOUND = (
    "the deployed samples have an SQNR of 4.5 dB, below the floor of 20 dB (verify.floor_db), so they differ much"
    " from the model's. To raise the quality, "
)
WARNING = (
    f"{FOUND}let the steps sensitivity and assign choose formats: `intaglio init` writes them, with enough --minutes"
)
MEASURED = (
    f"{FOUND}allow more in assign.budget, list w8a16 in sensitivity.schemes and assign.schemes, or set"
    " assign.budget.psnr"
)


def intaglio(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    return result


class Runs:
    """A tiny DiT whose runs share a store; each result is kept by the name of its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_folder(tiny_dit(), root / "model")
        (root / "recipe.yaml").write_text(RECIPE)

    def run(self, name: str, *options: str) -> Result:
        where = ("--out", self.root / name, "--store", self.root / "store")
        return intaglio("run", self.root / "recipe.yaml", *where, *options)

    def folder(self, name: str) -> Path:
        return self.root / name / "onnxruntime-cpu"

    def verification(self, name: str) -> Verification:
        return made_from(self.folder(name), Store(self.root / "store"), VERIFICATION)

    def page(self, name: str) -> Page:
        return Page((self.folder(name) / "report.html").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`bad` in 4 bits, inputs too, and `fine` in 8 bits."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    made.run("fine")
    made.run("bad", "--set", FOUR_BITS)
    return made


def test_the_verification_keeps_the_warning(runs: Runs) -> None:
    assert runs.verification("bad").warnings == (WARNING,)
    assert runs.verification("bad").figures.sqnr_db == pytest.approx(4.5, abs=0.05)
    assert runs.verification("fine").warnings == ()
    assert runs.verification("fine").figures.sqnr_db > 20


def test_where_formats_were_measured_the_advice_is_about_the_choice(runs: Runs) -> None:
    amounts = ("--set", "sensitivity.buckets=1", "--set", "sensitivity.rows=2", "--set", "sensitivity.samples=2")
    runs.run("measured", "--set", FOUR_BITS, "--insert", "after:calibrate=sensitivity", *amounts)
    assert runs.verification("measured").warnings == (MEASURED,)


def test_the_summary_ends_with_the_warning_also_where_every_step_is_in_the_store(runs: Runs) -> None:
    again = runs.run("bad", "--set", FOUR_BITS)
    assert again.stdout.splitlines()[1:] == [f"onnxruntime-cpu: WARNING: {WARNING}"]
    figures = json.loads(runs.run("bad", "--set", FOUR_BITS, "--json").stdout)
    assert figures["onnxruntime-cpu"]["warnings"] == [WARNING]
    assert "WARNING" not in runs.run("fine").stdout
    assert json.loads(runs.run("fine", "--json").stdout)["onnxruntime-cpu"]["warnings"] == []


def test_the_warning_is_at_the_head_of_the_report_in_words(runs: Runs) -> None:
    page = runs.page("bad")
    assert f"Warning {WARNING}." in page.text("")  # above the tiles and all sections
    assert len(page.found("", "p", "^warning$")) == 1
    assert not runs.page("fine").found("", "p", "warning")
    assert "verify.floor_db" not in runs.page("fine").text("")


def test_show_prints_the_warning_below_the_metrics(runs: Runs) -> None:
    shown = intaglio("show", runs.root / "bad").stdout
    assert shown.splitlines()[-1] == f"onnxruntime-cpu: WARNING: {WARNING}"
    assert shown.count(WARNING) == 1
    assert json.loads(intaglio("show", runs.root / "bad", "--json").stdout)["onnxruntime-cpu"]["warnings"] == [WARNING]
    assert "WARNING" not in intaglio("show", runs.root / "fine").stdout


def test_the_recipe_says_another_floor(runs: Runs) -> None:
    low = runs.run("low", "--set", FOUR_BITS, "--set", "verify.floor_db=3")
    assert "WARNING" not in low.stdout
    high = runs.run("high", "--set", "verify.floor_db=30")
    assert "below the floor of 30 dB (verify.floor_db)" in high.stdout


@pytest.mark.parametrize(("target", "scheme"), [("onnxruntime-cpu", "w8a16"), ("tensorrt-10.3-orin", "float")])
def test_the_advice_names_a_scheme_that_the_target_executes(target: str, scheme: str) -> None:
    (warning,) = Verify()._low(19.9, load_target(target), measured=True)
    assert f"list {scheme} in sensitivity.schemes and assign.schemes" in warning
    assert Verify()._low(20.0, load_target(target), measured=True) == ()
