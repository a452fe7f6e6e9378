"""A folder with a model and its LoRA, for the tests of LoRAs."""

from pathlib import Path

import pytest
from tiny import save_folder, tiny_dit


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """A folder with a model and, beside it, its LoRA."""
    from loras import written

    save_folder(tiny_dit(), tmp_path / "model")
    written(tiny_dit(), tmp_path)
    return tmp_path
