"""A large model's float graph leaves its weights in the model's files, and everything that follows stays the same."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from harness import Artifacts, full_disk, run_pass
from loras import written
from quantizing import TO_GRAPH, rel_l2
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio import Recipe, Store, compile
from intaglio.exporters.float_graph import agreement, in_parts, own_weights
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.float_graph.own_weights import ModelWeights, whole_graph
from intaglio.exporters.float_graph.turned import origin, turned
from intaglio.exporters.measure.benchmark import MeasureLatency
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, LATENCY, MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.errors import ContractError, RecipeError, StepFailed
from intaglio.pipeline.model import stored_weights
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import CompiledTarget
from intaglio.pipeline.runs.store import remove_tree

MODELS = {"dit": (tiny_dit, "[onnxruntime-cpu, tensorrt-rtx]"), "unet": (tiny_unet, "[tensorrt-rtx]")}
RECIPE = f"""
model: {{path: model, sampling_steps: 2, guidance: 2.0, loras: [{{path: lora.safetensors, scale: 0.5}}]}}
{TO_GRAPH}"""
ROOM = 500_000
"""Bytes that a file may have: less than the weights of the models take in float32, and more than anything else."""


class Both(NamedTuple):
    """A recipe's results for each target, with a float graph that has its weights and with one that leaves them out."""

    whole: dict[str, CompiledTarget]
    left: dict[str, CompiledTarget]


@contextmanager
def leaving_out() -> Iterator[None]:
    """Treat every model as a large one, and end a part of its graph at nearly every layer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stored_weights, "LEAST_BYTES", 4096)
        patched.setattr(own_weights, "LARGE_BYTES", 1)
        patched.setattr(in_parts, "PART_BYTES", 20_000)
        yield


def shards(module: torch.nn.Module, folder: Path) -> Path:
    """Save the model in shards in bfloat16."""
    save_folder(module, folder)
    place = folder / ("unet" if (folder / "unet").exists() else "transformer")
    shutil.rmtree(place)
    module.bfloat16().save_pretrained(place, max_shard_size="100KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    return folder


def compiled(folder: Path, store: str, targets: str) -> dict[str, CompiledTarget]:
    return dict(compile(Recipe.parse(f"targets: {targets}{RECIPE}"), Store(folder / store), base=folder))


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder, (make, targets) = tmp_path_factory.mktemp("both"), MODELS[request.param]
    shards(make(), folder / "model")
    written(make(), folder)
    whole = compiled(folder, "whole", targets)
    with leaving_out():
        return Both(whole, compiled(folder, "left", targets))


on_the_dit = pytest.mark.parametrize("both", ["dit"], indirect=True)


def export(made: CompiledTarget, scratch: Path) -> Artifacts:
    return run_pass(ExportFloat(), {MODEL: made[MODEL], TRAJECTORY: made[TRAJECTORY]}, scratch)


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.onnx", "model.onnx.data")]


def test_all_that_follows_is_the_same_and_the_weights_are_not_stored_again(both: Both) -> None:
    for target, whole in both.whole.items():
        left = both.left[target]
        same = [key for key in whole.outputs if whole.outputs[key] == left.outputs[key]]
        assert set(whole.outputs) - set(same) == {FLOAT_GRAPH}
        weights = sum(parameter.numel() for parameter in left[MODEL].empty().parameters())
        sizes = {
            name: sum(file.stat().st_size for file in made.store.root.rglob("*") if file.is_file())
            for name, made in (("whole", whole), ("left", left))
        }
        assert sizes["whole"] - sizes["left"] > 0.75 * 4 * weights  # the rest is small tensors, which stay
        assert left[FLOAT_GRAPH].size_bytes < 0.25 * 4 * weights < whole[FLOAT_GRAPH].size_bytes
        assert not left[GRAPH].weights


def test_a_graph_that_asks_for_its_weights_is_the_whole_graph_and_computes_what_torch_does(both: Both, tmp_path: Path):
    whole, left = both.whole["tensorrt-rtx"], both.left["tensorrt-rtx"]
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "model.onnx.data").write_bytes(b"of a run that was killed")
    with leaving_out(), whole_graph(left[FLOAT_GRAPH], left[MODEL], tmp_path / "asked") as graph:
        assert digests(graph.path.parent) == digests(whole[FLOAT_GRAPH].path.parent)
        assert replace(graph, path=whole[FLOAT_GRAPH].path) == whole[FLOAT_GRAPH]
        model, call = left[MODEL].open(), left[TRAJECTORY].call(1)
        with torch.no_grad():
            expected = denoise_with(model.module, model)(call)
        assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), expected) < 1e-5
    assert list(tmp_path.iterdir()) == []
    with whole_graph(whole[FLOAT_GRAPH], None, tmp_path / "asked") as graph:
        assert graph.path == whole[FLOAT_GRAPH].path
    assert list(tmp_path.iterdir()) == []


@on_the_dit
def test_the_float_graph_is_timed_with_its_weights_which_are_removed_afterwards(both: Both, tmp_path: Path) -> None:
    left, step = both.left["onnxruntime-cpu"], MeasureLatency(rows=2, rounds=1)
    artifacts = {key: left[key] for key in (FLOAT_GRAPH, GRAPH, TARGET, TRAJECTORY, MODEL)}
    with leaving_out():
        assert run_pass(step, artifacts, tmp_path / "scratch")[LATENCY].float32_ms > 0
        assert step.stored_bytes(100, 50) == 400
    assert step.stored_bytes(100, 50) == 0
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(ContractError, match="give MODEL"):
        run_pass(step, {key: value for key, value in artifacts.items() if key != MODEL}, tmp_path / "scratch")


@on_the_dit
def test_a_killed_step_goes_on_with_a_disk_that_does_not_take_all_weights(both: Both, tmp_path: Path, monkeypatch):
    left = both.left["tensorrt-rtx"]
    shutil.copytree(left.store.root.parent, tmp_path / "again")
    (record,) = (run for run in left.runs if run.step == "export-float")
    (tmp_path / "again" / "left" / "runs" / f"{record.key}.json").unlink()
    remove_tree(tmp_path / "again" / "left" / "objects" / record.outputs["FLOAT_GRAPH"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with full_disk(ROOM), pytest.raises(OSError, match=r"problem writing|File too large"):
        export(both.whole["tensorrt-rtx"], tmp_path / "whole")
    with leaving_out(), full_disk(ROOM):
        with monkeypatch.context() as patched:
            patched.setattr(agreement, "check_outputs", killed)
            with pytest.raises(KeyboardInterrupt):
                compiled(tmp_path / "again", "left", "[tensorrt-rtx]")
        assert list((tmp_path / "again" / "left" / "scratch").iterdir()) != []
        assert compiled(tmp_path / "again", "left", "[tensorrt-rtx]")["tensorrt-rtx"].outputs == left.outputs
    assert list((tmp_path / "again" / "left" / "scratch").iterdir()) == []


@on_the_dit
def test_a_weight_that_is_read_wrongly_is_found_by_the_comparison_with_torch(both: Both, tmp_path: Path, monkeypatch):
    read = ModelWeights.__getitem__
    monkeypatch.setattr(ModelWeights, "__getitem__", lambda self, name: np.flip(read(self, name), 0).copy())
    with leaving_out(), pytest.raises(StepFailed, match="the exported graph differs from torch by"):
        export(both.left["tensorrt-rtx"], tmp_path / "export")


@on_the_dit
def test_a_graph_without_its_weights_says_what_it_needs(both: Both, tmp_path: Path) -> None:
    graph = both.left["tensorrt-rtx"][FLOAT_GRAPH]
    with pytest.raises(RecipeError, match=rf"leaves {len(graph.weights)} weights to the model's own files"):
        graph_denoise(graph, OnnxRuntime())
    with pytest.raises(ContractError, match="leaves its weights to the model: give MODEL"):
        ModelWeights(graph, None)
    other = save_folder(tiny_unet(), tmp_path)
    with pytest.raises(RecipeError, match=r"from a model with a weight \S+, which \w+ lacks: run the recipe again"):
        ModelWeights(graph, Checkpoint.resolve(ModelRef(path=str(other)), tmp_path))


def test_the_origin_of_a_constant_that_was_transposed_twice_is_the_weight() -> None:
    weight = ir.Tensor(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    twice = turned(turned(weight, (1, 0, 2), "once"), (2, 0, 1), "twice")
    constant, axes = origin(twice)
    assert constant is weight
    assert tuple(twice.shape) == (4, 3, 2)
    np.testing.assert_array_equal(constant.numpy().transpose(axes), twice.numpy())
