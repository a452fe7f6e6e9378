"""The whole product on a tiny model: from the command to a folder of checked files, and through kills."""

import json
import signal
import time
from pathlib import Path

import pytest
from forked import run_forked, start_forked
from quantizing import HALF_TOLERANCE
from tiny import save_folder, tiny_dit, tiny_unet
from typer.testing import CliRunner

from intaglio.pipeline.cli.app import app

STEPS = """
  - calibrate: {samples: 8}
  - sensitivity: {buckets: 1, rows: 2, samples: 2, drift_below_db: 0}
  - assign: {budget: {size: %s}}
  - distill: {updates: 20, samples: 4, rank: 4}
  - merge
  - export-float
  - export-qdq
  - onnxruntime
  - tensorrt
  - verify: {samples: 4, rows: 4, gap_db_tolerance: 3.0}
  - benchmark: {rounds: 2}
  - report
"""
FIGURES = {
    *("layers_total", "layers_quantized", "weight_bits_mean", "size_bytes", "size_ratio_fp16", "latency_ratio_fp32"),
    *("psnr_db", "sqnr_db", "parity_layer_rel_l2_max", "parity_rel_l2", "fidelity_gap_db", "engine"),
}


def write_recipe(folder: Path, model: object, targets: str, budget: float) -> Path:
    save_folder(model, folder / "model")  # type: ignore[arg-type]  # tests only
    recipe = folder / "recipe.yaml"
    head = "model: {path: model, sampling_steps: 4, guidance: 2.0}\n"
    recipe.write_text(head + f"targets: [{targets}]\nsteps:{STEPS % budget}")
    return recipe


def digests(out: Path) -> dict[str, dict[str, str]]:
    """Step -> digest of what it made, for all that does not hold a measured time."""
    steps = json.loads((out / "manifest.json").read_text())["steps"]
    return {s["step"]: s["outputs"] for s in steps if s["step"] not in ("benchmark", "report")}


def test_a_unet_compiles_for_both_runtimes(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    recipe = write_recipe(tmp_path, tiny_unet(), "onnxruntime-cpu, tensorrt-rtx", 0.6)
    exit_code = run_forked("run", str(recipe), "--out", "out", site=tmp_path, out=Path("stdout"), err=Path("stderr"))
    assert exit_code == 0, Path("stderr").read_text()
    shown = json.loads(CliRunner().invoke(app, ["show", "out", "--json"]).stdout)
    assert set(shown) == {"onnxruntime-cpu", "tensorrt-rtx"}
    for target, figures in shown.items():
        check_figures(target, figures)
    plan = json.loads((tmp_path / "out/tensorrt-rtx/plan.json").read_text())["layers"]
    integer = sum(layer["scheme"].startswith("w8a8") for layer in plan)
    assert shown["tensorrt-rtx"]["engine"]["low_precision_products"] == integer


def test_a_transformer_compiles_and_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    recipe = write_recipe(tmp_path, tiny_dit(), "onnxruntime-cpu", 0.45)
    here = CliRunner()  # what is killed needs a process of its own, the other runs do not
    done = here.invoke(app, ["run", str(recipe), "--out", "out", "--store", "store-a"])
    assert done.exit_code == 0, done.output
    check_figures("onnxruntime-cpu", json.loads(Path("out/onnxruntime-cpu/metrics.json").read_text()))
    arguments = ("run", str(recipe), "--out", "broken", "--store", "store-b")
    process = start_forked(*arguments, site=tmp_path, out=Path("stdout"), err=Path("stderr"))
    while process.is_alive() and not scratch_of("export-float", Path("store-b")):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not Path("broken").exists()
    resumed = here.invoke(app, ["run", str(recipe), "--out", "broken", "--store", "store-b"])
    assert resumed.exit_code == 0, resumed.output
    assert digests(Path("broken/onnxruntime-cpu")) == digests(Path("out/onnxruntime-cpu"))


def check_figures(target: str, figures: dict) -> None:
    assert set(figures) >= FIGURES
    assert figures["parity_layer_rel_l2_max"] <= (HALF_TOLERANCE if target == "tensorrt-rtx" else 1e-4)
    assert figures["layers_quantized"] == figures["layers_total"]
    assert Path("out", target, figures["engine"]["path"]).is_file()
    assert figures["engine"]["low_precision_products"] > 0
    assert Path("out", target, "report.html").stat().st_size < 5_000_000


def scratch_of(step: str, store: Path) -> bool:
    """Return True if the run is inside this step: the store has the records of the steps before it."""
    order = ["calibrate", "sensitivity", "assign", "distill", "merge", "export-float", "export-qdq", "onnxruntime"]
    return len(list((store / "runs").glob("*.json"))) == [*order, "verify"].index(step)
