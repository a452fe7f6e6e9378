"""The artifacts that a report is written from."""

from pathlib import Path

import pytest
from reporting import artifacts

from intaglio.pipeline.contract.artifact import AnyKey, Artifact


@pytest.fixture
def made(tmp_path: Path) -> dict[AnyKey, Artifact]:
    return artifacts(tmp_path / "model")
