"""Models that anyone may have written are read in bounded time and memory, and what is wrong with them is one error."""

import os
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from intaglio.exporters.float_graph.onnx_file import MOST_NODES, read_model, read_proto
from intaglio.exporters.lint.inference import ask
from intaglio.exporters.lint.lint import lint
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target

RTX, ORT = load_target("tensorrt-rtx"), load_target("onnxruntime-cpu")
OPS = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]


def value(name, shape=(2, 2), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(folder, nodes, arrays=None, *, tensors=(), functions=(), inputs=None, y=(2, 2)) -> Path:
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in (arrays or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs or [value("x")], [value("y", y)], [*constants, *tensors])
    proto = helper.make_model(graph, opset_imports=OPS, functions=list(functions), ir_version=10)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def external(file="b.bin", kind=TensorProto.FLOAT, dims=(2, 2), **place):
    tensor = TensorProto(name="w", data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": file, **place}.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


ADD = [helper.make_node("Add", ["x", "w"], ["y"])]


def test_weights_stay_in_the_file_and_are_what_they_were(tmp_path):
    weight = np.arange(4096, dtype=np.float32).reshape(64, 64)
    product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = model(tmp_path, product, {"w": weight}, inputs=[value("x", (2, 64))], y=(2, 64))
    (tensor,) = read_proto(path).graph.initializer
    assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "m.onnx"
    assert np.array_equal(read_model(path).graph.initializers["w"].const_value.numpy(), weight)
    assert list(lint(path, ORT)) == []
    proto = onnx.load(path)
    proto.graph.initializer[0].data_location = TensorProto.DEFAULT  # said, behind the data
    onnx.save(proto, path)
    assert np.array_equal(read_model(path).graph.initializers["w"].const_value.numpy(), weight)


def test_small_models_are_what_onnx_reads(tmp_path):
    path = model(tmp_path, ADD, {"w": np.ones((2, 2), np.float32)})
    assert read_proto(path) == onnx.load(path)


def calls(place, a, b):
    return helper.make_node(f"F{place}", [a], [b], domain="my")


def doubling(depth):
    yield helper.make_function("my", "F0", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], OPS[:1])
    for place in range(1, depth + 1):
        nodes = [calls(place - 1, "a", "t"), calls(place - 1, "t", "b")]
        yield helper.make_function("my", f"F{place}", ["a"], ["b"], nodes, OPS)


def one_finding(path, target=RTX):
    (finding,) = lint(path, target)
    return str(finding)


@pytest.mark.parametrize(("depth", "nodes"), [(19, r"5.24e\+05"), (200, r"1.61e\+60")])
def test_functions_that_double_are_counted_before_they_are_written_out(depth, nodes, tmp_path):
    path = model(tmp_path, [calls(depth, "x", "y")], functions=doubling(depth))
    assert f"stand for {nodes}".replace("\\", "") in one_finding(path)


def test_functions_that_call_each_other_in_a_circle_are_named(tmp_path):
    functions = [
        helper.make_function("my", name, ["a"], ["b"], [helper.make_node(other, ["a"], ["b"], domain="my")], OPS)
        for name, other in (("A", "B"), ("B", "A"))
    ]
    path = model(tmp_path, [helper.make_node("A", ["x"], ["y"], domain="my")], functions=functions)
    assert "calls itself" in one_finding(path)


def long_range():
    numbers = {"a": 0, "b": 2**34, "c": 1}
    nodes = [helper.make_node("Range", ["a", "b", "c"], ["r"]), helper.make_node("Cast", ["r"], ["o"], to=1)]
    constants = [numpy_helper.from_array(np.int64(number), name) for name, number in numbers.items()]
    return helper.make_graph(nodes, "s", [], [value("o", ("n",))], constants)


def test_a_long_range_in_a_branch_is_not_written_down(tmp_path):
    choice = helper.make_node("If", ["k"], ["y"], then_branch=long_range(), else_branch=long_range())
    path = model(tmp_path, [choice], inputs=[value("x"), value("k", (), TensorProto.BOOL)], y=("n",))
    assert "Range of more than 16777216 numbers" in one_finding(path)


def test_values_that_double_end_the_process_that_infers_them_and_not_this_one(tmp_path):
    nodes = [helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [helper.make_node("Concat", [f"s{i}", f"s{i}"], [f"s{i + 1}"], axis=0) for i in range(36)]
    path = model(tmp_path, [*nodes, helper.make_node("Cast", ["s36"], ["y"], to=1)], y=("n",))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "to find out what its values are" in one_finding(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert ask("standard", read_proto(path)).complaint is None  # by another process


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            external(length=3 * 10**9),
            r"w: 16 bytes at 0, not the 3000000000 that the model names, but b.bin ends at 100",
        ),
        (external(kind=TensorProto.STRING), r"w: its data is in b.bin, but a tensor of this type cannot"),
        (external(dims=[2**62, 2**62]), r"w: \d+ bytes at 0, but b.bin ends at 100"),
        (external(dims=[-1, 2]), r"w: has -1 elements along an axis"),
        (external("fifo"), r"w: its data is in fifo: .*fifo: is not a regular file"),
        (external("."), r"w: its data is in \.: .*: is a folder"),
        (external("\x1b[2J"), r"w: its data is in \\x1b\[2J, which is not there"),
    ],
    ids=["length", "strings", "overflow", "negative", "fifo", "folder", "escape"],
)
def test_external_data_that_cannot_be_is_one_error(tensor, message, tmp_path):
    (tmp_path / "b.bin").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RecipeError, match=message):
        read_proto(model(tmp_path, ADD, tensors=[tensor]))


def test_a_long_attribute_is_named_and_not_printed(tmp_path):
    path = model(tmp_path, [helper.make_node("Transpose", ["x"], ["y"], perm=list(range(2_000_000)))])
    with pytest.raises(
        RecipeError, match="its attribute perm lists more than 1048576 bytes of numbers one by one"
    ) as caught:
        read_proto(path)
    assert len(str(caught.value)) < 500


def test_more_nodes_than_any_model_has_are_refused(tmp_path):
    path = model(tmp_path, [helper.make_node("Relu", ["x"], ["y"])] * (MOST_NODES + 1))
    with pytest.raises(RecipeError, match="has 25001 nodes: at most 25000 are read"):
        read_proto(path)


def nested(field: bytes, depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        for key in field:
            size, length = len(content), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            content = bytes([key]) + length + bytes([size]) + content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(b"\x32\x2a\x0a", 10_000), "is no ONNX model"),
        (b"\x3a" + nested(b"\x32\x2a\x0a", 60)[:0] + b"\xff" * 9 + b"\x01", "is no ONNX model"),
        (b"\x3a\x80\x80\x80\x80\x08", "is no ONNX model"),
        (b"\x0b\x0b", "is no ONNX model"),
    ],
    ids=["a-field-that-is-none", "a-length-without-end", "more-than-there-is", "groups"],
)
def test_bytes_that_are_no_model_are_refused(content, message, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_proto(tmp_path / "m.onnx")


def test_graphs_in_each_other_end_somewhere(tmp_path):
    deep = nested(b"\x32\x2a\x0a", 200)  # attribute of node of graph
    (tmp_path / "m.onnx").write_bytes(b"\x3a" + nested_length(deep) + deep)
    with pytest.raises(RecipeError, match="has messages that are nested more than 100 deep"):
        read_proto(tmp_path / "m.onnx")


def nested_length(content: bytes) -> bytes:
    return bytes([len(content) & 127 | 128, len(content) >> 7])


def test_names_are_printed_without_control_characters(tmp_path):
    node = helper.make_node("F\x1b]0;title\x07", ["x"], ["y"], name="\x1b[2Jnode" + "e" * 10_000, domain="my")
    line = one_finding(model(tmp_path, [node]))
    assert line.startswith(r"\x1b[2Jnodeee")
    assert line.isprintable()
    assert len(line) < 1000


def test_a_fifo_in_place_of_the_model_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match=r"m.onnx: is not a regular file"):
        list(lint(tmp_path / "m.onnx", RTX))


def test_of_many_findings_the_first_hundred_are_listed(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], [f"r{i}" if i else "y"], domain="own") for i in range(150)]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")])
    proto = helper.make_model(graph, opset_imports=[OPS[0], helper.make_opsetid("own", 1)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    found = [finding for finding in lint(tmp_path / "m.onnx", ORT) if finding.rule == "operator"]
    assert (len(found), found[-1].message) == (101, "more than 100 of these")


@pytest.mark.parametrize(("content", "said"), [(b"abc", "or only a part of one"), (b"\x08\x07", "it has no graph")])
def test_a_file_that_is_no_onnx_model_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"a\.onnx: is no ONNX model.*{said}"):
        read_proto(tmp_path / "a.onnx")
