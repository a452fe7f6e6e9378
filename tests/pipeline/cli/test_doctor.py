"""The facts that `doctor` finds; no broken package ends the examination."""

import json
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from intaglio.pipeline.cli import doctor
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.cli.doctor import all_packages, examine
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target, target_names

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_says_what_is_here() -> None:
    found = examine()
    assert found.packages["torch"].version == version("torch")
    assert found.packages["onnx"].works
    assert found.facts["providers"].value["CPUExecutionProvider"]
    assert found.facts["kernels"].value in [kernels.name for kernels in load_target("onnxruntime-cpu").kernels]
    assert found.memory_bytes is None or found.memory_bytes > 2**28
    assert tuple(found.targets) == target_names()
    cpu = found.targets["onnxruntime-cpu"]
    assert all(ability.here for ability in (cpu.compile, cpu.build, cpu.run, cpu.verify))
    orin = found.targets["tensorrt-10.3-orin"]
    assert (orin.compile.here, orin.verify.here) == (True, True)


def test_a_broken_module_is_a_fault_and_takes_away_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        if name == "onnxruntime":
            raise ImportError("libsomething.so.13: cannot open\nshared object file")
        return sys.modules.get(name)

    monkeypatch.setattr(doctor, "import_module", broken)
    found = examine()
    faults = {package.fault for package in found.packages.values()} - {None}
    assert faults == {"ImportError: libsomething.so.13: cannot open shared object file"}
    assert not found.facts["providers"].value
    cpu = found.targets["onnxruntime-cpu"]
    assert not any(ability.here for ability in (cpu.compile, cpu.build, cpu.run, cpu.verify))
    assert cpu.compile.how == "onnxruntime is broken"


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_version", lambda name: None if name.startswith(("tensorrt", "torch")) else "1.0")
    found = examine()
    assert found.targets["tensorrt-rtx"].build == doctor.Ability(False, "pip install 'intaglio[rtx]'")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["targets"]["tensorrt-rtx"]["compile"] == {
        "here": False,
        "how": "pip install intaglio",
    }


@pytest.mark.parametrize(
    ("capability", "target", "build", "run"),
    [
        (
            "8.7",
            "tensorrt-10.3-orin",
            (True, "trtexec, by intaglio kit"),
            (False, "pip install 'intaglio[tensorrt]'"),
        ),
        (
            "8.9",
            "tensorrt-10.3-orin",
            (False, "build it on the device: `intaglio kit` packs what it needs"),
            (False, "on the device"),
        ),
        ("8.9", "tensorrt-rtx", (True, "tensorrt_rtx 1.0"), (True, "some GPU")),
    ],
)
def test_engines_are_built_and_run_on_gpus_that_fit(
    capability: str, target: str, build: object, run: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"tensorrt-cu12": None, "tensorrt": None}
    monkeypatch.setattr(doctor, "find_version", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr(doctor, "import_module", lambda name: sys.modules.get(name, SimpleNamespace()))
    monkeypatch.setattr(doctor, "_gpus", lambda: (doctor.Gpu("some GPU", 8 * 10**9, capability),))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/src/tensorrt/bin/trtexec")
    found = examine().targets[target]
    assert (found.build.here, found.build.how) == build
    assert (found.run.here, found.run.how) == run


def test_a_runtime_that_cannot_be_imported_is_a_fault_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        if name == "tensorrt":
            raise RecipeError("tensorrt: cannot import it")
        return find_runtime(name)

    find_runtime = doctor.find_runtime
    monkeypatch.setattr(doctor, "find_runtime", broken)
    monkeypatch.setattr(doctor, "runtimes", lambda: {name: find_runtime(name) for name in ("onnxruntime",)})
    found = examine()
    assert found.faults["runtime tensorrt"] == "RecipeError: tensorrt: cannot import it"
    assert found.targets["tensorrt-10"].compile == doctor.Ability(False, "RecipeError: tensorrt: cannot import it")
    assert found.targets["onnxruntime-cpu"].run.here


def test_the_command_shows_every_package_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.find_version
    monkeypatch.setattr(doctor, "find_version", lambda name: None if name.startswith("tensorrt") else installed(name))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.stderr
    assert all(name in result.stdout for name in (*target_names(), "trtexec", "nvidia-modelopt"))
    assert "not here: pip install 'intaglio[tensorrt]'" in result.stdout


def test_the_extras_it_names_are_there_and_hold_the_package() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = {p.distributions[0]: found[1] for p in all_packages() if (found := re.search(r"\[(\w+)\]", p.install))}
    extra = {"peft": "lora", "nvidia-modelopt": "modelopt", "tensorrt-rtx-cu12": "rtx", "tensorrt-cu12": "tensorrt"}
    assert named == extra
    assert all(name in extras[extra] for name, extra in named.items())


def test_torch_is_not_imported_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the import fails
    monkeypatch.setattr(doctor, "_has_driver", lambda: False)
    assert doctor._gpus() == ()
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    found = examine()
    assert found.faults["gpus"].startswith("ModuleNotFoundError: import of torch halted")
