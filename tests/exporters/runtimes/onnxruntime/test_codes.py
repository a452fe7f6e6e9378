"""Which kernels a graph gets depends on the largest code of its weights, and on nothing else in it."""

import numpy as np
import onnx
import pytest
import torch
from layers import make

from intaglio.exporters.runtimes.onnxruntime import session
from intaglio.exporters.runtimes.onnxruntime.codes import LARGEST, largest_code
from intaglio.exporters.runtimes.onnxruntime.session import exact_kernels, kernels_for, multiplies_exactly
from intaglio.pipeline.formats.schemes import (
    W7A8_TOKEN,
    W8A8_STEP,
    W8A8_TOKEN,
    W8A16,
    w4a8_token,
    w4a16,
    w8ga16,
    with_output,
)

EXACT = {"session.x64quantprecision": "1"}


@pytest.mark.parametrize(
    ("scheme", "code"),
    [(W8A8_TOKEN, 127), (W7A8_TOKEN, 63), (w4a8_token(32), 64), (W8A16, 0), (w4a16(32), 0), (w8ga16(32), 0)],
    ids=["w8a8", "w7a8", "w4a8", "w8a16", "w4a16", "w8ga16"],
)
def test_the_largest_code_that_is_multiplied_on_integers(scheme, code, tmp_path):
    layer = torch.nn.Linear(64, 96)
    layer.weight.data[0, 0] = -4.0  # the lowest code of 4 bits, in the group of the largest integer
    graph, _ = make(tmp_path, {"a": layer}, (2, 5, 64), {"a": scheme}, "onnxruntime")
    assert largest_code(graph.path) == code
    assert largest_code(onnx.load(graph.path).SerializeToString()) == code


def test_codes_of_a_convolution_count_too(tmp_path):
    layer = torch.nn.Conv2d(64, 32, 3)
    graph, _ = make(tmp_path, {"a": layer}, (2, 64, 6, 6), {"a": with_output(W8A8_STEP)}, "onnxruntime")
    assert largest_code(graph.path) == 127


@pytest.mark.parametrize(
    "weight",
    [
        "c = MatMulInteger (q, w) y = Cast <to = 1> (c)",  # a product on integers that no DequantizeLinear shows
        "v = QuantizeLinear (x, one, zero) e = DequantizeLinear (v, one, zero) y = MatMul (d, e)",  # no constant
        "n = Neg (w) v = DequantizeLinear (n, one) y = MatMul (d, v)",  # an operator that is not looked into
    ],
)
def test_codes_that_are_not_known_count_as_the_largest(weight):
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        graph (float[4,4] x) => (float[4,4] y)
        {{ q = QuantizeLinear (x, one, zero) d = DequantizeLinear (q, one, zero) {weight} }}""")
    constants = {"one": np.float32(1), "zero": np.uint8(128), "w": np.ones((4, 4), np.int8)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    assert largest_code(model.SerializeToString()) == LARGEST


def test_what_is_no_model_counts_as_the_largest(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert largest_code(tmp_path / "model.onnx") == LARGEST


def test_a_graph_of_small_codes_takes_the_fast_kernels_where_others_cannot(tmp_path, monkeypatch):
    """On a CPU whose own kernels are exact for codes up to 64 only."""
    monkeypatch.setattr(session, "exact_kernels", lambda code=127: {} if code <= 64 else EXACT)
    layer = torch.nn.Linear(64, 96)
    found = {}
    for scheme in (W7A8_TOKEN, w4a8_token(32), W8A8_TOKEN):
        graph, _ = make(tmp_path / scheme.name, {"a": layer}, (2, 5, 64), {"a": scheme}, "onnxruntime")
        found[scheme.name] = kernels_for(graph.path)
    assert found == {"w7a8_token": {}, "w4a8_token": {}, "w8a8_token": EXACT}


def test_small_codes_are_exact_with_the_kernels_that_they_get_here():
    assert multiplies_exactly(exact_kernels(64), 64)
    assert multiplies_exactly(exact_kernels(), 127)
