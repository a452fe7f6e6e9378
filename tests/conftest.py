"""Fixtures and settings of all tests."""

import functools
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from intaglio import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes lands in the source tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_functions() -> Iterator[None]:
    """torch makes its table of ONNX functions anew for every export, which takes longer than to export a tiny model.

    It also looks up the thousands of its operators that it can decompose.
    """
    import torch._export.utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        found = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
        patch.setattr(torch._export.utils, "_materialize_cpp_cia_ops", found)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_trace_of_torch() -> None:
    """pytest adds its handler to every logger that does not propagate; then torch describes every tensor it traces."""
    import torch

    assert torch
    trace = logging.getLogger("torch.__trace")
    trace.propagate = True
    trace.handlers.clear()


LONG = ("test_end_to_end.py", "test_tutorial.py", "test_families.py", "test_golden.py", "test_guides.py")
"""Files whose tests take up to a minute each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for them at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Exclude the half a million objects of the imported libraries from garbage collection, which would search them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # torch's exporter makes millions of objects that live on
