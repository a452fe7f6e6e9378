"""Two compiled folders are held against each other: what differs is what the artifacts say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser
from reporting import LAYERS, Page, artifacts
from typer.testing import CliRunner, Result

from intaglio.exporters.report.report import WriteReport
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, REPORT, SENSITIVITY, TARGET, VERIFICATION
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.runs.manifest import DeliveredStep, Manifest
from intaglio.pipeline.runs.store import Store

RECIPE = "model: m\nseed: {}\n"
LAYER = LAYERS[1].name


def delivered(root: Path, name: str, store: Store, seed: int = 0, *, worse: bool = False) -> Path:
    """A folder as a run leaves it; `worse`: one layer in float, samples further off, another torch."""
    made = artifacts(root / "models" / name)
    if worse:
        made[PLAN] = made[PLAN].replace({LAYER: FLOAT})
        verification = made[VERIFICATION]
        samples = {**verification.samples, "deployed": verification.samples["deployed"] + 0.125}
        parity = {**verification.layers, LAYER: replace(verification.layers[LAYER], rel_l2=8.2e-7)}
        figures = replace(verification.figures, psnr_db=24.0)
        made[VERIFICATION] = replace(verification, samples=samples, layers=parity, figures=figures)
    made[REPORT] = WriteReport().run(State(made, reader="report"), Context(root))[REPORT]
    folder = root / name / "onnxruntime-cpu"
    folder.mkdir(parents=True)
    for key in (PLAN, REPORT):
        made[key].save(folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(seed))
    digests = {key.name: store.put(made[key], staging="x") for key in (MODEL, TARGET, SENSITIVITY, VERIFICATION)}
    start = {key: digests.pop(key) for key in ("MODEL", "TARGET")}
    step = DeliveredStep(step="verify", origin="x", key="0" * 64, outputs=digests)
    versions = {"torch": "2.12.0" if worse else "2.13.0", "onnx": "1.0"}
    Manifest(files={}, seed=seed, start=start, steps=(step,), versions=versions).write(folder)
    return folder


@pytest.fixture
def both(tmp_path: Path, store: Store) -> tuple[Path, Path]:
    return delivered(tmp_path, "a", store), delivered(tmp_path, "b", store, 7, worse=True)


def diff(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)], env={"COLUMNS": "200"})


def test_all_that_differs_is_there_as_json(both: tuple[Path, Path], store: Store) -> None:
    result = diff(*both, "--store", store.root, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert found["figures"]["psnr_db"] == {"a": 31.42, "b": 24.0, "delta": 24.0 - 31.42}
    assert found["figures"]["engine.low_precision_products"]["delta"] == 0
    assert found["model"] == []
    assert list(found["schemes"]) == [LAYER]
    assert (found["schemes"][LAYER]["a"], found["schemes"][LAYER]["b"]) == ("w8a8_token", "float")
    assert found["schemes"][LAYER]["bytes"]["delta"] == 2 * (64 * 64 + 64) - (64 * 64 + 8 * 64)
    assert found["parity_rel_l2"][LAYER] == {"a": 4.1e-7, "b": 8.2e-7, "delta": 4.1e-7}
    assert found["sensitivity_mse"][LAYER] == {"a": 2e-3 + 3 * 3e-5, "b": 0.0, "delta": -(2e-3 + 3 * 3e-5)}
    assert found["recipe"][-2:] == ["-seed: 0", "+seed: 7"]
    assert found["versions"] == {"torch": {"a": "2.13.0", "b": "2.12.0"}}


def test_runs_are_compared_target_by_target(both: tuple[Path, Path], store: Store) -> None:
    table = diff(*(folder.parent for folder in both), "--store", store.root).stdout
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert "PSNR, dB 31.4 24 −7.42 worse" in rows  # noqa: RUF001 - as figures are set
    assert "low-precision products 3 3 0 same" in rows
    assert f"{LAYER}, scheme w8a8_token float" in rows


def test_the_page_shows_both(both: tuple[Path, Path], store: Store, tmp_path: Path) -> None:
    assert diff(*both, "--store", store.root, "--out", "diff.html").exit_code == 0
    page = Page((tmp_path / "diff.html").read_text("utf-8"))
    sheets = page.found("samples-1", "img")
    assert [sheet["alt"].partition(",")[0] for sheet in sheets[:4]] == [
        *("Full precision", "A deployed", "B deployed", "B deployed − A deployed"),  # noqa: RUF001 - a minus sign
    ]
    assert [sheet.get("class") for sheet in sheets[:3]] == [None, "left", "right"]
    assert "The same 4 seeds" in page.text("samples-1")
    assert "1 of 5 layers that both have" in page.text("layers-1")
    assert "size" not in page.text("recipe-1")
    assert "+seed: 7" in page.text("recipe-1")
    assert "worse" in page.text("parity-1")


def test_without_the_store_the_folders_are_enough(both: tuple[Path, Path], tmp_path: Path) -> None:
    assert diff(*both, "--store", "elsewhere", "--out", "diff.html").exit_code == 0
    page = Page((tmp_path / "diff.html").read_text("utf-8"))
    assert "At least one of the two runs has no verification in the store" in page.text("parity-1")
    assert page.found("samples-1", "img")[1]["alt"] == "A deployed, 1 samples"


def test_other_models_are_named_and_compared(both: tuple[Path, Path], store: Store) -> None:
    folder = both[1]
    plan = json.loads((folder / "plan.json").read_text())
    plan["layers"][0]["name"] = "stem"
    plan["layers"][1]["shape"] = [32, 64]
    (folder / "plan.json").write_text(json.dumps(plan))
    manifest = Manifest.read(folder)
    manifest.model_copy(update={"start": {**manifest.start, "MODEL": "f" * 64}}).write(folder)
    (found,) = json.loads(diff(*both, "--store", store.root, "--json").stdout)
    assert found["model"][0].startswith("model, sha256: ")
    assert found["model"][1:] == [
        "1 layers in A alone, such as pos_embed.proj",
        "1 layers in B alone, such as stem",
        f"1 layers of another shape, such as {LAYER}",
    ]
    assert found["figures"]["psnr_db"]["b"] == 24.0


def test_what_cannot_be_compared_is_one_message(both: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nothing = diff(both[0], tmp_path / "empty")
    assert nothing.exit_code == 2
    assert "empty: no manifest.json in it or below" in nothing.stderr
    for name in ("tensorrt-10", "tensorrt-11"):
        other = tmp_path / "other" / name
        other.mkdir(parents=True)
        Manifest.read(both[0]).write(other)
    none = diff(both[0], tmp_path / "other")
    assert none.exit_code == 2
    assert "no target is in both" in none.stderr


def test_the_page_fits_a_phone(both: tuple[Path, Path], store: Store, tab: Browser) -> None:
    assert diff(*both, "--store", store.root, "--out", "diff.html").exit_code == 0
    for dark in (False, True):
        tab.show(Path("diff.html"), 420, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") == 420
        assert tab.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
    assert tab.problems == []


def test_samples_from_another_start_are_said_not_to_pair(tmp_path: Path, store: Store) -> None:
    folder = delivered(tmp_path, "a", store)
    other = delivered(tmp_path, "b", store)
    made = artifacts(tmp_path / "models" / "c")[VERIFICATION]
    moved = replace(made, samples={name: x.neg() for name, x in made.samples.items()})
    manifest = Manifest.read(other)
    step = manifest.steps[0]
    digests = {**step.outputs, "VERIFICATION": store.put(moved, staging="x")}
    steps = (step.model_copy(update={"outputs": digests}),)
    manifest.model_copy(update={"steps": steps}).write(other)
    assert diff(folder, other, "--store", store.root, "--out", "diff.html").exit_code == 0
    samples = Page((tmp_path / "diff.html").read_text("utf-8")).text("samples-1")
    assert "4 samples of each" in samples
    assert "The full-precision samples differ" in samples
