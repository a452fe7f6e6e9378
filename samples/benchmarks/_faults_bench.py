"""Runs the command on a tiny transformer, in processes of their own, and counts which faults it holds against."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import typer
from rich.progress import track
from safetensors.torch import load_file

from intaglio.pipeline.contract.context import terminal
from intaglio.pipeline.numerics.quality import SampleRange, mean_squared_error, psnr_db
from intaglio.pipeline.runs.manifest import Manifest
from intaglio.pipeline.runs.store import Store, files_below, tree_digest

RECIPE = """
model: {path: "%s:dit", sampling_steps: 4, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 8}
  - sensitivity: {buckets: 1, rows: 2, samples: 4}
  - assign: {budget: {size: 0.45}}
  - balance
  - distill: {updates: 20, samples: 4, rank: 4}
  - merge
  - export-float
  - export-qdq
  - lint
  - onnxruntime
  - verify: {samples: 4, rows: 4, gap_db_tolerance: 3.0}
  - benchmark: {rounds: 2}
  - report
"""
PYTHONPATH = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
"""The factories of tiny_families.py are in modules beside it."""
TARGET = "onnxruntime-cpu"
TIMED = ("benchmark", "report")
"""Steps whose results hold times."""
T = TypeVar("T")
Digests = Mapping[str, Mapping[str, str]]
Ended = tuple[int, str]
"""The exit code of a command, and what it said."""


@dataclass(frozen=True)
class Run:
    """One store, and the results that its run writes."""

    folder: Path
    recipe: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def delivered(self) -> Path:
        """The folder of its target."""
        return self.out / TARGET

    def start(self, *, largest_file: int = resource.RLIM_INFINITY, **environment: str) -> subprocess.Popen[str]:
        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it

        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "intaglio", "run", self.recipe, "--store", self.store, "--out", self.out],
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def ended(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the end of the process."""
        _, said = process.communicate()
        return process.returncode, said

    def digests(self) -> Digests:
        return {step.step: step.outputs for step in Manifest.read(self.delivered).steps if step.step not in TIMED}

    def samples_db(self) -> torch.Tensor:
        """PSNR of each deployed sample to full precision, (B,)."""
        (file,) = Store(self.store).root.glob("objects/*/samples.safetensors")
        drawn = load_file(file)
        reference = drawn["full_precision"]
        return psnr_db(mean_squared_error(drawn["deployed"], reference), SampleRange.of(reference).peak)

    def half_written(self) -> list[str]:
        """Return the objects, records and results that are visible and not whole."""
        objects = Store(self.store).root / "objects"
        broken = [f"object {each.name}" for each in objects.iterdir() if tree_digest(each) != each.name]
        list(Store(self.store).records())  # raises where one is no record
        results = Manifest.read(self.delivered).damage(self.delivered) if self.delivered.exists() else ()
        return [*broken, *(f"{self.delivered}: {what}" for what in results)]


@dataclass
class Tally:
    """Count of the faults of one kind; `lost` says what was wrong with those that did not end well."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.tried - len(self.lost)

    def count(self, problems: Sequence[str]) -> None:
        self.tried += 1
        if problems:
            self.lost.append("; ".join(problems))
            print(f"lost: {self.lost[-1]}", file=sys.stderr)


@dataclass
class Bench:
    """The undisturbed run, and where the others are."""

    place: Path
    undisturbed: Run
    expected: Digests
    seconds: float
    cpu_s: float
    rng: random.Random

    @classmethod
    def begin(cls, place: Path) -> "Bench":
        families = Path(__file__).with_name("tiny_families.py")
        recipe = place / "recipe.yaml"
        recipe.write_text(RECIPE % Path(os.path.relpath(families, place)).as_posix())
        run, began, computed_s = Run(place / "undisturbed", recipe), time.perf_counter(), ended_cpu_s()
        code, said = run.ended(run.start())
        if code:
            raise typer.BadParameter(f"the undisturbed run ended with {code}: {said}")
        seconds, cpu_s = time.perf_counter() - began, ended_cpu_s() - computed_s
        return cls(place, run, run.digests(), seconds, cpu_s, random.Random(0))

    def fresh(self, name: str) -> Run:
        return Run(self.place / name, self.undisturbed.recipe)

    def copied(self, name: str, *, results: bool = False) -> Run:
        """With the store of the undisturbed run, and its results if `results`."""
        run = self.fresh(name)
        shutil.copytree(self.undisturbed.store, run.store)
        if results:
            shutil.copytree(self.undisturbed.out, run.out)
        return run

    def finished(self, run: Run, **environment: str) -> list[str]:
        """Problems of the same command, given again until it ends."""
        code, said = run.ended(run.start(**environment))
        if code:
            return [f"ended with {code}: {said[-300:]}"]
        different = [step for step, made in self.expected.items() if run.digests().get(step) != made]
        return [*run.half_written(), *(f"{step} made something else" for step in different)]


def ended_cpu_s() -> float:
    """CPU seconds of all processes of this one that ended, with theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds so far, with those of its processes that ended."""
    return sum(process.cpu_times()[:4])


def bar(items: Sequence[T], name: str) -> Iterable[T]:
    return track(items, name, transient=True, console=terminal(), disable=not terminal().is_terminal)


def flip(rng: random.Random, folder: Path) -> None:
    """Change a bit of one file in the folder."""
    file = rng.choice([file for file in files_below(folder) if file.stat().st_size])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.chmod(0o644)
    file.write_bytes(content)
