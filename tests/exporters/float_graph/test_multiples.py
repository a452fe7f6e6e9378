"""The sizes that a graph with two dynamic axes takes are found when it is exported, and held at every call."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from harness import Artifacts, run_pass

import intaglio
from intaglio import CallError, DenoiserModel, SecondSize
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, MODEL
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef


class Down(torch.nn.Module):
    """Halves the height twice and the width once, and joins what it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv2d(2, 2, 3, stride=(4, 2), padding=1)

    def forward(self, sample, timestep, grid=None):
        up = torch.nn.functional.interpolate(self.down(sample), scale_factor=(4.0, 2.0))
        out = torch.cat([sample, up], 1)[:, 1:3] + timestep.reshape(-1, 1, 1, 1) / 1000
        return out if grid is None else out + grid.reshape(sample.shape[-2:])


class Opened(Checkpoint):
    """A checkpoint whose model is already there."""

    def open(self, **_: object) -> DenoiserModel:
        return MADE[self.ref.path]


MADE: dict[str, DenoiserModel] = {}


def exported(folder: Path, other: SecondSize, **more: Any) -> Graph:
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler()
    MADE[str(folder)] = DenoiserModel(Down().eval(), scheduler, (2, 8, 16), other=other, **more)
    artifacts: Artifacts = {MODEL: Opened(folder, ModelRef(path=str(folder), sampling_steps=2))}
    artifacts |= run_pass(Calibrate(samples=1), artifacts, folder / "calibrate")
    return run_pass(ExportFloat(), artifacts, folder / "export")[FLOAT_GRAPH]


def test_sizes_that_the_network_cannot_divide_are_one_clear_error(tmp_path):
    graph = exported(tmp_path, SecondSize((2, 16, 8)))
    assert graph.multiples == {"sample_2": 4, "sample_3": 2}
    (tmp_path / "out").mkdir()
    graph.save(tmp_path / "out")
    loaded = intaglio.load(tmp_path / "out", threads=1)
    torch.manual_seed(0)
    module, times = Down().eval(), torch.tensor([500.0])
    for height, width in ((8, 16), (16, 8), (12, 6), (4, 2), (8, 16)):  # in one session
        x = torch.randn(1, 2, height, width)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, times).sample, module(x, times))
    message = r"sample has 10 at axis 2, but the network divides this size by 4: give 8 or 12"
    with pytest.raises(CallError, match=message) as raised:
        loaded(torch.randn(1, 2, 10, 8), times)
    assert len(raised.value.problems) == 1
    with pytest.raises(CallError, match=r"sample has 1 at axis 3, but the network divides this size by 2: give 2$"):
        loaded(torch.randn(1, 2, 8, 1), times)


def test_a_size_that_another_input_follows_is_left_to_the_runtime(tmp_path):
    grids = {"shared": {"grid": torch.zeros(128)}}
    graph = exported(tmp_path, SecondSize((2, 16, 16), shared={"grid": torch.zeros(256)}), **grids)
    assert graph.sizes.keys() == {"sample_2", "grid_0"}
    assert graph.multiples == {}
