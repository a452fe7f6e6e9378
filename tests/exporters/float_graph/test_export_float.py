import contextlib
import copy
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import rel_l2

from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.verify.layer_run import layer_model
from intaglio.pipeline.artifacts.graph import Graph, TensorSpec
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.errors import StepFailed, TargetError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.hooks import after_calls
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.numerics.quality import SampleRange


class Opened(Checkpoint):
    """A checkpoint whose model is already there."""

    def __init__(self, module: torch.nn.Module, **options) -> None:
        super().__init__(Path(), ModelRef(path="toy"))
        object.__setattr__(self, "factory", DenoiserModel(module.eval(), None, (2, 4, 4), **options))

    def open(self, *, stored: bool) -> DenoiserModel:
        return self.factory


class Odd(torch.nn.Module):
    """A layer called twice, two layers with one weight, one that is never called, and a division by almost zero.

    Two layers are equal and read the same.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.left, self.right, self.never, self.one = (torch.nn.Linear(4, 4) for _ in range(5))
        self.right.weight = self.left.weight
        self.same = copy.deepcopy(self.one)

    def forward(self, sample, timestep):
        x = self.twice(torch.nn.functional.gelu(self.twice(sample)))
        x = self.one(x) * self.same(x)
        zero = sample - sample
        return self.left(x) + self.right(sample) + zero / (zero.abs() + 1e-12) + timestep.reshape(-1, 1, 1, 1)


class Broken(torch.nn.Module):
    """ONNX has no NaN-free way to compute it."""

    def forward(self, sample, timestep):
        return sample / (sample - sample) + timestep.reshape(-1, 1, 1, 1)


@torch.no_grad()
def trajectory(module: torch.nn.Module, rows: int) -> Trajectory:
    inputs = {"timestep": torch.full((1, rows), 7.0), "sample": torch.ones(1, rows, 2, 4, 4).cumsum(-1).cumsum(1)}
    outputs = module(**{name: value[0] for name, value in inputs.items()})[None]
    return Trajectory((7.0,), inputs, outputs, {}, {}, {}, {}, samples=SampleRange(-1.0, 1.0, 0.25))


def export(module: torch.nn.Module, folder: Path, rows: int = 2, **options) -> Graph:
    artifacts = {MODEL: Opened(module, **options), TRAJECTORY: trajectory(module, rows)}
    return run_pass(ExportFloat(), artifacts, folder)[FLOAT_GRAPH]


def export_odd(folder: Path) -> Graph:
    return export(Odd(), folder, rows=1)


def saved(graph: Graph) -> Path:
    folder = graph.path.parent / "saved"
    folder.mkdir(exist_ok=True)
    graph.save(folder)
    return folder


def digests(folder: Path) -> str:
    return " ".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("model.onnx*")))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return export_odd(tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_magnitudes_are_those_of_the_recorded_calls(name, request):
    artifacts: Artifacts = request.getfixturevalue(name)
    graph, trajectory, model = artifacts[FLOAT_GRAPH], artifacts[TRAJECTORY], artifacts[MODEL].open()
    seen: dict[str, list[float]] = {}
    modules = {layer: model.module.get_submodule(layer) for layer in trajectory.amax}
    note = lambda layer, args, _: seen.setdefault(layer, []).append(float(args[0].abs().max()))  # noqa: E731
    with torch.no_grad(), after_calls(modules, note):
        for step in range(len(trajectory.timesteps)):
            denoise_with(model.module, model)(trajectory.call(step))
    ends = {layer: graph.amax[before] for layer, (before, _) in graph.nodes.items() if before in graph.amax}
    assert len(ends) > 0.8 * len(seen)  # the others read an input of the graph
    for layer, amax in ends.items():
        assert amax == pytest.approx(max(seen[layer]), rel=6e-3), layer  # to three digits
    assert Graph.load(saved(graph)).amax == graph.amax


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_every_layer_is_found_with_its_weight(name, request):
    artifacts: Artifacts = request.getfixturevalue(name)
    model, graph = artifacts[MODEL].open(), artifacts[FLOAT_GRAPH]
    layers = layer_table(model.module)
    assert set(graph.nodes) == {layer.name for layer in layers}
    proto = onnx.load(graph.path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    products = {n.name: n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")}
    for layer in layers:
        node = next(
            products[f"{layer.name}/{op}"] for op in ("MatMul", "Gemm", "Conv") if f"{layer.name}/{op}" in products
        )
        weight = weights[node.input[1]]
        expected = model.module.get_parameter(f"{layer.name}.weight").detach().numpy()
        np.testing.assert_array_equal(weight.T if node.op_type == "MatMul" else weight, expected)


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_graph_computes_what_torch_does_at_any_number_of_rows(name, rows, request):
    artifacts: Artifacts = request.getfixturevalue(name)
    model, call = artifacts[MODEL].open(), artifacts[TRAJECTORY].call(1, slice(rows))
    with torch.no_grad():
        expected = denoise_with(model.module, model)(call)
    # rtol: the order of float32 sums in another implementation
    assert rel_l2(graph_denoise(artifacts[FLOAT_GRAPH], OnnxRuntime())(call), expected) < 1e-5


def test_inputs_have_the_names_of_the_forward(dit):
    graph = dit[FLOAT_GRAPH]
    assert graph.inputs == {
        "hidden_states": TensorSpec("float32", ("batch", 3, 8, 8)),
        "timestep": TensorSpec("float32", ("batch",)),  # its scheduler's are whole, which others' are not
        "class_labels": TensorSpec("int64", ("batch",)),
    }
    assert graph.outputs == {"output": TensorSpec("float32", ("batch", 3, 8, 8))}


def test_nothing_in_the_graph_tells_where_it_was_made(unet):
    proto = onnx.load(unet[FLOAT_GRAPH].path)
    assert {prop.key for node in proto.graph.node for prop in node.metadata_props} == {LAYER_KEY}
    assert not proto.metadata_props
    assert not proto.graph.metadata_props
    assert not any(value.metadata_props for value in (*proto.graph.value_info, *proto.graph.initializer))
    assert b".py" not in unet[FLOAT_GRAPH].path.read_bytes()


def test_another_process_writes_the_same_bytes(odd):
    code = "import sys, test_export_float as t; from pathlib import Path; t.export_odd(Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", code, "again"], env=environment, check=True, capture_output=True)
    assert digests(Path("again")) == digests(odd.path.parent)


def test_a_layer_called_twice_is_one_layer_and_one_never_called_none(odd):
    assert set(odd.nodes) == {"twice", "left", "right", "one", "same"}
    layers = [p.value for n in onnx.load(odd.path).graph.node if n.op_type == "MatMul" for p in n.metadata_props]
    assert sorted(layers) == ["left", "one", "right", "same", "twice", "twice"]


def test_a_tiny_epsilon_is_kept(odd):
    call = trajectory(Odd(), 2).call(0)
    assert graph_denoise(odd, OnnxRuntime())(call).isfinite().all()


def test_a_float_layer_runs_alone(dit):
    model = layer_model(dit[FLOAT_GRAPH], "proj_out_2")
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]


def test_a_graph_that_leaves_torch_is_refused(tmp_path):
    with pytest.raises(StepFailed, match="at 2 rows: the exported graph differs from torch by nan"):
        export(Broken(), tmp_path)


@pytest.mark.parametrize(("share", "refused"), [(2**-11, False), (0.1, True)])
def test_outputs_that_were_recorded_in_float16_are_compared_as_such(share, refused, tmp_path):
    recorded = trajectory(Odd(), 2)
    recorded = replace(recorded, outputs=recorded.outputs * (1 + share), half=True)
    artifacts = {MODEL: Opened(Odd()), TRAJECTORY: recorded}
    with pytest.raises(StepFailed, match=r"1e-02 allowed.*torch\.manual_seed") if refused else contextlib.nullcontext():
        run_pass(ExportFloat(), artifacts, tmp_path)


class Positions(torch.nn.Module):
    """A table of positions: for one size, or made anew outside of torch for each."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size

    def forward(self, sample, timestep):
        table = np.arange(int(self.size or sample.shape[-1]), dtype=np.float32)
        return sample + torch.from_numpy(table) + timestep.reshape(-1, 1, 1, 1)


class Turned(torch.nn.Module):
    """Rows change places."""

    def forward(self, sample, timestep):
        return sample.flip(0) + timestep.reshape(-1, 1, 1, 1)


def test_a_model_whose_rows_are_not_apart_is_refused(tmp_path):
    with pytest.raises(StepFailed, match=r"at 2 rows: the exported graph differs from torch by 2\.2e-01"):
        export(Turned(), tmp_path)


def test_a_model_that_cannot_be_called_at_its_other_size_is_told_so(tmp_path):
    message = r"at the other size the denoiser cannot be called with sample \(2, 2, 4, 8\), timestep \(2,\): The size"
    with pytest.raises(StepFailed, match=message):
        export(Positions(4), tmp_path, other=SecondSize((2, 4, 8)))


def test_an_axis_that_a_table_holds_constant_is_named(tmp_path):
    with pytest.raises(StepFailed, match=r"^sample: the size of axis 3 is fixed at 8, because"):
        export(Positions(None), tmp_path, other=SecondSize((2, 4, 8)))


class Quirks(torch.nn.Module):
    """A model that does what ONNX does not: it squeezes a long axis, and chooses between truth values."""

    def forward(self, sample, timestep):
        x = sample.squeeze(1).squeeze(-1)
        there = (x > 0.5).masked_fill(x > 2.5, False)
        there = torch.where(x < 1, ~there, there)
        return torch.where(there, x, -x) + timestep.reshape(-1, 1, 1, 1)


def test_what_onnx_has_no_operator_for_is_written_otherwise(tmp_path):
    graph = export(Quirks(), tmp_path, other=SecondSize((2, 4, 6)))
    assert graph.inputs["sample"].shape == ("batch", 2, 4, "sample_3")
    assert graph.sizes == {"sample_3": (4, 6)}
    assert not {"Squeeze"} & {node.op_type for node in onnx.load(graph.path).graph.node}


def test_a_graph_keeps_its_sizes_and_its_timestep(tmp_path, odd):
    kept = replace(odd, sizes={"sample_3": (4, 6)}, timestep=None)
    kept.save(tmp_path)
    assert Graph.load(tmp_path) == replace(kept, path=tmp_path / "model.onnx")


def test_an_opset_beyond_the_target_is_refused():
    with pytest.raises(TargetError, match="opset 22, but onnxruntime-cpu reads up to 21"):
        ExportFloat(opset=22).check(load_target("onnxruntime-cpu").model_copy(update={"opset_max": 21}))


def test_the_shapes_of_attention_scores_are_known(dit):
    model = onnx.load(dit[FLOAT_GRAPH].path, load_external_data=False)
    types = {value.name: value.type.tensor_type for value in model.graph.value_info}
    shapes = {name: [d.dim_param or d.dim_value for d in found.shape.dim] for name, found in types.items()}
    scores = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert [shapes[node.input[0]] for node in scores] == [["batch", 2, 16, 16]] * 2
    assert [shapes[node.output[0]] for node in scores] == [["batch", 2, 16, 16]] * 2
