"""Tiny models whose float graphs are exported once for all tests that ask for them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from harness import Artifacts, run_pass
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef

KEPT: tuple[AnyKey, ...] = (TRAJECTORY, FLOAT_GRAPH)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.resolve(ModelRef(path=str(folder), sampling_steps=3, guidance=2.0), Path())


def export(module: torch.nn.Module, folder: Path) -> Artifacts:
    start: Artifacts = {MODEL: checkpoint(save_folder(module, folder))}
    start |= run_pass(Calibrate(samples=2), start, folder / "calibrate")
    return start | run_pass(ExportFloat(), start, folder / "export")


def once(make: Callable[[], torch.nn.Module], factory: pytest.TempPathFactory) -> Artifacts:
    """Return what `export` makes. One process of this test run calls it; the other processes read the files."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"exported-{make.__name__}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            made = export(make(), folder)
            for key in KEPT:
                (folder / key.name).mkdir(exist_ok=True)
                made[key].save(folder / key.name)
            (folder / "whole").touch()
    return {MODEL: checkpoint(folder)} | {key: key.type.load(folder / key.name) for key in KEPT}


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny DiT, its trajectory (3 steps, 4 rows) and its float graph."""
    return once(tiny_dit, tmp_path_factory)


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny UNet, likewise."""
    return once(tiny_unet, tmp_path_factory)
