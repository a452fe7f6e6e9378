"""Every pass makes, from the same input, what it made before; if it no longer does, its version has risen.

    python tests/test_golden.py      # write golden.json anew, after the versions of the passes that changed were raised

The digests are those of torch and MKL with the instructions that all processors have, and of one thread. Makers of
processors still differ in them: the maker and the numbers of a model are a digest too, and where it is another one, no
digest is compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from platform import processor

import pytest
import torch
import yaml
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio import Recipe, Store, bind, compile

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
Made = dict[str, dict[str, dict[str, object]]]
"""Target -> step -> its version, and the digest of each artifact that it made."""
MODELS = {"dit": tiny_dit, "unet": tiny_unet}
TARGETS = ("onnxruntime-cpu", "tensorrt-rtx")


def saved(folder: Path, model: str) -> str:
    """Save the model; return a digest of its weights, an output, the gradient of the first weight, and the maker."""
    module = MODELS[model]()
    save_folder(module, folder / "model")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    output = module(x, torch.tensor([500, 20]), class_labels=torch.tensor([1, 3])).sample
    weights = list(module.parameters())
    (gradient,) = torch.autograd.grad(output.square().sum(), weights[:1])
    numbers = b"".join(each.detach().numpy().tobytes() for each in (*weights, output, gradient))
    return hashlib.sha256(numbers + maker().encode()).hexdigest()


def maker() -> str:
    """Return the maker of the processor as Linux names it, such as AuthenticAMD; elsewhere what Python knows of it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "") or processor()


def made(folder: Path) -> Made:
    """Return what the recipe makes of the model in the folder."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": "model", "sampling_steps": 2, "guidance": 2.0},
            "targets": list(TARGETS),
            "steps": yaml.safe_load(STEPS),
        }
    )
    done = compile(recipe, Store(folder / "store"), base=folder)
    return {
        chain.target.name: {
            step.name: {"version": type(step.configured).version, **run.outputs}
            for step, run in zip(chain.steps, done[chain.target.name].runs, strict=True)
        }
        for chain in bind(recipe, base=folder)
    }


def on_one_cpu(model: str, folder: Path, *expected: str) -> tuple[str, Made]:
    """Return the numbers of the model and what is made of it with what all processors compute alike.

    Nothing is made where the numbers are not the expected ones.
    """
    environment = {**os.environ, **ONE_CPU, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, model, str(folder), *expected]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    numbers, found = json.loads((folder / "found.json").read_text())
    return numbers, found


@pytest.mark.parametrize("model", MODELS)
def test_equal_inputs_give_equal_artifacts_or_the_version_of_the_pass_has_risen(model: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    numbers, found = on_one_cpu(model, tmp_path, golden["numbers"][model])
    if numbers != golden["numbers"][model]:
        pytest.skip("torch computes other numbers on this processor than on the one that wrote golden.json")
    assert found == golden[model]


def write() -> None:
    """Write golden.json anew."""
    found = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = on_one_cpu(model, Path(folder))
    numbers = {model: each[0] for model, each in found.items()}
    golden = {"numbers": numbers, **{model: each[1] for model, each in found.items()}}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def write_one(model: str, path: str, *expected: str) -> None:
    """Write the numbers of the model and what is made of it, in this process."""
    numbers = saved(Path(path), model)
    found = made(Path(path)) if not expected or numbers in expected else {}
    Path(path, "found.json").write_text(json.dumps([numbers, found]))


if __name__ == "__main__":
    write_one(*sys.argv[1:]) if sys.argv[1:] else write()
