"""Who may import whom, read from the source."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "passes", "exporters")
ORDER = ("numerics", "formats", "model", "contract", "artifacts", "simulation", "runs", "cli")
"""Folders of the core. Each may import those before it, and the modules beside them."""
HEAVY = frozenset({"diffusers", "modelopt", "onnx", "onnxruntime", "onnxscript", "scipy", "tensorrt", "tensorrt_rtx"})
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
ENTRY_POINTS = {name for group in ("intaglio.passes", "intaglio.runtimes") for name in POINTS[group]}
ORDINARY = {name for name in ENTRY_POINTS if name.isalpha()} - POINTS["intaglio.runtimes"].keys()
"""Those that are words of the language too."""
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
CORE = [path for path in SOURCES if path.is_relative_to(ROOT / "pipeline")]
NAME = re.compile(r"intaglio\.(?:pipeline|passes|exporters)\.[a-z_]+(\.\w+)*")


def _imports(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported, anywhere in the file, and every module that a string names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (found[0] for found in NAME.finditer(node.value))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_what_stands_above_it(path: Path) -> None:
    own = path.relative_to(ROOT).with_suffix("").parts
    wrong = {name for name in _imports(ast.parse(path.read_text())) if not _allowed(own, tuple(name.split(".")))}
    assert not wrong


def _allowed(own: tuple[str, ...], name: tuple[str, ...]) -> bool:
    if name[0] != "intaglio" or len(name) < 2 or name[1] not in FOLDERS:
        return True
    if name[1] != own[0]:
        return name[1] == "pipeline"
    if own[0] != "pipeline" or len(name) < 3 or name[2] not in ORDER:
        return True
    return own[1] in ORDER and ORDER.index(name[2]) <= ORDER.index(own[1])


def test_imports_among_folders_make_no_circle() -> None:
    imported: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in SOURCES:
        own = _folder(path.relative_to(ROOT).with_suffix("").parts)
        names = (tuple(name.split("."))[1:] for name in _imports(ast.parse(path.read_text())))
        imported.setdefault(own, set()).update({_folder(name) for name in names if name[:1] and name[0] in FOLDERS})
    assert len(imported) > 30
    TopologicalSorter({own: names - {own} for own, names in imported.items()}).prepare()  # raises CycleError


def test_imports_among_modules_make_no_circle() -> None:
    """Imports for types alone and those inside functions count too."""
    modules = {_module(path): path for path in SOURCES}
    imported = {name: _modules_of(path, modules.keys()) - {name} for name, path in modules.items()}
    assert sum(map(len, imported.values())) > len(modules)
    TopologicalSorter(imported).prepare()  # raises CycleError


def test_a_module_of_a_name_is_found_in_an_import_for_types_and_in_one_inside_a_function(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "if TYPE_CHECKING:\n    from intaglio.pipeline.errors import RecipeError\n"
        "def f():\n    from intaglio.pipeline import files\n    import torch\n"
    )
    known = {"intaglio.pipeline", "intaglio.pipeline.errors", "intaglio.pipeline.files"}
    assert _modules_of(tmp_path / "a.py", known) == known - {"intaglio.pipeline"}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("intaglio", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _modules_of(path: Path, known: Collection[str]) -> set[str]:
    """The known modules that a file imports; a package counts where something of its own is imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                whole = {f"{module}.{alias.name}" for alias in names}
                found |= {name if name in known else module for name in whole}
    return found & set(known)


def _folder(name: tuple[str, ...]) -> tuple[str, ...]:
    """The folder of a module below pipeline, passes or exporters; the module itself where it stands there directly."""
    return name[:2]


def test_private_names_are_imported_in_their_own_package_only() -> None:
    wrong = []
    for path in SOURCES:
        package = ".".join(("intaglio", *path.relative_to(ROOT).parent.parts))
        for name in _imports(ast.parse(path.read_text())):
            private = name.startswith("intaglio.") and any(re.match("_[a-z]", part) for part in name.split("."))
            if private and not name.startswith(f"{package}."):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_names_no_pass_and_no_runtime(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {text for text in _strings(tree) if _named_in(text)}


@pytest.mark.parametrize("text", ["tensorrt", "run export-qdq first", "the step `lint`", "needs onnxruntime 1.31"])
def test_a_name_of_an_entry_point_is_found_in_a_string(text: str) -> None:
    assert _named_in(text)
    assert not _named_in("a report with a balance, as lint has it")


def _strings(tree: ast.AST) -> Iterator[str]:
    """Every string but docstrings, which are statements of their own and may show examples."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def _named_in(text: str) -> set[str]:
    """Names of passes and runtimes that are the text or stand in backticks; those that are no word also within it."""
    words = set(re.findall(r"[\w-]+", text)) - ORDINARY
    return ENTRY_POINTS & {text, *words, *re.findall(r"`([\w-]+)`", text)}


def test_every_folder_of_the_core_has_its_place_in_the_order() -> None:
    folders = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert folders == set(ORDER)


def test_heavy_modules_are_imported_where_they_are_used() -> None:
    """Importing every pass, command and artifact loads none of them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    modules = sorted(set(re.findall(r'= "(intaglio\.[\w.]+):\w+"', text)))
    assert len(modules) > 20
    assert not _loaded(modules, HEAVY)


def test_the_command_line_loads_no_tensor_library() -> None:
    assert not _loaded(["intaglio.pipeline.cli.app", "intaglio.pipeline.artifacts.keys"], HEAVY | {"torch", "numpy"})


def _loaded(modules: list[str], heavy: frozenset[str]) -> list[str]:
    """Which of the heavy modules a fresh interpreter has after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*(m for m in {sorted(heavy)} if m in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return printed.split()


def test_public_names_are_there_and_bring_nothing_heavy_before_they_are_used() -> None:
    assert not _loaded(["intaglio"], HEAVY | {"torch", "numpy"})
    import intaglio

    assert {name for name in intaglio.__all__ if getattr(intaglio, name) is not None} == set(intaglio.__all__)
