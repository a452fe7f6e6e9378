"""Every pass makes, from the same input, what it made before; if it no longer does, its version has risen.

    python tests/test_golden.py      # write golden.json anew, after the versions of the passes that changed were raised

The digests are those of torch and MKL with the instructions that all processors have, and of one thread. Makers of
processors may still differ in them: the numbers of a model are a digest too, and without these numbers no digest is
compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio import Recipe, bind

GOLDEN = Path(__file__).with_name("golden.json")
ONE_CPU = {
    "MKL_CBWR": "COMPATIBLE",
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


def save_recipe(folder: Path, model: str) -> Recipe:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "model", "sampling_steps": 2, "guidance": 2.0},
            "targets": list(TARGETS),
            "steps": yaml.safe_load(STEPS),
        }
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def save_model(folder: str, model: str) -> None:
    """Save the model, and print a digest of its weights, of an output and of the gradient of the first weight."""
    module = MODELS[model]()
    save_folder(module, Path(folder))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    output = module(x, torch.tensor([500, 20]), class_labels=torch.tensor([1, 3])).sample
    weights = list(module.parameters())
    (gradient,) = torch.autograd.grad(output.square().sum(), weights[:1])
    numbers = b"".join(each.detach().numpy().tobytes() for each in (*weights, output, gradient))
    print(hashlib.sha256(numbers).hexdigest())


def on_one_cpu(*command: str | Path, folder: Path) -> str:
    """Run Python with what all processors compute alike, and return what it prints."""
    environment = {**os.environ, **ONE_CPU, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def made(folder: Path, model: str) -> dict[str, dict[str, dict[str, object]]]:
    """Target -> step -> its version, and the digest of each artifact that it made."""
    recipe = save_recipe(folder, model)
    on_one_cpu("-m", "intaglio", "run", "recipe.yaml", "--store", "store", "--out", "out", folder=folder)
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
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if on_one_cpu(__file__, tmp_path / "model", model, folder=tmp_path) != golden["numbers"][model]:
        pytest.skip("torch computes other numbers on this processor than on the one that wrote golden.json")
    assert made(tmp_path, model) == golden[model]


def write() -> None:
    """Write golden.json anew."""
    found: dict[str, object] = {}
    numbers = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            numbers[model] = on_one_cpu(__file__, Path(folder, "model"), model, folder=Path(folder))
            found[model] = made(Path(folder), model)
    GOLDEN.write_text(json.dumps({"numbers": numbers, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save_model(*sys.argv[1:]) if sys.argv[1:] else write()
