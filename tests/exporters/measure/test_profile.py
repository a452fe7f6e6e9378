"""The times of kernels are counted for the layers that the kernels compute."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from harness import run_pass
from layers import SCHEMES, make
from onnx import helper
from typer.testing import CliRunner, Result

from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.measure.profile import ProfileLayers, _kernels, _owners_of_kernels, read_trtexec
from intaglio.pipeline.artifacts.keys import GRAPH, PLAN, PROFILE, TARGET
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.formats.target import load_target

WANTED = {"a": SCHEMES["w8a8_token"], "b": SCHEMES["w4a16"], "c": SCHEMES["w8a8_step"]}


def made(folder: Path, runtime: str) -> dict:
    """Three layers on one input, and one that the graph does not have."""
    layers = {name: torch.nn.Linear(64, out) for name, out in (("a", 32), ("b", 64), ("c", 96))}
    graph, _ = make(folder, layers, (2, 5, 64), WANTED, runtime)
    table = [Layer(name=n, op="linear", shape=tuple(m.weight.shape), bias=True) for n, m in layers.items()]
    table.append(Layer(name="folded", op="linear", shape=(8, 8), bias=False))
    plan = QuantPlan(tuple(table), {**WANTED, "folded": FLOAT})
    target = "onnxruntime-cpu" if runtime == "onnxruntime" else "tensorrt-11"
    return {GRAPH: graph, PLAN: plan, TARGET: load_target(target)}


@pytest.fixture
def for_onnxruntime(tmp_path):
    return made(tmp_path / "made", "onnxruntime")


@pytest.fixture
def for_tensorrt(tmp_path):
    return made(tmp_path / "made", "tensorrt")


def test_every_layer_is_timed_in_its_scheme(for_onnxruntime, tmp_path):
    found = run_pass(ProfileLayers(runs=3, rows=4), for_onnxruntime, tmp_path / "scratch")[PROFILE]
    assert (found.rows, found.runs) == (4, 3)
    assert found.runtime == "onnxruntime"
    assert found.made_by.startswith("onnxruntime 1.")
    assert {name: time.scheme for name, time in found.layers.items()} == {n: s.name for n, s in WANTED.items()}
    assert found.layers["a"].bytes == 64 * 32 + 4 * 32 * 2
    assert found.layers["b"].bytes == 64 * 64 * 5 // 8 + 4 * 64 * 2
    assert found.missing == ("folded",)
    assert found.rest_microseconds == {}  # every node of this graph is of a layer, whatever it was fused to
    found.save(tmp_path)
    assert Profile.load(tmp_path) == found


def test_a_graph_for_another_runtime_is_not_timed_here(for_tensorrt, tmp_path):
    with pytest.raises(TargetError, match="tensorrt-11 is not for ONNX Runtime: time its engine with trtexec"):
        run_pass(ProfileLayers(), for_tensorrt, tmp_path / "scratch")
    assert not ProfileLayers.applies(load_target("tensorrt-rtx"))


def test_kernels_are_summed_over_their_parts_in_each_call():
    def event(name: str, dur: int, index: int = 1, cat: str = "Node") -> dict:
        return {"cat": cat, "name": name, "dur": dur, "args": {"op_name": "Add", "node_index": str(index)}}

    events = [
        *(event("a_kernel_time", dur) for dur in (9, 1, 2)),
        *(event("a_kernel_time", dur, index=2) for dur in (1, 1, 1)),  # another node of the same name
        *(event("body_kernel_time", dur) for dur in (1, 2, 3, 4, 5, 6)),  # twice in each call
        *(event("a_fence_before", 50), event("model_run", 99, cat="Session")),
    ]
    assert list(_kernels(events, 3)) == [
        *(("a", "Add", [9, 1, 2]), ("a", "Add", [1, 1, 1]), ("body", "Add", [3, 7, 11])),
    ]


def test_fused_nodes_belong_to_the_layer_whose_values_or_weights_they_have():
    def node(op: str, name: str, inputs: list[str], output: str, layer: str = "") -> onnx.NodeProto:
        made = helper.make_node(op, inputs, [output], name=name)
        if layer:
            made.metadata_props.add(key=LAYER_KEY, value=layer)
        return made

    def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
        weights = [helper.make_tensor(name, 1, [1], [1.0]) for name in ("w", "v", "u")]
        return helper.make_model(helper.make_graph(nodes, "g", [], [], weights))

    written = model(
        node("MatMul", "a/MatMul", ["x", "w"], "a.product", "a"),
        node("Add", "a/Add", ["a.product", "u"], "a.y", "a"),
        node("Conv", "c/Conv", ["a.y", "v"], "c.y", "c"),
        node("Relu", "relu", ["c.y"], "y"),
    )
    executed = model(
        node("Gemm", "a/MatMul/MatMulAddFusion", ["x", "w_packed"], "a.y"),
        node("Conv", "c.y_nchwc", ["reordered", "v_reordered"], "reorder"),
        node("FusedGemm", "with activation", ["x", "w"], "y"),
        node("Relu", "relu", ["c.y"], "z"),
    )
    owners = {"a/MatMul/MatMulAddFusion": "a", "c.y_nchwc": "c", "with activation": "a"}
    assert _owners_of_kernels(written, executed) == owners


def trtexec(folder: Path, **milliseconds: float) -> Path:
    """As --exportProfile writes it."""
    kernels = [
        {"name": name, "timeMs": 10 * took, "averageMs": 2 * took, "medianMs": took, "percentage": 1.0}
        for name, took in milliseconds.items()
    ]
    (folder / "times.json").write_text(json.dumps([{"count": 10}, *kernels]))
    return folder / "times.json"


def test_kernels_of_tensorrt_are_read_by_the_nodes_in_their_names(for_tensorrt, tmp_path):
    graph, plan = for_tensorrt[GRAPH], for_tensorrt[PLAN]
    times = trtexec(
        tmp_path,
        **{
            "Reformatting CopyNode for Input Tensor 0 to a/MatMul": 0.001,
            "a/MatMul + PWN(a/bias/Add)": 0.004,
            "b/MatMul || c/MatMul": 0.010,
            "{ForeignNode[a/MatMul...c/MatMul]}": 0.5,
            "__myl_Softmax_1": 0.25,
        },
    )
    found = read_trtexec(graph, plan, times)
    took = {name: time.microseconds for name, time in found.layers.items()}
    assert took == pytest.approx({"a": 5.0, "b": 10 * 64 / (64 + 96), "c": 10 * 96 / (64 + 96)})
    assert found.rest_microseconds == {"{ForeignNode[a/MatMul...c/MatMul]}": 500.0, "__myl_Softmax_1": 250.0}
    assert (found.runtime, found.made_by, found.runs, found.rows, found.missing) == (
        "tensorrt",
        "trtexec",
        10,
        None,
        ("folded",),
    )


def test_names_without_nodes_are_looked_up_in_the_layer_information(for_tensorrt, tmp_path):
    graph, plan = for_tensorrt[GRAPH], for_tensorrt[PLAN]
    times = trtexec(tmp_path, __myl_Fc_0=0.003, __myl_Move_1=0.002)
    with pytest.raises(RecipeError, match=r"none of its 2 kernels names a node of .*: run trtexec with"):
        read_trtexec(graph, plan, times)
    metadata = "[ONNX Layer: a/bias/Add]\x1e[ONNX Layer: b/MatMul]"
    info = {"Layers": [{"Name": "__myl_Fc_0", "Metadata": metadata}, {"Name": "__myl_Move_1"}], "Bindings": []}
    (tmp_path / "layers.json").write_text(json.dumps(info))
    found = read_trtexec(graph, plan, times, tmp_path / "layers.json")
    # the product counts, not what is fused to it
    assert {name: time.microseconds for name, time in found.layers.items()} == {"b": 3.0}
    assert found.rest_microseconds == {"__myl_Move_1": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "null",
        "7",
        '[{"count": 0}]',
        '[{"count": 1}, {"name": "a", "medianMs": NaN}]',
        '[{"count": 1}, {"name": "a"}]',
        "no",
    ],
)
def test_files_of_something_else_are_refused(for_tensorrt, tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(RecipeError, match=r"times\.json: (is not|none of its)"):
        read_trtexec(for_tensorrt[GRAPH], for_tensorrt[PLAN], tmp_path / "times.json")


def intaglio(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def published(artifacts: dict, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for key in (GRAPH, PLAN):
        artifacts[key].save(folder)
    return folder


def test_the_command_prints_and_writes_what_assign_reads(for_onnxruntime, tmp_path):
    folder = published(for_onnxruntime, tmp_path / "build/onnxruntime-cpu")
    result = intaglio("profile", str(folder), "--runs", "2", "--rows", "3", "--json", "--out", "times.json")
    assert result.exit_code == 0, result.stderr
    found = Profile.model_validate_json(result.stdout)
    assert (found.runs, found.rows, set(found.layers)) == (2, 3, {"a", "b", "c"})
    assert (tmp_path / "times.json").read_text() == result.stdout
    rows = [line.split() for line in intaglio("profile", str(folder), "--runs", "1").stdout.splitlines()]
    assert {(row[0], row[1], row[3]) for row in rows if len(row) == 4 and row[0] in WANTED} == {
        *(("a", "w8a8_token", "2,304"), ("b", "w4a16", "3,072"), ("c", "w8a8_step", "6,912")),
    }
    assert ["folded", "no", "kernel"] in rows


def test_the_command_reads_trtexec(for_tensorrt, tmp_path):
    folder = published(for_tensorrt, tmp_path / "build/tensorrt-11")
    refused = intaglio("profile", str(folder))
    assert refused.exit_code == 2
    assert "tensorrt-11 is not for ONNX Runtime: give trtexec's --exportProfile as --trtexec" in refused.stderr
    times = trtexec(tmp_path, **{"c/MatMul": 0.5})
    result = intaglio("profile", str(folder), "--trtexec", str(times), "--json")
    assert json.loads(result.stdout)["layers"] == {"c": {"scheme": "w8a8_step", "microseconds": 500.0, "bytes": 6912}}


def test_a_folder_of_something_else_is_refused(tmp_path):
    result = intaglio("profile", str(tmp_path))
    assert result.exit_code == 2
    assert "no graph.json in it: give the folder of one target" in result.stderr
