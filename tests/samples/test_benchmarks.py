"""Every benchmark can be imported: the names that it takes from intaglio are there. Some of their own arithmetic."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import dit  # noqa: F401  # a fixture
from harness import Artifacts

from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.runs.runner import CompiledTarget

BENCHMARKS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "samples/benchmarks").glob("*.py") if path.stem[0] != "_"
)
FACTORIES = ("tiny_families", "tiny_pipelines", "joined_pipelines")
"""Modules without a command."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    assert callable(getattr(import_module(name), "main", None)) or name in FACTORIES


def test_the_denoiser_classes_of_diffusers_are_listed_with_their_tiny_models() -> None:
    families = import_module("families")
    classes = families.denoiser_classes()
    assert {"UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel"} <= classes.keys()
    assert not {"AutoencoderKL", "ControlNetModel", "T2IAdapter"} & classes.keys()
    model = families.OTHERS["stable_audio"]()
    assert type(model.module).__name__ in classes


def test_samples_are_compared_in_their_own_range_without_clamping() -> None:
    quality = import_module("real_networks").quality
    reference = torch.tensor([[0.0, 10.0], [6.0, 8.0]])
    found = quality(reference + torch.tensor([[0.1], [1.0]]), reference, peak=10.0)
    assert found["psnr_db"] == pytest.approx((40 + 20) / 2, abs=1e-3)
    assert found["psnr_min_db"] == pytest.approx(20, abs=1e-3)
    assert found["sqnr_db"] == pytest.approx((36.99 + 16.99) / 2, abs=1e-2)  # mean squares 50, errors 0.01 and 1


def test_decibels_of_a_prediction_are_relative_to_its_power_and_to_its_range() -> None:
    reference = np.array([0, 10], np.float32)
    found = import_module("speed").decibels(reference + np.float32(0.1), reference)
    assert found == {"sqnr_db": pytest.approx(36.99, abs=1e-2), "psnr_db": pytest.approx(40, abs=1e-3)}


def test_plans_and_codes_of_two_devices_are_compared_layer_by_layer() -> None:
    def done(scheme: str, *codes: int) -> CompiledTarget:
        """A layer with these codes, and one with this scheme; stored digests are artifacts here."""
        layers = {"a": SimpleNamespace(codes=torch.tensor([codes])), "b": SimpleNamespace(codes=torch.zeros(1, 2))}
        found = {PLAN: SimpleNamespace(schemes={"a": "w8a8", "b": scheme}), QUANTIZED: SimpleNamespace(layers=layers)}
        store = SimpleNamespace(load=lambda key, _: found[key])
        return CompiledTarget(
            store, dict.fromkeys(found, ""), (SimpleNamespace(step="merge", seconds=len(codes)),), None
        )

    found = import_module("gpu").figures(done("w8a8", 1, 2, 3, 4), done("w4a16", 1, 2, 5, 4))
    assert found == {
        "seconds": {"merge": {"cpu": 4, "gpu": 4}},
        "other_scheme": ["b"],
        "codes_differing": 1 / 4,
        "largest_difference": 2,
    }


def test_graphs_are_timed_by_turns_and_compared_with_the_fastest_float_graph(
    dit: Artifacts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    speed = import_module("speed")
    recorded, inputs = dit[TRAJECTORY].call(0, slice(2)), dit[FLOAT_GRAPH].inputs
    call = {name: value.numpy().astype(inputs[name].dtype) for name, value in recorded.items()}
    monkeypatch.setattr(speed, "calls", lambda *_: iter([call]))
    monkeypatch.setattr(speed, "middle_step", lambda *_: 0)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    graphs = dict.fromkeys(["float32", "torch.onnx.export", "W8A8"], dit[FLOAT_GRAPH].path)
    rows = speed.timed(graphs | {"modelopt INT8": tmp_path / "broken.onnx"}, "dit", tmp_path, 3, 2, 1)
    assert [row["graph"] for row in rows] == list(graphs)
    fastest = min(rows[:2], key=lambda row: row["milliseconds"])
    assert {row["fastest_float"] for row in rows} == {fastest["graph"]}
    assert fastest["speed"] == 1
    assert rows[2]["psnr_db"] == float("inf")
    written = speed.table([{"model": "dit", **row} for row in rows]).splitlines()
    assert len({line.count("|") for line in written}) == 1
    assert written[2].startswith("| dit, 1 | ")
    assert written[2].endswith("| - | - | - | - |")
    operators = speed.times_of_operators(graphs, "dit", tmp_path, 2)
    assert {name: "Softmax" in times for name, times in operators.items()} == dict.fromkeys(graphs, True)
    assert not list(tmp_path.glob("kernels*"))
