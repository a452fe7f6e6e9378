"""The process that looks at graphs by anyone starts, ends for want of questions, and starts again."""

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
