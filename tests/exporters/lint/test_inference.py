"""The process that looks at graphs by anyone starts, ends for want of questions, and starts again."""

import signal
import subprocess
import sys

import onnx
import pytest

from intaglio.exporters.lint import inference


@pytest.fixture
def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2,2] x) => (float[2,2] y) { y = Relu (x) }'
    )


def test_a_process_that_ends_while_a_question_is_on_its_way_is_started_again(model, monkeypatch):
    asking = inference._Process()
    monkeypatch.setattr(inference, "_PROCESS", asking)
    assert inference.ask("standard", model) == inference.Answer(None)
    first = asking._running
    assert first is not None
    assert first.stdin is not None
    first.stdin.close()  # no more questions: it ends with 0, and the next one finds it gone or going
    first.wait()
    monkeypatch.setattr(first, "poll", lambda: None)  # which is not known yet
    first.stdin = open("/dev/null", "wb")  # noqa: SIM115 - a pipe that took the question before it ended
    assert inference.ask("types", model).complaint is None
    assert asking._running is not first


def test_large_weights_are_mapped_and_count_as_no_memory():
    """1.6 GB, for which the usual limit is 256 MB."""
    large = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1,4] x) => (float[1,100000000] y) { y = MatMul (x, w) }'
    )
    weight = large.graph.initializer.add(name="w", dims=(4, 100_000_000), data_type=onnx.TensorProto.FLOAT)
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="model.onnx.data")
    assert inference.ask("loads", large).complaint is None


def test_a_process_that_takes_more_memory_than_it_may_is_killed():
    code = "import time; held = b'x' * 300_000_000; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process, inference._watched(process, 100):
        assert process.wait(30) == -signal.SIGKILL
