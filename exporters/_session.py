"""ONNX Runtime with the settings under which it computes what the simulation does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import torch

from intaglio.pipeline.graph import STEP_INPUT, Graph
from intaglio.pipeline.quant.modules import StepClock

if TYPE_CHECKING:
    from intaglio.pipeline.denoiser import Denoise, Inputs

CPU = "CPUExecutionProvider"


def open_session(
    model: Path | bytes,
    *,
    optimize: bool = True,
    threads: int = 0,
    providers: Sequence[str] = (),
    optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the CPU, or on those of `providers` that are there. 0 threads: one for each core.

    `optimized`: a file to write the graph to that is executed. Raises what ONNX Runtime raises.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # 1 is float32: by default MatMulNBits rounds its input to 8 bits (0.07 relative error in place of 1e-6)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not has_vnni():
        # sums of two products of 8 bits saturate at 16 bits without VNNI (0.12 relative error in place of 0.009)
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    there = [p for p in providers if p in onnxruntime.get_available_providers() and p != CPU]
    return onnxruntime.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=[*there, CPU]
    )


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating at 16 bits. No where it cannot be read."""
    if not cpuinfo.exists():
        return False
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def graph_denoise(graph: Graph, *, optimize: bool = True, threads: int = 0) -> Denoise:
    """The graph as a denoiser: takes a call's inputs by name and finds the graph's `step` from the timestep."""
    session = open_session(graph.path, optimize=optimize, threads=threads)
    clock = StepClock(graph.timesteps)
    timestep = "timestep" if "timestep" in graph.inputs else list(graph.inputs)[1]

    def denoise(inputs: Inputs) -> torch.Tensor:
        feed = {name: inputs[name].numpy() for name in graph.inputs if name != STEP_INPUT}
        if STEP_INPUT in graph.inputs:
            feed[STEP_INPUT] = np.array(clock.index(float(inputs[timestep][0])), np.int64)
        return torch.from_numpy(session.run(None, feed)[0])

    return denoise
