"""Every pass makes, from the same input, what it made before; if it no longer does, its version has risen.

    python tests/test_golden.py      # write golden.json anew, after the versions of the passes that changed were raised

The digests are those of torch without AVX and of one thread, so that they do not depend on the processor.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio import Recipe, bind

GOLDEN = Path(__file__).with_name("golden.json")
ONE_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
STEPS = """
- calibrate: {samples: 2}
- sensitivity: {buckets: 1, rows: 2, samples: 2, drift_below_db: 0}
- assign: {budget: {size: 0.45}}
- balance
- distill: {updates: 2, samples: 2, rank: 2}
- merge
- export-float
- export-qdq
- lint
"""
MODELS = {"dit": tiny_dit, "unet": tiny_unet}
TARGETS = ("onnxruntime-cpu", "tensorrt-rtx")


def recipe_of(folder: Path, model: str) -> Recipe:
    save_folder(MODELS[model](), folder / "model")
    return Recipe.model_validate(
        {
            "model": {"path": "model", "sampling_steps": 2, "guidance": 2.0},
            "targets": list(TARGETS),
            "steps": yaml.safe_load(STEPS),
        }
    )


def made(folder: Path, model: str) -> dict[str, dict[str, dict[str, object]]]:
    """Target -> step -> its version, and the digest of each artifact that it made."""
    recipe = recipe_of(folder, model)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "intaglio", "run", "recipe.yaml", "--store", "store", "--out", "out"]
    subprocess.run(command, cwd=folder, env={**os.environ, **ONE_CPU}, check=True, capture_output=True)
    found = {}
    for chain in bind(recipe, base=folder):
        versions = {step.name: type(step.configured).version for step in chain.steps}
        steps = json.loads((folder / "out" / chain.target.name / "manifest.json").read_text())["steps"]
        found[chain.target.name] = {
            each["step"]: {"version": versions[each["step"]], **each["outputs"]} for each in steps
        }
    return found


@pytest.mark.parametrize("model", MODELS)
def test_equal_inputs_give_equal_artifacts_or_the_version_of_the_pass_has_risen(model: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[model]
    assert made(tmp_path, model) == golden


def write() -> None:
    """Write golden.json anew."""
    found = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = made(Path(folder), model)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
