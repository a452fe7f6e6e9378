"""What every test starts from."""

from pathlib import Path

import pytest

from intaglio.pipeline import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes lands in the source tree."""
    monkeypatch.chdir(tmp_path)
