"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "passes", "exporters")
HEAVY = frozenset({"diffusers", "modelopt", "onnx", "onnxruntime", "onnxscript", "scipy", "tensorrt", "tensorrt_rtx"})
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_passes_and_exporters_meet_only_in_the_core(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    others = {f"intaglio.{folder}" for folder in ("passes", "exporters") if folder != own}
    found = {name for name in _imports(ast.parse(path.read_text())) if any(_inside(name, other) for other in others)}
    assert not found


def test_heavy_modules_are_imported_where_they_are_used() -> None:
    """Importing every pass loads none of them; a private module is imported by those who need it, when they run."""
    public = (path for path in SOURCES if not path.stem.startswith("_"))
    modules = [f"intaglio.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in public]
    assert not _loaded(modules, HEAVY)


def test_the_command_line_loads_no_tensor_library() -> None:
    assert not _loaded(["intaglio.pipeline.cli.app", "intaglio.pipeline.artifacts.keys"], HEAVY | {"torch", "numpy"})


def _loaded(modules: list[str], heavy: frozenset[str]) -> list[str]:
    """Which of the heavy modules a fresh interpreter has after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*(m for m in {sorted(heavy)} if m in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return printed.split()


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
