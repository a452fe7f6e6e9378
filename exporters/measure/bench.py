"""Define the results of `intaglio bench`: time, memory and size of a compiled graph beside full precision."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class EngineFigures(BaseModel):
    """Figures of one graph in a process of its own.

    Times are medians over all calls: wall-clock time, except `cpu_ms`, which is CPU time of the process. Memory is that
    which the graph adds to the process; None where the system does not report it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_bytes: int
    load_ms: float = Field(description="time until the process can call the graph")
    resident_bytes: int | None = Field(description="memory after the first call")
    peak_bytes: int | None = Field(description="largest memory while the graph was loaded and called once")
    latency_ms: float
    latency_ms_quartiles: tuple[float, float]
    cpu_ms: float
    trajectory_ms: float = Field(description="time of as many calls in a row as the recipe has steps")


class Bench(BaseModel):
    """Figures of engines that were timed in turn: in each of `rounds` rounds, every engine ran one trajectory.

    Ratios are full precision over compiled: above one, compiled is better. Speedups are medians of each round's own
    ratio. A figure that this machine cannot measure is None; `filled_by` has the command that measures it on the
    device, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    provider: str
    rows: int
    threads: int
    steps: int
    rounds: int
    engines: Mapping[str, EngineFigures]
    left_out: Mapping[str, str] = Field(description="reason for each engine that was not run")
    trajectory_speedup_fp32: float
    trajectory_cpu_speedup_fp32: float
    peak_memory_ratio: float | None
    size_ratio_fp16: float
    gpu_latency_ms: float | None = None
    energy_joules: float | None = None
    filled_by: Mapping[str, str]
