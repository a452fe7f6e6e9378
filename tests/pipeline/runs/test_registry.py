"""The three kinds of pass reference, and what is wrong with a bad one."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from intaglio import Context, State
from intaglio.pipeline.artifacts.keys import PLAN
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.entry_points import PASSES, RUNTIMES
from intaglio.pipeline.errors import ContractError, IntaglioError, RecipeError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN
from intaglio.pipeline.runs.registry import find_pass, find_runtime, named_passes

SAMPLES = Path(__file__).parents[3] / "samples"


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    named_passes.cache_clear()
    yield
    named_passes.cache_clear()


@pytest.fixture
def plan() -> QuantPlan:
    layers = tuple(Layer(name=f"block.{i}.fc", op="linear", shape=(8, 8), bias=True) for i in range(4))
    return QuantPlan(layers, {layer.name: W8A8_TOKEN for layer in layers})


def floats(plan: QuantPlan) -> list[str]:
    return [layer.name for layer in plan.layers if plan.schemes[layer.name] == FLOAT]


def test_a_file_beside_the_recipe(plan: QuantPlan, tmp_path: Path) -> None:
    source = find_pass("./custom_pass.py:KeepEnds", SAMPLES)
    assert source.origin == "custom_pass.py:KeepEnds"
    assert source.source_sha256 is not None
    outputs = source.pass_class().run(State({PLAN: plan}, reader="test"), Context(scratch=tmp_path))
    kept = outputs[PLAN]
    assert isinstance(kept, QuantPlan)
    assert floats(kept) == ["block.0.fc", "block.3.fc"]


def test_a_plugin_distribution(plan: QuantPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed by pip, into a folder of its own that is then on the path."""
    source = shutil.copytree(SAMPLES / "plugin", tmp_path / "plugin")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    monkeypatch.syspath_prepend(str(site))
    found = find_pass("keep", Path())
    assert found.origin == "intaglio_keep:Keep"
    configured = found.pass_class.model_validate({"patterns": ["*.1.*"]})
    kept = configured.run(State({PLAN: plan}, reader="test"), Context(scratch=tmp_path))[PLAN]
    assert isinstance(kept, QuantPlan)
    assert floats(kept) == ["block.1.fc"]
    sys.modules.pop("intaglio_keep")


def test_our_own_passes_are_found_by_name() -> None:
    assert {"calibrate", "sensitivity", "assign", "distill", "merge", "export-qdq", "verify"} <= set(named_passes())


def test_two_owners_of_a_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("assign", value, PASSES) for value in ("a:Assign", "b:Assign")]
    monkeypatch.setattr("intaglio.pipeline.entry_points.entry_points", lambda group: points)
    with pytest.raises(RecipeError, match=r"pass 'assign' is provided twice, by .*\(a:Assign\) and by .*\(b:Assign\)"):
        named_passes()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("toys:NotAPass", "runtime mine: toys:NotAPass is not a subclass of intaglio.Runtime"),
        ("intaglio:Runtime", "intaglio:Runtime does not define name, build, lowerings, open, open_model, run"),
    ],
)
def test_what_is_no_runtime_is_said(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"mine": EntryPoint("mine", value, RUNTIMES)}
    monkeypatch.setattr("intaglio.pipeline.runs.registry.named_runtimes", lambda: points)
    with pytest.raises(ContractError, match=message):
        find_runtime("mine")


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("asign", RecipeError, "no pass 'asign': did you mean 'assign'"),
        ("toys:Apend", RecipeError, "no class 'Apend': did you mean 'Append'"),
        ("no.such.module:Append", RecipeError, "cannot import no.such.module: ModuleNotFoundError"),
        ("./folder:A", RecipeError, r"\./folder is no Python file and no module: write \./file\.py:Class"),
        ("./none.py:A", RecipeError, r"no file .*none\.py: paths are relative to the recipe"),
        ("./broken.py:A", RecipeError, r"broken\.py: cannot be imported: NameError"),
        ("toys:NotAPass", ContractError, "NotAPass is not a subclass of"),
        ("toys:Abstract", ContractError, "Abstract does not define requires, provides, run"),
    ],
)
def test_bad_references(tmp_path: Path, reference: str, kind: type[IntaglioError], message: str) -> None:
    (tmp_path / "broken.py").write_text("nothing_like_it\n")
    with pytest.raises(kind, match=message):
        find_pass(reference, tmp_path)


def test_a_package_is_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "many_files"
    package.mkdir()
    (package / "__init__.py").write_text("from toys import Append\n\nclass Mine(Append):\n    pass\n")
    (package / "helper.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = find_pass("many_files:Mine", Path()).source_sha256
    (package / "helper.py").write_text("x = 2\n")
    assert find_pass("many_files:Mine", Path()).source_sha256 != first
