"""A graph that runs in parts returns what it returns in one piece."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from intaglio.exporters.float_graph import in_parts
from intaglio.exporters.float_graph.lean_session import lean_session

WEIGHTS = ("w1", "w2", "w3")
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x, bool choose, float[4, 4] w1, float[4, 4] w2, float[4, 4] w3) => (float[n, 4] last, float[n, 4] first)
<float[n, 4] a, float[n, 4] b, float[n, 4] c, float[2] one = {1, 2}, int64[1] size = {-1}>
{
    first = MatMul(x, w1)
    a = Relu(first)
    unused = Add(a, x)
    b = MatMul(a, w2)
    untyped, rest = Split <axis = 1, num_outputs = 2> (b)
    joined = Concat <axis = 1> (rest, untyped)
    c = MatMul(joined, w3)
    last = If (choose) <
        then_branch = yes () => (float[n, 4] y) { y = Add(c, a) },
        else_branch = no () => (float[n, 4] z) { z = MatMul(x, w1) }
    >
}
"""


@pytest.mark.parametrize("room", [1, 100, 1 << 20])
def test_parts_compute_what_the_whole_graph_does(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in several parts, values that no part reads, values whose type is unknown, and graphs inside nodes."""
    monkeypatch.setattr(in_parts, "PART_BYTES", room)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    rng, read = np.random.default_rng(0), list[str]()
    values = {name: rng.standard_normal((4, 4), np.float32) for name in WEIGHTS}

    class Read(dict):
        def __getitem__(self, name: str):
            read.append(name)
            return super().__getitem__(name)

    with lean_session(path) as whole, lean_session(path, Read(values)) as parts:
        assert [each.name for each in parts.get_inputs()] == ["x", "choose"]
        for rows in (1, 3):
            for choose in (True, False):
                call = {"x": rng.standard_normal((rows, 4), np.float32), "choose": np.array(choose)}
                read.clear()
                for found, expected in zip(parts.run(None, call), whole.run(None, call | values), strict=True):
                    np.testing.assert_array_equal(found, expected)
                # the last part reads the first weight again
                assert sorted(read) == (["w1", "w1", "w2", "w3"] if room < 1 << 20 else ["w1", "w2", "w3"])
    assert list(tmp_path.iterdir()) == [path]
