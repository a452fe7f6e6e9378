"""Docstrings are sentences, functions and modules stay short, and examples give what they show."""

import ast
import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("pipeline", "passes", "exporters")
    for path in (ROOT / folder).rglob("*.py")
)
OTHERS = sorted(
    str(path.relative_to(ROOT)) for folder in ("samples", "tests", ".ci") for path in (ROOT / folder).rglob("*.py")
)
FRAGMENT = re.compile(r"(Of|By|What|How|Where|Whether)\b")
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400
WITH_EXAMPLES = [path for path in SOURCES if ">>> " in (ROOT / path).read_text(encoding="utf-8")]


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the strings that stand alone: below a definition, or below the variable that they describe."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.strip()


def _long(path: str) -> Iterator[str]:
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{node.name} has {length} lines"
    if (length := _lines(path)) > LONGEST_MODULE:
        yield f"the module has {length} lines"


def _lines(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_docstrings_are_found_below_definitions_and_variables() -> None:
    tree = ast.parse('"""One."""\nX = 1\n"""Two."""\nclass A:\n    """Three."""\n    def f(self):\n        """Four."""')
    assert sorted(_docstrings(tree)) == ["Four.", "One.", "Three.", "Two."]


@pytest.mark.parametrize("path", SOURCES)
def test_a_docstring_begins_as_a_sentence(path: str) -> None:
    assert not [text for text in _docstrings(_tree(path)) if FRAGMENT.match(text)]


def test_docstrings_of_tests_and_samples_begin_as_sentences() -> None:
    assert len(OTHERS) > 100
    assert [f"{path}: {text}" for path in OTHERS for text in _docstrings(_tree(path)) if FRAGMENT.match(text)] == []


@pytest.mark.parametrize("path", SOURCES)
def test_functions_and_modules_are_short(path: str) -> None:
    assert not list(_long(path))


def test_modules_of_tests_and_samples_are_short() -> None:
    assert {path: length for path in OTHERS if (length := _lines(path)) > LONGEST_MODULE} == {}


def test_there_are_examples() -> None:
    assert {"pipeline/contract/recipe.py", "pipeline/numerics/rounding.py"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("path", WITH_EXAMPLES)
def test_examples_give_what_they_show(path: str) -> None:
    found = doctest.testmod(import_module(f"intaglio.{path.removesuffix('.py').replace('/', '.')}"))
    assert found.attempted > 0
    assert found.failed == 0
