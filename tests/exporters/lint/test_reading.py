"""`lint` reads functions, branches, domains, types and data beside the model; its pass names what it finds."""

from dataclasses import replace
from pathlib import Path

import onnx
import onnx.parser
import pytest
from harness import run_pass
from lint_cases_rtx import WARNED
from lint_graphs import IN, ORT, RTX, Case, found
from onnx import TensorProto

from intaglio.exporters.lint.lint import Lint, lint
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.formats.target import load_target

THREE_ERRORS = Case(
    "three errors",
    IN.replace("zero", "u0")
    + "v = DequantizeLinear <axis = 0> (w8, s_k) [first] p = MatMul (d, v) [second] z = Det (p) "
    "y = Abs (p)",
    y="float[2,16,32] y, float[2] z",
)


def test_the_pass_names_every_error(tmp_path):
    artifacts = {GRAPH: Graph(THREE_ERRORS.write(tmp_path), {}, {}), TARGET: RTX}
    with pytest.raises(TargetError, match=r"second: .* has no operator Det") as caught:
        run_pass(Lint(), artifacts, tmp_path / "lint")
    assert len(caught.value.problems) == 4  # `valid` knows as well that Det takes square matrices
    assert "QuantizeLinear of q: codes of type UINT8" in str(caught.value)
    assert "scales along axis 0 of the weight of first, whose channels are on axis 1" in str(caught.value)


def test_warnings_are_logged_once_a_rule(tmp_path, caplog):
    case = WARNED[1]
    artifacts = {GRAPH: Graph(case.write(tmp_path), {}, {}), TARGET: RTX}
    findings = run_pass(Lint(), artifacts, tmp_path / "lint")[LINT]
    assert [line.message.partition(":")[0] for line in caplog.records] == ["1 findings of the rule between, the first"]
    findings.save(tmp_path)
    assert Findings.load(tmp_path) == findings


def test_functions_and_branches_are_looked_into(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["": 21, "own": 1]>
    graph (float[8,8] x, bool c) => (float y, float z)
    {
        y = own.Volume (x)
        z = If (c) <then_branch = g1 () => (float a) { a = Det (x) }, else_branch = g2 () => (float b) { b = Det (x) }>
    }
    <domain: "own", opset_import: ["": 21]> Volume (m) => (v) { v = Det (m) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert found(tmp_path / "model.onnx", RTX)[0] == ("operator",) * 3


def outside(path: Path, location: str, **place: int) -> None:
    """Says that the weight of the model is kept elsewhere."""
    model = onnx.load(path)
    (weight,) = (t for t in model.graph.initializer if t.name == "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **place}.items():
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def test_a_function_with_the_name_of_an_operator_is_executed_as_that_operator(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["": 21, "own": 1]>
    graph (float[8,8] x) => (float[8,8] y) { y = own.Relu (x) }
    <domain: "own", opset_import: ["": 21]> Relu (m) => (v) { v = Neg (m) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert found(tmp_path / "model.onnx", RTX) == (("name",), ())
    assert found(tmp_path / "model.onnx", ORT) == ((), ())


def test_a_standard_name_of_another_domain_is_read_by_its_name_alone(tmp_path):
    case = Case("relu of nobody", "y = my.Relu (x)", y="float[2,16,64] y")
    assert found(case.write(tmp_path), RTX) == ((), ("domain",))
    attention = Case("attention", "y = com.microsoft.Attention <num_heads = 2> (x, w)", y="float[2,16,64] y")
    assert found(attention.write(tmp_path), load_target("tensorrt-11")) == (("name",), ())


def test_types_that_tensorrt_does_not_have_are_errors_and_float64_is_a_warning(tmp_path):
    cast = Case("cast", "d = Cast <to = {}> (x) y = Cast <to = 1> (d)", y="float[2,16,64] y")
    for kind, verdict in ((5, (("type",), ())), (11, ((), ("double",))), (7, ((), ()))):
        path = replace(cast, nodes=cast.nodes.replace("{}", str(kind))).write(tmp_path)
        assert found(path, RTX) == verdict


def test_data_beside_the_model_is_read(tmp_path):
    path = Case("float", "y = MatMul (x, w)").write(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(bytes(64 * 32 * 4))
    outside(path, "model.onnx.data")
    assert found(path, RTX) == ((), ())


@pytest.mark.parametrize(
    ("location", "place", "message"),
    [
        ("../secret", {}, r"w: its data is in ../secret, outside the model's folder"),
        ("/etc/passwd", {}, r"w: its data is in /etc/passwd, outside the model's folder"),
        ("link", {}, r"w: its data is in link, outside the model's folder"),
        ("gone", {}, r"w: its data is in gone, which is not there"),
        ("short", {}, r"w: 8192 bytes at 0, but short ends at 100"),
        ("short", {"offset": -8}, r"w: 8192 bytes at -8, but short ends at 100"),
        ("short", {"offset": 10**30}, r"w: 8192 bytes at 1000000000000000000000000000000, but short ends at 100"),
        ("short", {"offset": "far"}, r"w: its place in short is not a number of bytes"),
        ("x" * 5000, {}, r"w: its data is in 'x{40}', which is no possible file name: File name too long"),
        ("a\0b", {}, r"w: its data is in 'a\\x00b', which is no possible file name: .*null"),
    ],
)
def test_data_elsewhere_is_refused(location, place, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = Case("float", "y = MatMul (x, w)").write(folder)
    (tmp_path / "secret").write_bytes(bytes(8192))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "short").write_bytes(bytes(100))
    outside(path, location, **place)
    with pytest.raises(RecipeError, match=message):
        list(lint(path, RTX))
