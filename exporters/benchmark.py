"""Time the compiled graph against the full-precision one, in turn, in one process."""

from __future__ import annotations

import statistics
import time
from typing import ClassVar

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.keys import FLOAT_GRAPH, GRAPH, LATENCY, TARGET, TRAJECTORY
from intaglio.pipeline.pass_base import Pass


class MeasureLatency(Pass):
    """One call of the denoiser in ONNX Runtime, float32 and compiled by turns, same session options: medians."""

    name: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({FLOAT_GRAPH, GRAPH, TARGET, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LATENCY})

    rows: int = Field(8, ge=1, description="rows of the call that is timed")
    rounds: int = Field(15, ge=1, description="calls of each, after one that is not counted")
    threads: int = Field(
        1, ge=0, description="threads of ONNX Runtime, 0 for all cores: with more than one, other jobs move the ratio"
    )

    def run(self, state: State, ctx: Context) -> Outputs:
        from intaglio.exporters._session import graph_denoise
        from intaglio.pipeline.verification import Latency

        optimized = state[TARGET].runtime == "onnxruntime"
        both = {
            "float32": graph_denoise(state[FLOAT_GRAPH], optimize=optimized, threads=self.threads),
            "compiled": graph_denoise(state[GRAPH], optimize=optimized, threads=self.threads),
        }
        trajectory = state[TRAJECTORY]
        call = trajectory.call(len(trajectory.timesteps) // 2, slice(self.rows))
        times: dict[str, list[float]] = {name: [] for name in both}
        with ctx.progress("latency", self.rounds + 1) as advance:
            for _ in range(self.rounds + 1):
                for name, denoise in both.items():
                    began = time.perf_counter()
                    denoise(call)
                    times[name].append(time.perf_counter() - began)
                advance()
        float_ms, compiled_ms = (1e3 * statistics.median(times[name][1:]) for name in ("float32", "compiled"))
        ctx.log.info("%d rows: %.1f ms float32, %.1f ms compiled", self.rows, float_ms, compiled_ms)
        return {LATENCY: Latency(rows=self.rows, float32_ms=float_ms, compiled_ms=compiled_ms)}
