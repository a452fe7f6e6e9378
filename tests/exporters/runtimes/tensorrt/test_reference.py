"""A graph with NVFP4 is opened as others are: with the threads that are asked for, and checked against graph.json."""

from dataclasses import replace
from pathlib import Path

import pytest

from intaglio.exporters.measure.single_layer import single_layer
from intaglio.exporters.runtimes.onnxruntime import session
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRTRTX
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.nvfp4 import NVFP4_STATIC
from intaglio.pipeline.formats.target import load_target


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    layer = Layer(name="a", op="linear", shape=(32, 64), bias=True)
    return single_layer(tmp_path, layer, 4, NVFP4_STATIC, load_target("tensorrt-rtx-blackwell"))


def test_it_has_the_threads_that_are_asked_for(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, usual = [], session.open_session

    def noted(*args, **kwargs):
        opened.append(usual(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(session, "open_session", noted)
    TensorRTRTX().open(graph, threads=1)
    assert [each.get_session_options().intra_op_num_threads for each in opened] == [1]


def test_it_is_refused_beside_the_description_of_another_graph(graph: Graph) -> None:
    (name, spec), *_ = graph.inputs.items()
    other = replace(graph, inputs={name: replace(spec, shape=(*spec.shape, 1))})
    with pytest.raises(RecipeError, match=r"graph.json: its inputs are not those of the model.onnx beside it"):
        TensorRTRTX().open(other)
