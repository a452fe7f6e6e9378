"""The reference has a page for every public module, with every public class and function that the module defines."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePath
from types import ModuleType

import pytest
from reference import DEVICE, public_modules, write_reference

import intaglio

ROOT = Path(__file__).parents[1]


def public_names() -> dict[str, set[str]]:
    """Return the public names of each page, read from the sources."""
    names = {"intaglio.html": set(intaglio.__all__)}
    for folder in ("pipeline", "passes", "exporters"):
        for source in (ROOT / folder).rglob("*.py"):
            place = PurePath("intaglio", source.relative_to(ROOT))
            page = place.parent if source.name == "__init__.py" else place.with_suffix("")
            if not any(part.startswith("_") or part == DEVICE for part in page.parts):
                tree = ast.parse(source.read_text(encoding="utf-8"))
                defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
                names[f"{page.as_posix()}.html"] = {name for name in defined if not name.startswith("_")}
    return names


@pytest.fixture
def _names_stay() -> Iterator[None]:
    """The generator runs inside of modules what they import for type checkers alone; no later test is to find that."""
    for name in public_modules():
        import_module(name)
    before = {module: set(vars(module)) for name, module in sys.modules.items() if name.split(".")[0] == "intaglio"}
    yield
    for module, names in before.items():
        for name in vars(module).keys() - names:
            if not isinstance(vars(module)[name], ModuleType) or f"{module.__name__}.{name}" not in sys.modules:
                delattr(module, name)


@pytest.mark.usefixtures("_names_stay")
def test_all_that_is_public_is_in_the_reference_and_nothing_private(tmp_path: Path) -> None:
    write_reference(tmp_path)
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    names = public_names()
    assert pages.keys() - {"index.html"} == names.keys()
    assert {
        page: absent for page in names if (absent := {n for n in names[page] if f'id="{n}"' not in pages[page]})
    } == {}
    assert "largest magnitude" in pages["intaglio/pipeline/numerics/rounding.html"]  # a docstring
    assert "0 trains nothing: scales are fitted only" in pages["intaglio/passes/distill/options.html"]  # an option
    assert 'id="_' not in "".join(pages.values())
    assert 'href="pipeline/contract.html"' in pages["intaglio/pipeline.html"]
