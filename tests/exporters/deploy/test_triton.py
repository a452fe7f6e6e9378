"""A model repository is what Triton's schema takes, and what it holds computes what the compiled folder does."""

import importlib.util
import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import onnxruntime
import pytest
from compiled import compiled, delivered
from google.protobuf import text_format
from harness import run_pass
from quantizing import with_plan
from typer.testing import CliRunner

from intaglio.exporters.deploy.triton import wide_int8_weights, write_model
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import noise_feed
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.artifacts.keys import GRAPH, TARGET
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError, StoreError, TargetError
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import load_target

PLAN = b"built on the device"


def parsed(config: Path):
    """Parse by the schema that the server publishes, from a module of its client that imports no grpc."""
    try:
        file = distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    except PackageNotFoundError:
        pytest.skip("tritonclient is not installed")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    return text_format.Parse(config.read_text(), schema.ModelConfig()), schema


def facts(tensor, schema) -> tuple:
    reshaped = list(tensor.reshape.shape) if tensor.HasField("reshape") else None
    return tensor.name, schema.DataType.Name(tensor.data_type), list(tensor.dims), reshaped


def without_step(folder: Path) -> Path:
    """As of schemes whose scales no step changes."""
    graph = json.loads((folder / "graph.json").read_text())
    del graph["inputs"]["step"]
    (folder / "graph.json").write_text(json.dumps(graph))
    return delivered(folder)


def with_engine(folder: Path, runtime: str = "tensorrt") -> Path:
    Engine(runtime, "10.3", None, None, command="trtexec --onnx=model.onnx").save(folder)
    (folder / "engine.plan").write_bytes(PLAN)
    return delivered(folder)


@pytest.fixture
def cpu() -> Path:
    return compiled(Path("build/emoji/onnxruntime-cpu"))


@pytest.fixture
def engine() -> Path:
    return with_engine(without_step(compiled(Path("build/emoji/tensorrt-10"))))


def served(model: Path, version: int, inputs: dict) -> list[np.ndarray]:
    """Compute as the server does: in ONNX Runtime with no setting but the threads, after its reshapes."""
    config, _ = parsed(model / "config.pbtxt")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(model / str(version) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    axes = {value.name: value.shape for value in session.get_inputs()}
    feed = {}
    for tensor in config.input:
        sent = inputs[tensor.name].reshape(inputs[tensor.name].shape or (1,))
        if tensor.HasField("reshape"):
            sent = sent.reshape(len(sent), 1)  # as a client has to send it
        shape = sent.shape[1:] if config.max_batch_size else sent.shape
        assert len(shape) == len(tensor.dims)
        assert all(wanted in (-1, axis) for wanted, axis in zip(tensor.dims, shape, strict=True))
        if tensor.HasField("reshape"):
            sent = sent.reshape(len(sent), *tensor.reshape.shape)
        feed[tensor.name] = sent.reshape(()) if axes[tensor.name] == [] else sent
    return session.run([tensor.name for tensor in config.output], feed)


def test_a_graph_with_a_step_takes_it_as_one_number_and_computes_the_same(cpu):
    model = write_model(cpu, Path("repository"))
    assert model == Path("repository/emoji-onnxruntime-cpu")
    assert sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()) == [
        *("1/model.onnx", "1/model.onnx.data", "config.pbtxt")
    ]
    config, schema = parsed(model / "config.pbtxt")
    assert (config.name, config.platform, config.max_batch_size) == (model.name, "onnxruntime_onnx", 0)
    assert [facts(tensor, schema) for tensor in (*config.input, *config.output)] == [
        ("x", "TYPE_FP32", [-1, 16, 64], None),
        ("timestep", "TYPE_FP32", [-1], None),
        ("step", "TYPE_INT64", [1], None),
        ("y", "TYPE_FP32", [-1, 16, 64], None),
    ]
    assert config.parameters["timesteps"].string_value == "900 600 300"
    assert not config.HasField("dynamic_batching")
    assert [group.kind for group in config.instance_group] == [schema.ModelInstanceGroup.KIND_CPU]
    graph = Graph.load(cpu)
    feed = noise_feed(graph, {"x": (2, 16, 64), "timestep": (2,)}, np.random.default_rng(0), step=2)
    (expected,) = open_session(graph.path).run(None, feed)
    (found,) = served(model, 1, feed)
    np.testing.assert_array_equal(found, expected)


def test_kernels_are_in_the_graph_as_the_server_is_told_none(dit, monkeypatch):
    schemes = {"attn1": w4a16(32), "ff": W8A8_TOKEN}
    artifacts = with_plan(
        dit, lambda layer: next((scheme for part, scheme in schemes.items() if f".{part}." in layer.name), FLOAT)
    )
    artifacts |= run_pass(ExportQdq(), artifacts | {TARGET: load_target("onnxruntime-cpu")}, Path("qdq"))
    graph, folder = artifacts[GRAPH], Path("build/dit/onnxruntime-cpu")
    folder.mkdir(parents=True)
    graph.save(folder)
    delivered(folder)
    model = write_model(folder, Path("repository"))
    proto = onnx.load(model / "1/model.onnx")
    levels = [a.i for n in proto.graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels
    assert set(levels) == {1}  # else their inputs are rounded to 8 bits
    tensors = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    weights = [tensors[node.input[1]] for node in proto.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert weights
    assert set(weights) == {onnx.TensorProto.UINT8}  # else pairs are added in 16 bits on CPUs without VNNI
    shapes = {"hidden_states": (2, 3, 8, 8), "timestep": (2,), "class_labels": (2,)}
    feed = noise_feed(graph, shapes, np.random.default_rng(0))
    config, schema = parsed(model / "config.pbtxt")
    assert config.max_batch_size == 8
    assert facts(config.input[1], schema) == ("timestep", "TYPE_FP32", [1], [])
    assert config.HasField("dynamic_batching")
    (expected,) = open_session(graph.path).run(None, feed)
    (found,) = served(model, 1, feed)
    np.testing.assert_array_equal(found, expected)
    own = write_model(folder, Path("repository"), name="vnni", vnni=True)
    assert len(wide_int8_weights(own / "1/model.onnx")) == len(weights)
    monkeypatch.setattr(
        "intaglio.exporters.runtimes.onnxruntime.session.write_fused",
        lambda _, out, __: copytree(own / "1", out.parent, dirs_exist_ok=True),
    )
    with pytest.raises(TargetError, match=f"leaves {len(weights)} weights int8 on this CPU"):
        write_model(folder, Path("repository"), name="portable")
    assert not Path("repository/portable").exists()


def test_a_graph_for_a_gpu_stays_as_it_is():
    folder = without_step(compiled(Path("build/emoji/onnxruntime-cuda")))
    model = write_model(folder, Path("repository"))
    for file in ("model.onnx", "model.onnx.data"):
        assert (model / "1" / file).read_bytes() == (folder / file).read_bytes()
    config, schema = parsed(model / "config.pbtxt")
    assert [group.kind for group in config.instance_group] == [schema.ModelInstanceGroup.KIND_GPU]


def test_an_engine_is_batched_as_far_as_its_profile(engine):
    model = write_model(engine, Path("repository"), name="emoji")
    assert (model / "1/model.plan").read_bytes() == PLAN
    config, schema = parsed(model / "config.pbtxt")
    assert (config.name, config.platform, config.max_batch_size) == ("emoji", "tensorrt_plan", 4)
    assert [facts(tensor, schema) for tensor in (*config.input, *config.output)] == [
        ("x", "TYPE_FP32", [16, 64], None),
        ("timestep", "TYPE_FP32", [1], []),
        ("y", "TYPE_FP32", [16, 64], None),
    ]
    assert config.HasField("dynamic_batching")
    assert [group.kind for group in config.instance_group] == [schema.ModelInstanceGroup.KIND_GPU]


def test_a_tensor_without_the_batch_keeps_the_batch_among_the_axes(engine):
    file = engine / "graph.json"
    graph = json.loads(file.read_text())
    graph["inputs"]["timestep"]["shape"] = [1]
    graph["inputs"]['odd "name"\\'] = {"dtype": "bool", "shape": ["batch", "odd"]}
    graph["sizes"] = {"odd": [4, 6]}
    file.write_text(json.dumps(graph))
    delivered(engine)
    config, schema = parsed(write_model(engine, Path("repository")) / "config.pbtxt")
    assert config.max_batch_size == 0
    assert [facts(tensor, schema) for tensor in config.input] == [
        ("x", "TYPE_FP32", [-1, 16, 64], None),
        ("timestep", "TYPE_FP32", [1], None),
        ('odd "name"\\', "TYPE_BOOL", [-1, -1], None),
    ]


def test_versions_stand_beside_each_other_and_nothing_is_overwritten(engine):
    repository = Path("models/repository")
    write_model(engine, repository)
    (engine / "engine.plan").write_bytes(b"another")
    with pytest.raises(RecipeError, match="has a version 1: choose another --version or --name"):
        write_model(engine, repository)
    model = write_model(engine, repository, version=2)
    assert {path.parent.name: path.read_bytes() for path in model.glob("*/model.plan")} == {"1": PLAN, "2": b"another"}
    (model / "config.pbtxt").write_text("platform: 'tensorrt_plan'")
    with pytest.raises(RecipeError, match="exists with another configuration"):
        write_model(engine, repository, version=3)
    assert sorted(path.name for path in model.iterdir()) == ["1", "2", "config.pbtxt"]


def test_what_cannot_be_written_leaves_nothing(cpu):
    (cpu / "model.onnx.data").write_bytes(b"half of it")
    with pytest.raises(RecipeError, match=r"model\.onnx\.data: has 10 bytes, but 4096 were delivered: run"):
        write_model(cpu, Path("models/repository"))
    assert list(Path("models").rglob("*")) == []


def test_a_place_that_cannot_be_written_is_named(engine):
    Path("file").write_text("")
    with pytest.raises(StoreError, match=r"emoji-tensorrt-10: cannot be written \(Not a directory\)"):
        write_model(engine, Path("file/repository"))


def changed(folder: Path, **facts) -> Path:
    file = folder / "graph.json"
    graph = json.loads(file.read_text())
    graph["inputs"]["x"] |= facts
    file.write_text(json.dumps(graph))
    return delivered(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: with_engine(compiled(f)), "step: the TensorRT backend of Triton cannot take scalars"),
        (lambda f: changed(with_engine(without_step(compiled(f))), dtype="float8e4m3fn"), "x: float8e4m3fn is no type"),
        (lambda f: with_engine(without_step(compiled(f)), "tensorrt-rtx"), "no engine.json of TensorRT in it"),
        (lambda f: without_step(compiled(f)), "no engine.json of TensorRT in it"),
    ],
)
def test_an_engine_that_triton_does_not_serve_is_refused(make, message):
    folder = make(Path("build/emoji/tensorrt-10"))
    with pytest.raises((RecipeError, TargetError), match=re.escape(message)):
        write_model(folder, Path("repository"))
    assert not Path("repository").exists()


def command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["triton", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout + done.stderr


def test_the_command_takes_the_target_that_triton_serves(cpu):
    compiled(Path("build/emoji/tensorrt-rtx"))
    assert command("build/emoji", "--out", "repository") == (0, "repository/emoji-onnxruntime-cpu\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build/emoji/tensorrt-rtx"], "tensorrt-rtx is not for Triton: it serves ONNX Runtime and TensorRT"),
        (["build/emoji/tensorrt-10"], "build it there with the server's GPU and version of TensorRT: trtexec --onnx"),
        (["build/emoji/tensorrt-10", "--vnni"], "tensorrt-10: has no 8-bit kernels to choose from"),
        (["build/emoji/tensorrt-10", "--name", "../emoji"], "'../emoji' is no name of a model"),
    ],
)
def test_what_the_command_refuses(arguments, message, engine):
    compiled(Path("build/emoji/tensorrt-rtx"))
    (engine / "engine.plan").unlink()
    code, said = command(*arguments, "--out", "repository")
    assert code == 2
    assert message in said


def test_files_behind_links_and_files_that_no_run_delivered_are_not_served():
    folder = without_step(compiled(Path("build/emoji/onnxruntime-cuda")))
    Path("private").write_text("only mine")
    (folder / "model.onnx.kept").write_text("mine")
    model = write_model(folder, Path("repository"))
    assert sorted(path.name for path in (model / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    (folder / "model.onnx_more").symlink_to(Path("private").absolute())
    with pytest.raises(RecipeError, match=r"model\.onnx_more: is a link, which no run delivers"):
        write_model(folder, Path("repository"), version=2)


def test_a_linked_engine_is_refused_and_one_that_was_built_there_is_served(engine):
    (engine / "engine.plan").rename("built.plan")
    (engine / "engine.plan").symlink_to(Path("built.plan").absolute())
    with pytest.raises(RecipeError, match=r"engine\.plan: is a link"):
        write_model(engine, Path("repository"))
    (engine / "engine.plan").unlink()
    (engine / "engine.plan").write_bytes(b"built there")
    assert (write_model(engine, Path("repository")) / "1/model.plan").read_bytes() == b"built there"


def test_a_link_in_the_model_s_place_is_refused(cpu):
    Path("repository").mkdir()
    Path("mine").mkdir()
    Path("repository/emoji-onnxruntime-cpu").symlink_to(Path("mine").absolute())
    with pytest.raises(RecipeError, match="exists and is no folder: choose another --name"):
        write_model(cpu, Path("repository"))
    assert list(Path("mine").iterdir()) == []


@pytest.mark.parametrize(
    "repository", ["build/emoji/onnxruntime-cpu", "build/emoji/onnxruntime-cpu/new/models", "link"]
)
def test_a_repository_in_a_compiled_folder_is_refused(repository, cpu):
    Path("link").symlink_to(cpu.absolute())
    before = sorted(cpu.rglob("*"))
    with pytest.raises(RecipeError, match=r"lies in the compiled folder .*: choose another --out"):
        write_model(cpu, Path(repository))
    assert sorted(cpu.rglob("*")) == before


def test_a_version_beyond_the_server_s_numbers_is_refused(cpu):
    assert command("build/emoji", "--out", "repository", "--version", str(1 << 63))[0] == 2
    assert not Path("repository").exists()
