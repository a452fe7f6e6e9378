"""The command `lint`: what it prints, its exit codes, and one clear error for files that are no models."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from lint_cases_rtx import LEGAL, REFUSED, WARNED
from lint_graphs import CHANNELS, GROUPS, IN, PRODUCT, Case
from onnx import TensorProto
from typer.testing import CliRunner

from intaglio.exporters.lint.lint import RULES
from intaglio.pipeline.cli.app import app


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "it has no graph"),
        (b"no protobuf at all", "is no ONNX model"),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "it has no graph"),
        (Case("float", "y = MatMul (x, w)").model().SerializeToString()[:-50], "is no ONNX model"),
    ],
    ids=["missing", "empty", "text", "no-graph", "truncated"],
)
def test_what_is_no_model_is_one_clear_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    done = command(tmp_path / "model.onnx", "--target", "tensorrt-rtx")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


HUGE = 1 << 62


def absurd(*dims: int) -> onnx.TensorProto:
    """A tensor that says it has these dimensions, and holds one byte."""
    return onnx.TensorProto(data_type=TensorProto.INT8, dims=dims, raw_data=b"\1")


@pytest.mark.parametrize(
    ("case", "exit_code", "message"),
    [
        (Case("more than there is", IN + CHANNELS + PRODUCT, tensors={"w8": absurd(HUGE, HUGE)}), 1, "valid"),
        (Case("fewer than none", IN + CHANNELS + PRODUCT, tensors={"w8": absurd(-1, 32)}), 1, "valid"),
        (Case("a scalar weight", IN + CHANNELS + PRODUCT, tensors={"w8": np.int8(1)}), 1, "valid"),
        (Case("an axis that is not there", IN + CHANNELS.replace("= 1", "= 99") + PRODUCT), 1, "valid"),
        (Case("groups of less than one", GROUPS.replace("= 16", "= -16") + "y = MatMul (x, v)"), 1, "groups of -16"),
        (Case("a huge input", "y = Abs (x)", x=f"float[{HUGE},{HUGE}] x", y="float[2] y"), 1, "valid"),
        (Case("a huge range", "r = Range (zero_, far, step) y = Add (x, r)", x="int64[n] x", y="int64[n] y",
              tensors={"zero_": np.int64(0), "far": np.int64(10**15), "step": np.int64(1)}), 1, "Range of more than"),
        (Case("an opset of nobody", "y = Abs (x)", y="float[2,16,64] y", opset=10**6), 1, "opset 1000000"),
    ],
    ids=lambda value: value.name.replace(" ", "-") if isinstance(value, Case) else "",
)  # fmt: skip
def test_absurd_shapes_are_findings(case, exit_code, message, tmp_path):
    done = command(case.write(tmp_path), "--target", "tensorrt-10.16-orin")
    assert done.exit_code == exit_code, done.stderr
    assert message in done.stdout
    assert "Traceback" not in done.stderr


def command(*arguments: object):
    return CliRunner().invoke(app, ["lint", *map(str, arguments)], env={"COLUMNS": "300"})


def test_the_command_prints_findings_as_json(tmp_path):
    determinant = next(case for case in REFUSED if case.name == "determinant")
    done = command(determinant.write(tmp_path), "--target", "tensorrt-rtx", "--json")
    assert done.exit_code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert set(finding) == {"rule", "level", "node", "message", "fix"}
    assert (finding["rule"], finding["level"], finding["node"]) == ("operator", "error", "Det of y")


@pytest.mark.parametrize(("case", "exit_code"), [(LEGAL[0], 0), (WARNED[0], 0), (REFUSED[0], 1)])
def test_the_command_fails_for_errors_alone(case, exit_code, tmp_path):
    done = command(case.write(tmp_path), "--target", "tensorrt-rtx")
    assert done.exit_code == exit_code, done.stderr
    assert all(rule in done.stdout for rule in (*case.rules, *case.warnings))


def test_the_command_lists_its_rules_without_a_model():
    done = command("--rules")
    assert done.exit_code == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[rule.name, rule.level] for rule in RULES]
    assert all(rule.finds and "\n" not in rule.finds and rule.finds in done.stdout for rule in RULES)


def test_an_unknown_target_is_named(tmp_path):
    done = command(LEGAL[0].write(tmp_path), "--target", "tensorrt-rxt")
    assert done.exit_code == 2
    assert "did you mean 'tensorrt-rtx'" in done.stderr
