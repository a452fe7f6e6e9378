"""Disturb runs by kills, a full disk, damage to the store, files and folders of others, company, and another CPU.

    python samples/benchmarks/faults.py [--kills 100] [--only KIND ...] [--json]

A tiny transformer with random weights is compiled for ONNX Runtime by the command, in processes of their own. It holds
against a fault if nothing half-written is ever taken for whole, no message is a traceback, nothing of a user's is lost,
and the same command then ends with the digests of an undisturbed run (of all but what holds measured times: latencies,
and the report of them).

`kill`: SIGKILL, SIGTERM and Ctrl-C by turns, at random moments of the time that a run computes, with older results and
a user's files in the folder of results; `kill at the end`: while new results take the place of the older ones. `full
disk`: no file can grow beyond some number of bytes, for sizes of the files of an undisturbed store. `flipped byte`,
`vanished object`: one object of a finished store each; damage is to be named, and healed by what the message says.
`clock`: all files of the store are from 1980, or 2100. `another CPU`: torch computes as on one without AVX, so that
digests are others; held if the plan is the same and the deployed samples are as near to full precision, to `SAME_DB`
beyond two standard errors.

`user's files`, `folders of others`, `linked results`, `damaged record` and `what a kit is given`: files that are not as
a run left them. What is the user's stays as it was; what cannot be worked with is refused in one message.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import psutil
import typer
from _faults_bench import Bench, Run, Tally, bar, cpu_s, flip
from _faults_files import Mine, folders_of_others, kits, linked_results, records, replacements, users_files
from rich.progress import Progress

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.contract.context import terminal
from intaglio.pipeline.runs.store import files_below

SAME_DB = 0.5
"""Samples whose PSNR differs by less, beyond two standard errors, are as near. `verify` allows the same difference
between deployed and simulated samples."""
NO_AVX = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kills(bench: Bench, count: int) -> Tally:
    """A run goes on until it ends, however often it is killed; then the next one begins."""
    tally, chain = Tally(), 0
    with Progress(transient=True, console=terminal(), disable=not terminal().is_terminal) as progress:
        task = progress.add_task("kills", total=count)
        while tally.tried < count:
            run, problems_of = bench.fresh(f"kill-{chain}"), list[list[str]]()
            shutil.copytree(bench.undisturbed.out, run.out)
            mine = Mine(run.delivered)
            while tally.tried + len(problems_of) < count:
                problems = killed(run, bench, SIGNALS[(tally.tried + len(problems_of)) % len(SIGNALS)])
                if problems is None:
                    break
                problems_of.append([*problems, *mine.problems()])
                progress.advance(task)
            end = [*bench.finished(run), *mine.problems()]
            for problems in problems_of:
                tally.count([*problems, *end])
            if not terminal().is_terminal:
                print(f"{tally.tried} of {count} kills", file=sys.stderr)
            shutil.rmtree(run.folder)
            chain += 1
    return tally


def killed(run: Run, bench: Bench, by: signal.Signals) -> list[str] | None:
    """Kill a run and return what is wrong afterwards; None where the run ended before."""
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
        apart_B = run.samples_db() - bench.undisturbed.samples_db()
        apart_db, error_db = abs(float(apart_B.mean())), float(apart_B.std()) / len(apart_B) ** 0.5
        said = f"samples {apart_db:.2f} dB apart, standard error {error_db:.2f} dB"
        problems = [said] * (apart_db - 2 * error_db > SAME_DB)
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
    end_count: Annotated[int, typer.Option("--end-kills", min=0, help="kills while results are replaced")] = 20,
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
        "flipped byte": lambda bench: damages(bench, lambda folder: flip(bench.rng, folder), "flipped"),
        "user's files": users_files,
        "folders of others": folders_of_others,
        "linked results": linked_results,
        "damaged record": records,
        "what a kit is given": kits,
        "full disk": lambda bench: full_disks(bench, disk_count),
        "kill at the end": lambda bench: replacements(bench, end_count),
        "kill": lambda bench: kills(bench, kill_count),
    }
    if unknown := set(only or ()) - set(kinds):
        raise typer.BadParameter(f"no kind of fault: {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench.begin(Path(place))
        if not as_json:
            print(f"{'an undisturbed run takes':28} {bench.seconds:.1f} s\n{'':28} tried  passed  failed")
        for name in only or kinds:
            tally = kinds[name](bench)
            found[name] = {"tried": tally.tried, "held": tally.held, "lost": tally.lost}
            if not as_json:
                print(f"{name:28} {tally.tried:5}  {tally.held:6}  {len(tally.lost):6}", flush=True)
    if as_json:
        print(json.dumps(found))
    if any(each["lost"] for each in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
