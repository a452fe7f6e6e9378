from pathlib import Path

import pytest
from harness import Artifacts, run_pass
from tiny import save_folder, tiny_dit

from intaglio.passes.calibrate import Calibrate
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.pipeline.artifacts.keys import MODEL, TARGET
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny DiT with its trajectories (4 steps, 8 samples) and a target."""
    folder = save_folder(tiny_dit(), tmp_path_factory.mktemp("model"))
    checkpoint = Checkpoint.resolve(ModelRef(path=str(folder), sampling_steps=4, guidance=2.0), Path())
    start: Artifacts = {MODEL: checkpoint, TARGET: load_target("onnxruntime-cpu")}
    return start | run_pass(Calibrate(samples=8), start, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def sensitivity() -> MeasureSensitivity:
    """The samples that it predicts are those that it draws."""
    return MeasureSensitivity(
        buckets=2,
        rows=4,
        bases=(),
        probes=2,
        samples=8,
        direct=0.1,
        apart="screened",
        drift_samples=8,
        drift_below_db=50,
    )


@pytest.fixture(scope="session")
def measured(
    calibrated: Artifacts, sensitivity: MeasureSensitivity, tmp_path_factory: pytest.TempPathFactory
) -> Artifacts:
    return calibrated | run_pass(sensitivity, calibrated, tmp_path_factory.mktemp("scratch"))
