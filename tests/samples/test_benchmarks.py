"""Every benchmark can be imported: the names that it takes from intaglio are there."""

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "samples/benchmarks").glob("*.py") if path.stem[0] != "_"
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    assert callable(getattr(import_module(name), "main", None)) or name == "tiny_families"  # factories
