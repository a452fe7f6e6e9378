"""Define the results of a benchmark of a compiled graph beside full precision."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class EngineFigures(BaseModel):
    """One graph in a process of its own. Memory is what it adds to the process; None where the system does not say.

    Times are medians of all calls, with their quartiles, by the clock and as CPU time of the process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_bytes: int
    load_ms: float = Field(description="until the process can call it for the first time")
    resident_bytes: int | None = Field(description="after a call")
    peak_bytes: int | None = Field(description="at most, while it was loaded and called once")
    latency_ms: float
    latency_ms_quartiles: tuple[float, float]
    cpu_ms: float
    trajectory_ms: float = Field(description="of as many calls as the recipe has steps, one after the other")


class Bench(BaseModel):
    """Engines by turns, a trajectory each. Ratios are full precision over compiled: above one, compiled is better.

    Speedups are medians of each round's own ratio. What this machine cannot measure is None, and `filled_by` has the
    commands that do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    provider: str
    rows: int
    threads: int
    steps: int
    rounds: int
    engines: Mapping[str, EngineFigures]
    left_out: Mapping[str, str] = Field(description="engines that were not run, and why")
    trajectory_speedup_fp32: float
    trajectory_cpu_speedup_fp32: float
    peak_memory_ratio: float | None
    size_ratio_fp16: float
    gpu_latency_ms: float | None = None
    energy_joules: float | None = None
    filled_by: Mapping[str, str]

    def to_json(self) -> str:
        """All of it."""
        return self.model_dump_json(indent=1) + "\n"
