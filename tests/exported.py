"""Tiny models whose float graphs are exported once for all tests that ask for them."""

from pathlib import Path

import pytest
from harness import Artifacts, run_pass
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import MODEL
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef


def export(module, folder: Path) -> Artifacts:
    folder = save_folder(module, folder)
    start: Artifacts = {MODEL: Checkpoint.resolve(ModelRef(path=str(folder), sampling_steps=3, guidance=2.0), Path())}
    start |= run_pass(Calibrate(samples=2), start, folder / "calibrate")
    return start | run_pass(ExportFloat(), start, folder / "export")


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny DiT, its trajectory (3 steps, 4 rows) and its float graph."""
    return export(tiny_dit(), tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny UNet, likewise."""
    return export(tiny_unet(), tmp_path_factory.mktemp("unet"))
