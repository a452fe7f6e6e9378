"""Open a graph in ONNX Runtime to compare it with torch, whatever runtime the graph is written for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from intaglio.exporters.float_graph.in_parts import PartsSession, Session
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.files import one_line
from intaglio.pipeline.machine import giving_back


def exact_options() -> onnxruntime.SessionOptions:
    """Return the options of a session that computes products in float in float32, and prints nothing."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, so it need not be printed
    # 1 is float32: by default MatMulNBits rounds its input to 8 bits (0.07 relative error in place of 1e-6)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


Weights: TypeAlias = Mapping[str, NDArray[np.float32]]
"""The weights that a graph's files leave out, by name."""
NO_WEIGHTS: Weights = MappingProxyType({})
"""The weights of a graph that leaves none out."""


@contextmanager
def lean_session(path: Path, weights: Weights = NO_WEIGHTS) -> Iterator[Session]:
    """Open a graph on the CPU with little memory: weights stay in their file, and freed memory is returned.

    `weights` are those that the graph's files leave out, by name; then the graph is run in parts. The products of the
    graph have to be in float; their weights may be codes. The session is slow: weights have no special layout for
    kernels, and blocks of memory are mapped one by one. Raises StepFailed for an operator that ONNX Runtime does not
    have in these types.
    """
    options = exact_options()
    # the next level changes the layout of convolutions' weights
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    # the default order executes a node such as ReduceMax last, and so keeps its large input in memory
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False  # the arena doubles when it grows, and releases nothing
    options.enable_mem_reuse = False  # memory that is to be reused later is not released before

    def opened(file: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    with giving_back():
        try:
            session = PartsSession(path, weights, opened) if weights else opened(path)
        except (NoKernel, InvalidGraph) as error:
            raise StepFailed(
                f"ONNX Runtime cannot execute the exported graph: {one_line(error)}: correct what the model does there;"
                " it may cast to another type than float32"
            ) from error
        yield session
