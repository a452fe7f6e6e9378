"""Calls of TensorRT use only what TensorRT 10 has: they are checked against type stubs that were generated from it."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from intaglio.exporters.runtimes.tensorrt.kit_scripts import build, run

NO_SUCH_METHOD = """
import tensorrt

def wrong(engine: tensorrt.ICudaEngine) -> None:
    engine.get_tensor_nym(0)
"""

NOT_PYTHON = ((r"\bin: list\[", "in_: list["), (r"(= None, \w+: int)\) ->", r"\1 = ...) ->"))
"""In the stubs: a parameter with the name of a keyword, and one without a default behind one that has one."""

SETTINGS = """
[mypy]
strict = true
python_version = 3.10
mypy_path = stubs
warn_unused_ignores = false
[mypy-numpy.*,tensorrt_libs.*]
ignore_missing_imports = true
[mypy-tensorrt.*,tensorrt_bindings.*]
ignore_errors = true
"""


def test_the_scripts_call_what_tensorrt_has(tmp_path: Path) -> None:
    """With the Python of JetPack 6. One file is wrong, so that stubs which are passed over are noticed."""
    try:
        there = Path(str(distribution("tensorrt-stubs").locate_file("")))
    except PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    for file in ("tensorrt/__init__.pyi", "tensorrt_bindings/__init__.pyi", "tensorrt_bindings/tensorrt.pyi"):
        copy = tmp_path / "stubs" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = (there / file).read_text()
        for wrong, right in NOT_PYTHON:
            text = re.sub(wrong, right, text)
        copy.write_text(text)
    scripts = []
    for module in (build, run):
        assert module.__file__ is not None
        scripts.append(tmp_path / f"{module.__name__.rpartition('.')[2]}.py")
        scripts[-1].write_text(Path(module.__file__).read_text())
    (tmp_path / "wrong.py").write_text(NO_SUCH_METHOD)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--no-site-packages", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, *map(str, scripts), "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    *found, _ = done.stdout.splitlines()
    assert len(found) == 1, done.stdout + done.stderr
    assert found[0].startswith('wrong.py:5: error: "ICudaEngine" has no attribute "get_tensor_nym"')
