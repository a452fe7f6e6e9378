"""An engine in the place of a denoiser, as far as that can be seen without a GPU."""

import sys
from pathlib import Path

import pytest
import tensorrt_standin
import torch
from compiled import compiled

import intaglio
from intaglio.exporters.deploy import kit
from intaglio.exporters.deploy.denoiser import CompiledDenoiser
from intaglio.exporters.runtimes.tensorrt.engine import on_tensors
from intaglio.exporters.runtimes.tensorrt.kit_scripts.run import Execution, read_case
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.errors import CallError, MissingExtra, RecipeError, TargetError

CPU = torch.device("cpu")
STREAM = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an engine that knows the calls of a kit."""
    folder = compiled(tmp_path_factory.mktemp("build") / "tensorrt-10.3-orin")
    shapes = {"x": (2, 16, 64), "timestep": (2,), "step": ()}
    names = []
    for number, case in enumerate(kit._cases(Graph.load(folder), shapes)):
        names.append(folder.parent / f"{number}.npz")
        names[-1].write_bytes(kit._npz(case))
    Engine("tensorrt", "10.3.0", None, None, plan="\n".join(("1.0", *map(str, names))).encode()).save(folder)
    return folder


def execution(folder: Path) -> Execution:
    return Execution(tensorrt_standin, (folder / "engine.plan").read_bytes())


def case(folder: Path, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs, outputs = read_case(folder.parent / f"{number}.npz")
    return {n: torch.from_numpy(inputs[n]) for n in ("x", "timestep")}, torch.from_numpy(outputs["y"])


def test_it_reads_and_writes_where_the_tensors_are(folder):
    engine, streams = execution(folder), []
    call = on_tensors(Graph.load(folder), engine, CPU, lambda: streams.append(STREAM) or STREAM)
    for number in range(3):  # at each step
        inputs, expected = case(folder, number)
        found = call(inputs)["y"]
        assert torch.equal(found, expected)
        used = engine._context._addresses
        assert (used["x"], used["timestep"], used["y"]) == tuple(
            tensor.data_ptr() for tensor in (inputs["x"], inputs["timestep"], found)
        )
        assert engine._context._shapes == {"x": (2, 16, 64), "timestep": (2,)}
    assert streams == [STREAM] * 3


def test_it_stands_in_the_place_of_a_denoiser(folder):
    graph = Graph.load(folder)
    denoiser = CompiledDenoiser(graph, on_tensors(graph, execution(folder), CPU, lambda: STREAM))
    inputs, expected = case(folder, 1)
    assert torch.equal(denoiser(inputs["x"], 600).sample, expected)


def test_a_size_that_the_engine_was_not_built_for_is_refused(folder):
    call = on_tensors(Graph.load(folder), execution(folder), CPU, lambda: STREAM)
    inputs = {"x": torch.zeros(8, 16, 64), "timestep": torch.full((8,), 900.0)}
    with pytest.raises(
        CallError, match=r"x has the shape \(8, 16, 64\), but the engine is for \(1, 16, 64\) to \(4, 1"
    ):
        call(inputs)


def test_what_the_runtime_does_not_run_is_an_error(folder):
    call = on_tensors(Graph.load(folder), execution(folder), CPU, lambda: STREAM)
    inputs, _ = case(folder, 0)
    with pytest.raises(CallError, match="the engine does not run: it gives no reason"):
        call(inputs | {"x": inputs["x"] + 1})


def test_without_a_gpu_it_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"its engine needs a GPU, and torch .* finds none"):
        intaglio.load(folder, backend="tensorrt")


def test_an_engine_of_another_version_is_to_be_built_again(tmp_path, monkeypatch):
    compiled(tmp_path / "tensorrt-10.3-orin")
    Engine("tensorrt", "10.16.2", None, None, plan=b"1.0").save(tmp_path / "tensorrt-10.3-orin")
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = (
        r"10\.3\.0 cannot load the engine, which tensorrt 10\.16\.2 built: build it again here: incompatible serial"
    )
    with pytest.raises(TargetError, match=message):
        intaglio.load(tmp_path / "tensorrt-10.3-orin", backend="tensorrt")


def test_a_folder_without_an_engine_of_the_backend_is_told_so(folder, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"its engine was built by tensorrt, not by tensorrt-rtx"):
        intaglio.load(folder, backend="tensorrt-rtx")
    with pytest.raises(RecipeError, match=r"no engine.plan in it: build it on the device"):
        intaglio.load(compiled(tmp_path / "tensorrt-rtx"), backend="tensorrt-rtx")
    with pytest.raises(RecipeError, match="no backend 'tensorrt-rt': did you mean 'tensorrt-rtx'"):
        intaglio.load(folder, backend="tensorrt-rt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"the backend 'tensorrt' needs the extra 'tensorrt'"):
        intaglio.load(folder, backend="tensorrt")
