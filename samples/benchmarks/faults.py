"""What a run survives: kills, a full disk, damage to the store, company, other numbers of threads, another CPU.

    python samples/benchmarks/faults.py [--kills 100] [--only KIND ...] [--json]

A tiny transformer with random weights is compiled for ONNX Runtime by the command, in processes of their own. A fault
is survived if nothing half-written is ever taken for whole, no message is a traceback, and the same command then ends
with the digests of an undisturbed run (of all but what holds measured times: latencies, and the report of them).

`kill`: SIGKILL, SIGTERM and Ctrl-C by turns, at random moments of the time that a run computes. `full disk`: no file
can grow beyond some number of bytes, for sizes of the files of an undisturbed store. `flipped byte`, `vanished`: one
object of a finished store each; damage is to be named, and healed by what the message says. `clock`: all files of the
store are from 1980, or 2100. `another CPU`: torch computes as on one without AVX, so that digests are others; survived
if the plan is the same and the deployed samples are as near to full precision, to `SAME_DB`.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import psutil
import typer
from rich.progress import Progress, track

from intaglio.pipeline.context import terminal
from intaglio.pipeline.manifest import Manifest, compiled_folders
from intaglio.pipeline.plan import QuantPlan
from intaglio.pipeline.store import Store, files_below, tree_digest

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
TIMED = ("benchmark", "report")
"""Steps whose results hold times."""
SAME_DB = 0.5
"""Samples whose PSNR differs by less are as near: what `verify` allows between the deployed ones and the simulated."""
NO_AVX = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
T = TypeVar("T")
Digests = Mapping[str, Mapping[str, str]]


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

    def start(self, *, largest_file: int = resource.RLIM_INFINITY, **environment: str) -> subprocess.Popen[str]:
        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it

        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "intaglio", "run", self.recipe, "--store", self.store, "--out", self.out],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Its exit code, and what it said."""
        _, said = process.communicate()
        return process.returncode, said

    @property
    def delivered(self) -> Path:
        """The folder of its target."""
        (folder,) = compiled_folders(self.out)
        return folder

    def digests(self) -> Digests:
        return {step.step: step.outputs for step in Manifest.read(self.delivered).steps if step.step not in TIMED}

    def psnr_db(self) -> float:
        """Of deployed samples to those of full precision."""
        found: float = json.loads((self.delivered / "metrics.json").read_text())["psnr_db"]
        return found

    def half_written(self) -> list[str]:
        """What is visible and not whole."""
        objects = Store(self.store).root / "objects"
        broken = [f"object {each.name}" for each in objects.iterdir() if tree_digest(each) != each.name]
        list(Store(self.store).records())  # raises where one is no record
        targets = [folder for folder in self.out.glob("*") if not folder.name.startswith(".")]
        return [*broken, *(f"{f}: {what}" for f in targets for what in Manifest.read(f).departures(f))]


@dataclass
class Tally:
    """Of one kind of fault; `lost` says what was wrong with those that were not survived."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
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

    def copied(self, name: str) -> Run:
        """With the store of the undisturbed run."""
        run = self.fresh(name)
        shutil.copytree(self.undisturbed.store, run.store)
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


def kills(bench: Bench, count: int) -> Tally:
    """A run goes on until it ends, however often it is killed; then the next one begins."""
    tally, chain = Tally(), 0
    with Progress(transient=True, console=terminal(), disable=not terminal().is_terminal) as progress:
        task = progress.add_task("kills", total=count)
        while tally.tried < count:
            run, problems_of = bench.fresh(f"kill-{chain}"), list[list[str]]()
            while tally.tried + len(problems_of) < count:
                problems = killed(run, bench, SIGNALS[(tally.tried + len(problems_of)) % len(SIGNALS)])
                if problems is None:
                    break
                problems_of.append(problems)
                progress.advance(task)
            end = bench.finished(run)
            for problems in problems_of:
                tally.count([*problems, *end])
            if not terminal().is_terminal:
                print(f"{tally.tried} of {count} kills", file=sys.stderr)
            shutil.rmtree(run.folder)
            chain += 1
    return tally


def killed(run: Run, bench: Bench, by: signal.Signals) -> list[str] | None:
    """What is wrong behind a kill; None where the run ended before it."""
    process, moment_s = run.start(), bench.rng.uniform(0.1, 0.9) * bench.cpu_s
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        if cpu_s(watched) >= moment_s:
            process.send_signal(by)
            break
        time.sleep(0.01)
    code, said = run.ended(process)
    if code == 0:
        return None
    fine = code in (130, -by) and "Traceback" not in said
    return run.half_written() + ([] if fine else [f"at {by.name} it ended with {code}: {said[-300:]}"])


def full_disks(bench: Bench, count: int) -> Tally:
    tally = Tally()
    sizes = sorted({file.stat().st_size for file in files_below(bench.undisturbed.store)} - {0})
    for size in bar(bench.rng.sample(sizes, min(count, len(sizes))), "full disks"):
        run = bench.fresh(f"disk-{size}")
        code, said = run.ended(run.start(largest_file=size - 1))
        problems = [] if code in (5, 6) and "Traceback" not in said else [f"{size}: ended with {code}: {said[-300:]}"]
        tally.count([*problems, *run.half_written(), *bench.finished(run)])
        shutil.rmtree(run.folder)
    return tally


def damages(bench: Bench, damage: Callable[[Path], None], name: str) -> Tally:
    """One object after the other."""
    tally = Tally()
    for each in bar(sorted((bench.undisturbed.store / "objects").iterdir()), name):
        run = bench.copied(name)
        damage(run.store / "objects" / each.name)
        code, said = run.ended(run.start())
        problems = []
        if code == 6 and (named := re.search(r"delete (\S+) and run again", said)):
            shutil.rmtree(named[1])
        elif code:
            problems = [f"{each.name}: ended with {code}: {said[-300:]}"]
        elif any(run.digests().get(step) != made for step, made in bench.expected.items()):
            problems = [f"{each.name}: taken for whole"]
        if code or problems:
            problems += bench.finished(run)
        tally.count(problems)
        shutil.rmtree(run.folder)
    return tally


def flip(rng: random.Random) -> Callable[[Path], None]:
    def flipped(folder: Path) -> None:
        file = rng.choice([file for file in files_below(folder) if file.stat().st_size])
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.chmod(0o644)
        file.write_bytes(content)

    return flipped


def companies(bench: Bench) -> Tally:
    """Two runs on one store, then four."""
    tally = Tally()
    for count in bar((2, 4), "company"):
        run = bench.fresh(f"company-{count}")
        processes = [run.start() for _ in range(count)]
        ends = [run.ended(process) for process in processes]
        tally.count([*(f"{count}: {said[-300:]}" for code, said in ends if code), *bench.finished(run)])
    return tally


def repeated(bench: Bench) -> Tally:
    """The same digests again, with other seeds of Python's hashes, and with two threads."""
    tally = Tally()
    for i, threads in enumerate((1, 1, 2)):
        tally.count(
            bench.finished(bench.fresh(f"repeated-{i}"), PYTHONHASHSEED=str(i + 1), OMP_NUM_THREADS=str(threads))
        )
    return tally


def another_cpu(bench: Bench) -> Tally:
    run, tally = bench.fresh("another-cpu"), Tally()
    code, said = run.ended(run.start(**NO_AVX))
    if code:
        problems = [f"ended with {code}: {said[-300:]}"]
    else:
        apart_db = abs(run.psnr_db() - bench.undisturbed.psnr_db())
        problems = [f"samples {apart_db:.2f} dB apart"] * (apart_db > SAME_DB)
        plans = [QuantPlan.load(each.delivered).schemes for each in (run, bench.undisturbed)]
        problems += ["another plan"] * (plans[0] != plans[1])
    tally.count([*problems, *run.half_written()])
    return tally


def clocks(bench: Bench) -> Tally:
    tally = Tally()
    for year in (1980, 2100):
        run = bench.copied(f"clock-{year}")
        then = time.mktime((year, 1, 2, 0, 0, 0, 0, 0, 0))
        for file in files_below(run.store):
            os.utime(file, (then, then))
        tally.count(bench.finished(run))
    return tally


def main(
    kill_count: Annotated[int, typer.Option("--kills", min=0)] = 100,
    disk_count: Annotated[int, typer.Option("--disks", min=0, help="sizes of files that a full disk refuses")] = 15,
    only: Annotated[list[str] | None, typer.Option(help="kinds of faults, as they are printed; all if none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    kinds: dict[str, Callable[[Bench], Tally]] = {
        "run again, 1 and 2 threads": repeated,
        "another CPU": another_cpu,
        "2 and 4 runs on one store": companies,
        "clock": clocks,
        "vanished object": lambda bench: damages(bench, shutil.rmtree, "vanished"),
        "flipped byte": lambda bench: damages(bench, flip(bench.rng), "flipped"),
        "full disk": lambda bench: full_disks(bench, disk_count),
        "kill": lambda bench: kills(bench, kill_count),
    }
    if unknown := set(only or ()) - set(kinds):
        raise typer.BadParameter(f"no kind of fault: {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench.begin(Path(place))
        if not as_json:
            print(f"{'an undisturbed run takes':28} {bench.seconds:.1f} s\n{'':28} tried  survived  lost")
        for name in only or kinds:
            tally = kinds[name](bench)
            found[name] = {"tried": tally.tried, "survived": tally.survived, "lost": tally.lost}
            if not as_json:
                print(f"{name:28} {tally.tried:5}  {tally.survived:8}  {len(tally.lost):4}", flush=True)
    if as_json:
        print(json.dumps(found))
    if any(each["lost"] for each in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
