"""Run one graph in its runtime, in a process of its own, so that the memory of each graph can be measured.

The process holds only the runtime: nothing here imports torch.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from intaglio.exporters.runtimes.calls import noise_feed, usual_shapes
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.errors import IntaglioError, TargetError
from intaglio.pipeline.runs.memory import forget_peak, resident_bytes
from intaglio.pipeline.runs.registry import find_runtime


@dataclass(frozen=True)
class Setting:
    """The folder of a graph, and the options of its session and of its calls."""

    folder: Path
    rows: int
    threads: int
    provider: str
    runtime: str


@dataclass(frozen=True)
class Loaded:
    """The provider of a loaded graph, the seconds of loading, and the bytes that it added to the process.

    Bytes are None where the system does not report them.
    """

    provider: str
    seconds: float
    resident_bytes: int | None
    peak_bytes: int | None
    half: bool = False
    """True where float16 is computed in float16."""


@dataclass(frozen=True)
class Spent:
    """Seconds of each call: by the clock, and CPU time of the process."""

    clock: tuple[float, ...]
    cpu: tuple[float, ...]


class EngineProcess:
    """A context manager that loads an engine in a new process, and ends the process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        """Load the graph. Raises TargetError for a graph that the runtime refuses."""
        self._pool.__enter__()
        self.loaded = self._pool.submit(_load, self._setting).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, count: int) -> Spent:
        """Call the graph `count` times in a row."""
        return self._pool.submit(_call, self._setting, count).result()


class _Engine:
    """An open graph, and the call that it is timed with."""

    def __init__(self, setting: Setting) -> None:
        graph, runtime = Graph.load(setting.folder), find_runtime(setting.runtime)
        runtime.prepare()
        before = forget_peak()
        began = time.perf_counter()
        self.opened = runtime.open(graph, threads=setting.threads, providers=[setting.provider])
        seconds = time.perf_counter() - began
        self.feed = noise_feed(graph, usual_shapes(graph, setting.rows), np.random.default_rng(0))
        self.opened.run(self.feed)
        resident = None if before is None else resident_bytes("VmRSS") - before
        peak = None if before is None else resident_bytes("VmHWM") - before
        self.loaded = Loaded(self.opened.executed_by, seconds, resident, peak, self.opened.half)

    def call(self, count: int) -> Spent:
        marks = [(time.perf_counter(), time.process_time())]
        for _ in range(count):
            self.opened.run(self.feed)
            marks.append((time.perf_counter(), time.process_time()))
        clock, cpu = (tuple(after - before for before, after in pairwise(each)) for each in zip(*marks, strict=True))
        return Spent(clock, cpu)


@cache
def _engine(setting: Setting) -> _Engine:
    """Return the engine of this process."""
    return _Engine(setting)


def _load(setting: Setting) -> Loaded:
    try:
        return _engine(setting).loaded
    except IntaglioError:
        raise
    except Exception as e:  # its errors have no common class
        raise TargetError(f"{setting.folder}: {setting.runtime} does not run the graph: {e}") from e


def _call(setting: Setting, count: int) -> Spent:
    return _engine(setting).call(count)
