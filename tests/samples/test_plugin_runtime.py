"""A runtime is one package: installed, it compiles, verifies and reports without a line in intaglio that names it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from forked import printed_forked
from tiny import save_folder, tiny_dit

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {path: dit, sampling_steps: 2}
targets: [onnx-reference]
steps:
  - calibrate: {samples: 2}
  - uniform: {schemes: [w8a8_token, w8a8_step], ends: [w4a16]}
  - distill: {updates: 0, samples: 2}
  - merge
  - export-float
  - export-qdq
  - lint
  - reference
  - verify: {samples: 2, rows: 2, bisect: true}
  - benchmark: {rows: 2, rounds: 1}
  - report
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the plug-in."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "samples/plugin_runtime", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True, capture_output=True)
    return folder / "site"


COMMAND = """
import json
from typer.testing import CliRunner
from intaglio.pipeline.cli.app import app

def command(*arguments):
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    return ended.stdout
"""


def in_one_process(site: Path, code: str) -> str:
    """Run code that may call `command`, in one new process that has the plug-in; return what it prints."""
    return printed_forked(exec, COMMAND + code, {}, out=Path("printed"), site=site)


def test_a_model_is_compiled_verified_timed_and_loaded_in_it(site, tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = (
        "import intaglio, torch\n"
        "command('run', 'recipe.yaml', '--out', 'out')\n"
        "denoiser = intaglio.load('out/onnx-reference', backend='reference')\n"
        "inputs = torch.ones(2, 3, 8, 8), torch.tensor(1), torch.tensor([0, 1])\n"
        "print(float((denoiser(*inputs)[0] - intaglio.load('out/onnx-reference')(*inputs)[0]).abs().max()))"
    )
    difference = in_one_process(site, code)
    assert float(difference) < 1e-4
    made = tmp_path / "out/onnx-reference"
    found = json.loads((made / "metrics.json").read_text())
    assert found["layers_quantized"] == 20
    assert {"w8a8_token", "w4a16"} <= set(re.findall(r'"scheme": "(\w+)"', (made / "plan.json").read_text()))
    assert found["parity_layer_rel_l2_max"] < 1e-5  # sums of float32 in another order
    assert found["latency_ms"] > 0
    assert (found["engine"]["runtime"], found["engine"]["version"]) == ("reference", onnx.__version__)
    assert "onnx-reference" in (made / "report.html").read_text()


def test_doctor_targets_and_the_first_recipe_have_it(site, tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    code = (
        "found = {'doctor': json.loads(command('doctor', '--json'))}\n"
        "found['targets'] = json.loads(command('targets', 'onnx-reference', '--json'))\n"
        "command('init', 'dit', '--target', 'onnx-reference')\n"
        "command('plan', 'recipe.yaml')\n"
        "print(json.dumps(found))"
    )
    found = json.loads(in_one_process(site, code))
    doctor = found["doctor"]
    assert doctor["reference"].startswith("1.")
    assert doctor["targets"]["onnx-reference"]["run"] == {"here": True, "how": "onnx.reference"}
    assert doctor["targets"]["onnx-reference"]["verify"]["here"]
    assert found["targets"]["onnx-reference"]["opset_max"] == 21
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert "targets: [onnx-reference]" in recipe
    assert "  - reference\n" in recipe


def test_without_it_nothing_knows_its_name() -> None:
    names = ("onnx-reference", "intaglio_reference", "onnx.reference")
    sources = [path for folder in ("pipeline", "passes", "exporters") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in sources if any(name in path.read_text(encoding="utf-8") for name in names)]
