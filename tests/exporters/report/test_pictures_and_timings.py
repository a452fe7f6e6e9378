"""From a compiled folder to pictures and timings, by the command."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from harness import Artifacts, run_pass
from PIL import Image
from quantizing import with_plan
from tiny import tiny_dit
from typer.testing import CliRunner, Result

from intaglio import Recipe, Step, Store
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.measure.bench import Bench
from intaglio.exporters.measure.benchmark import _commands, _figures, _speedup, half_graph
from intaglio.exporters.measure.engine_process import Loaded, Spent
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.publish import Provenance, made_from, publish

CLIPS = """
import torch
from diffusers import DDIMScheduler

from intaglio.pipeline.model.checkpoint import DenoiserModel


class Clips(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.text, self.last = torch.nn.Linear(3, 64), torch.nn.Linear(8, 64), torch.nn.Linear(64, 3)

    def forward(self, sample, timestep, text):
        x = self.first(sample.movedim(1, -1)) + self.text(text)[:, None, None, None]
        return self.last(torch.tanh(x + timestep[:, None, None, None, None] / 1000)).movedim(-1, 1)


def make():
    torch.manual_seed(0)
    return DenoiserModel(Clips(), DDIMScheduler(), (3, 2, 8, 8), conditions={"text": torch.randn(3, 8)})
"""


def published(start: Artifacts, place: Path) -> Path:
    """The folder of the target, as a run leaves it; the store is beside it."""
    target = load_target("onnxruntime-cpu")
    artifacts = with_plan(start, lambda layer: W8A8_STEP if layer.k > 8 else FLOAT) | {TARGET: target}
    artifacts |= run_pass(ExportQdq(), artifacts, place / "scratch")
    store, folder = Store(place / "store"), place / "out"
    digests = {key: store.put(artifacts[key], staging="test") for key in (MODEL, TARGET, FLOAT_GRAPH, GRAPH)}
    recipe = Recipe(model=artifacts[MODEL].ref, targets=(target.name,), steps=(Step(uses="export-qdq"),))
    publish(folder, store, digests, Provenance(recipe, {key.name: digest for key, digest in digests.items()}, ()))
    return folder


@pytest.fixture(scope="module")
def folder(dit: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled folder of a DiT with a scale for each of 3 steps."""
    return published(dit, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled folder of a model of clips of two frames, with three rows of conditions."""
    place = tmp_path_factory.mktemp("clips")
    (place / "model.py").write_text(CLIPS)
    start: Artifacts = {MODEL: Checkpoint.resolve(ModelRef(path="./model.py:make", sampling_steps=3), place)}
    start |= run_pass(Calibrate(samples=2), start, place / "calibrate")
    return published(start | run_pass(ExportFloat(), start, place / "export"), place)


def intaglio(command: str, folder: Path, *arguments: str, store: Path | None = None) -> Result:
    given = [command, str(folder), "--store", str(store or folder.parent / "store"), *arguments]
    return CliRunner().invoke(app, given, env={"COLUMNS": "200"})


def drawn(folder: Path, *arguments: str) -> np.ndarray:
    """The picture, rows first."""
    result = intaglio("sample", folder, "--out", "grid.png", *arguments)
    assert result.exit_code == 0, result.stderr
    return np.asarray(Image.open("grid.png"))


def test_full_precision_is_above_the_compiled_samples(folder):
    side = 8 * 12  # pixels, enlarged
    alone = drawn(folder, "--samples", "3")
    assert alone.shape == (side, 3 * side, 3)
    both = drawn(folder, "--samples", "3", "--compare")
    full, below = np.split(both, 2)
    assert np.corrcoef(below.ravel(), alone.ravel())[0, 1] > 0.999  # samples of random weights: each in its own range
    own, others = (np.abs(full.astype(int) - x).mean() for x in (below, np.roll(below, side, axis=1)))
    assert 0 < own < others / 3  # from the same noise
    figures = json.loads(intaglio("sample", folder, "--out", "x.png", "--samples", "3", "--compare", "--json").stdout)
    distances = {"psnr_db", "psnr_db_min", "sqnr_db", "sqnr_db_min", "cosine", "cosine_min", "error_max"}
    assert figures.keys() == {"out", "samples", "steps", "seed"} | distances
    assert (figures["samples"], figures["steps"], figures["seed"]) == (3, 3, 0)
    apart = (full.astype(float) - below).reshape(side, 3, -1)
    psnr = 10 * np.log10(255**2 / np.square(apart).mean((0, 2)))
    assert figures["psnr_db"] == pytest.approx(psnr.mean(), abs=0.5)  # the picture's levels are rounded
    assert figures["psnr_db_min"] <= figures["psnr_db"]
    assert figures["sqnr_db_min"] <= figures["sqnr_db"] < figures["psnr_db"]
    assert 0 < figures["cosine_min"] <= figures["cosine"] < 1


def test_class_seed_and_steps_are_those_that_were_asked_for(folder):
    once = ("--samples", "1", "--steps", "1")
    first, second = (drawn(folder, *once, "--class", n) for n in "12")
    assert (drawn(folder, "--samples", "2", "--steps", "1", "--class", "1")[:, :96] == first).all()
    assert (first != second).any()
    assert (first != drawn(folder, *once, "--class", "1", "--seed", "1")).any()
    # timesteps between those that there are scales for
    result = intaglio("sample", folder, "--out", "x.png", "--samples", "1", "--steps", "4", "--json")
    assert json.loads(result.stdout)["steps"] == 4


def test_clips_are_lines_of_frames_and_rows_are_of_the_recording(clips):
    side = 96
    both = drawn(clips, "--samples", "2", "--compare", "--row", "2", "--row", "0")
    assert both.shape == (4 * side, 2 * side, 3)  # two lines for each clip, of two frames
    assert (both[side : 2 * side] == drawn(clips, "--samples", "1", "--row", "2")).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", "4", "--class", "0"), "--class 4: give numbers from 0 to 3"),
        (("--prompt", "a cat", "--class", "1"), "--prompt and --class exclude each other"),
        (("--prompt", "a cat"), "no text encoder: give the whole diffusers pipeline as --pipeline"),
        (("--prompt", "a cat", "--pipeline", "."), "--pipeline .: diffusers finds no whole pipeline there"),
        (("--out", "grid"), "grid: not the name of a picture: end it in .png"),
        (("--out", "no/grid.png"), "no/grid.png: the folder no does not exist"),
    ],
)
def test_what_cannot_be_drawn_is_told(arguments, message, folder):
    result = intaglio("sample", folder, "--out", "grid.png", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("grid.png").exists()


@pytest.mark.parametrize("command", [("sample", "--out", "grid.png"), ("bench",)])
def test_a_store_or_folder_of_something_else_is_told(command, folder, tmp_path):
    name, *arguments = command
    elsewhere = intaglio(name, folder, *arguments, store=tmp_path / "elsewhere")
    assert elsewhere.exit_code == 2
    assert "its MODEL is not in" in elsewhere.stderr
    assert "name the store of its run with --store" in elsewhere.stderr
    nothing = intaglio(name, tmp_path, *arguments, store=tmp_path)
    assert nothing.exit_code == 2
    assert "no manifest.json: give the folder of one target" in nothing.stderr


def test_engines_are_timed_by_turns_each_in_its_own_process(folder):
    result = intaglio("bench", folder, "--rounds", "2", "--rows", "1", "--json")
    assert result.exit_code == 0, result.stderr
    found = Bench.model_validate_json(result.stdout)
    assert (found.target, found.provider, found.rows, found.threads) == (
        *("onnxruntime-cpu", "CPUExecutionProvider", 1, 1),
    )
    assert (found.steps, found.rounds, list(found.engines)) == (3, 2, ["float32", "compiled"])
    for engine in found.engines.values():
        low, high = engine.latency_ms_quartiles
        assert 0 < low <= engine.latency_ms <= high
        assert engine.trajectory_ms > 0
        assert engine.peak_bytes >= engine.resident_bytes > 0
        assert engine.peak_bytes < 100e6  # of the graph, and not of torch, which would be some hundreds
    compiled = found.engines["compiled"]
    assert compiled.file_bytes == sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    parameters = sum(parameter.numel() for parameter in tiny_dit().parameters())
    assert found.size_ratio_fp16 == pytest.approx(2 * parameters / compiled.file_bytes)
    assert found.peak_memory_ratio == found.engines["float32"].peak_bytes / compiled.peak_bytes
    assert found.trajectory_speedup_fp32 > 0
    assert found.trajectory_cpu_speedup_fp32 > 0
    assert list(found.left_out) == ["float16"]
    assert found.gpu_latency_ms is found.energy_joules is None
    assert found.filled_by.keys() == {"gpu_latency_ms", "energy_joules"}


def test_medians_are_of_calls_and_of_trajectories(dit):
    spent = {
        "float32": [Spent((0.1, 0.3), (0.1, 0.1)), Spent((0.2, 0.4), (0.2, 0.2)), Spent((1.0, 0.2), (0.1, 0.1))],
        "compiled": [Spent((0.1, 0.1), (0.1, 0.1)), Spent((0.1, 0.1), (0.05, 0.05)), Spent((0.1, 0.1), (0.1, 0.1))],
    }
    assert _speedup(spent, lambda one: one.clock) == pytest.approx(3)  # of 2, 3 and 6
    assert _speedup(spent, lambda one: one.cpu) == pytest.approx(1)  # of 1, 4 and 1
    figures = _figures(dit[FLOAT_GRAPH], Loaded("CPUExecutionProvider", 0.5, None, None), spent["float32"])
    assert (figures.load_ms, figures.resident_bytes) == (500, None)
    assert (figures.latency_ms, figures.cpu_ms, figures.trajectory_ms) == pytest.approx((250, 100, 600))


def test_the_graph_in_float16_is_half_as_large_and_computes_the_same(dit, tmp_path):
    from intaglio.exporters.runtimes.calls import graph_denoise
    from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime

    call = dit[TRAJECTORY].call(1)
    half = half_graph(dit[FLOAT_GRAPH], tmp_path)
    assert half.size_bytes < 0.7 * dit[FLOAT_GRAPH].size_bytes
    found, expected = (graph_denoise(graph, OnnxRuntime(), threads=1)(call) for graph in (half, dit[FLOAT_GRAPH]))
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.01  # 2^-11 in every layer


def test_commands_for_a_device_name_every_dynamic_input(dit):
    commands = _commands(load_target("tensorrt-11"), dit[FLOAT_GRAPH], rows=2)
    assert "--shapes=hidden_states:2x3x8x8,timestep:2,class_labels:2 " in commands["gpu_latency_ms"]
    assert "tensorrt_rtx --loadEngine" in _commands(load_target("tensorrt-rtx"), dit[FLOAT_GRAPH], 2)["gpu_latency_ms"]


def test_the_sample_draws_through_a_pipeline_of_diffusers(folder, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("draw", Path(__file__).parents[3] / "samples/draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    store = Store(folder.parent / "store")
    made = {key: made_from(folder, store, key) for key in (MODEL, FLOAT_GRAPH, GRAPH)}
    monkeypatch.setattr(draw, "compiled", lambda recipe, store: made)
    draw.main(Path(), Path("draw.png"), Path(), samples=2, seed=0, rounds=1, threads=1, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert (figures["samples"], figures["steps"]) == (2, 3)
    assert figures["trajectory_ms"].keys() == {"full_precision", "float32", "compiled"}
    assert figures["trajectory_speedup_fp32"] > 0
    full, below = np.split(np.asarray(Image.open("draw.png")).astype(float), 2)
    psnr = 10 * np.log10(255**2 / np.square(full - below).reshape(96, 2, -1).mean((0, 2)))
    assert figures["psnr_db"] == pytest.approx(psnr.mean(), abs=0.5)
    assert figures["psnr_db"] > 12  # random weights, three steps from pure noise
