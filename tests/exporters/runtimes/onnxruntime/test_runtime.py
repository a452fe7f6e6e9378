"""ONNX Runtime opens graphs in operators that it has kernels for."""

import numpy as np
import onnx
from harness import Artifacts

from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime, with_kernels
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, TRAJECTORY


def test_group_normalization_of_a_float_graph_is_opened_in_other_operators(unet: Artifacts):
    graph = unet[FLOAT_GRAPH]
    model = with_kernels(graph.path)
    assert model is not None
    written = {node.op_type for node in onnx.load(graph.path, load_external_data=False).graph.node}
    opened = {node.op_type for node in onnx.load_from_string(model).graph.node}
    assert written - opened == {"GroupNormalization"}
    assert "InstanceNormalization" in opened
    call = {name: value.numpy() for name, value in unet[TRAJECTORY].call(0).items()}
    feed = {name: call[name].astype(spec.dtype) for name, spec in graph.inputs.items()}
    (found,) = OnnxRuntime().open(graph, threads=1).run(feed).values()
    (expected,) = open_session(graph.path, threads=1).run(None, feed)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_graph_without_it_is_opened_as_it_is(dit: Artifacts):
    assert with_kernels(dit[FLOAT_GRAPH].path) is None
