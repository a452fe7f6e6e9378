"""The notebook runs from top to bottom, and what it shows is so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from intaglio.pipeline.artifacts.keys import PLAN, VERIFICATION

SAMPLES = Path(__file__).parents[2] / "samples"
NOTEBOOK = SAMPLES / "tutorial.ipynb"


def code(notebook: Path) -> list[str]:
    """Its code cells, which are Python alone."""
    cells = [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert not [line for cell in cells for line in cell.splitlines() if line.lstrip().startswith(("%", "!"))], "magics"
    return cells


def test_it_is_small_and_says_nothing_of_the_machine_that_ran_it():
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.findall(r"[\s\"'(](?:/\w|[A-Z]:\\\\).*", text)


@pytest.mark.long
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/models").symlink_to(SAMPLES / "models", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "samples")
    cells: dict[str, Any] = {}
    for number, source in enumerate(code(NOTEBOOK), start=1):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), cells)

    made, spared = cells["made"], cells["mine"]
    assert 10 <= sum(scheme.weight_bits == 4 for scheme in made[PLAN].schemes.values()) <= 40
    changed = {n for n, scheme in spared[PLAN].schemes.items() if scheme != made[PLAN].schemes[n]}
    assert len(changed) == 4
    assert made[VERIFICATION].figures.psnr_db + 0.5 < spared[VERIFICATION].figures.psnr_db
    full, compiled = cells["full"], cells["compiled"]
    assert full.shape == (4, 3, 32, 32)
    assert 0 < float((compiled - full).square().mean()) < 0.1 * float(full.var())
    assert cells["grid"].size == (4 * 32 * 3, 2 * 32 * 3)
    assert 0 < cells["error"] < 0.03
    assert {"model.onnx", "plan.json", "manifest.json"} <= {file.name for file in made.folder.iterdir()}
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) +hit$", printed, re.MULTILINE) == ["calibrate", "sensitivity", "assign", "export-float"]
    assert "departures from the manifest: []" in printed
