"""Measures the peak memory of one step, or of one run of a session, in a process that has freed nothing before.

Each function is called in a process of its own, and imports only what is measured.
"""

import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from intaglio.pipeline.machine import giving_back
from intaglio.pipeline.runs.memory import forget_peak, resident_bytes


def print_lean_peak(model: Path) -> None:
    """Print how many bytes one run of a lean session takes at most."""
    from intaglio.exporters.float_graph.lean_session import lean_session

    with lean_session(model) as session:
        before = resident_bytes("VmRSS")
        forget_peak()
        session.run(None, {"x": np.ones(1, np.float32)})
    print(resident_bytes("VmHWM") - before)


def print_returned() -> None:
    """Print how many bytes 20 freed blocks of 4 MiB leave behind, with blocks of 0.25 MiB between them that are kept.

    Two numbers: inside `giving_back`, and after it.
    """
    for lean in (True, False):
        with giving_back() if lean else nullcontext():
            with giving_back() if lean else nullcontext():
                pass
            before = resident_bytes("RssAnon")
            blocks = [np.ones(1 << (18 if each % 2 else 22), np.uint8) for each in range(40)]
            del blocks[::2]
            print(resident_bytes("RssAnon") - before)


def print_compiled(folder: Path, recipe: str) -> None:
    """Compile the model in `large` after the one in `small`, so that every library is loaded and has its memory.

    Print the outputs of its steps with weights in their files, how many bytes that allocates at most beside what the
    process had, and how many the first step allocates with all weights in memory.
    """
    from intaglio import Recipe, Store, compile
    from intaglio.pipeline.model import checkpoint

    steps = Recipe.parse(recipe)
    first = steps.model_copy(update={"steps": steps.steps[:1]})

    def made(name: str, what: Recipe, share: float) -> list[dict[str, str]]:
        checkpoint.FEW = share
        (target,) = compile(what, Store(folder / f"{name}-{share}"), base=folder / name).values()
        return [dict(run.outputs) for run in target.runs]

    made("small", steps, 0.0)
    outputs: list[dict[str, str]] = []
    allocated = allocated_by(lambda: outputs.extend(made("large", steps, 0.0)))
    print(json.dumps([outputs, allocated, allocated_by(lambda: made("large", first, sys.float_info.max))]))


def allocated_by(work: Callable[[], object]) -> int:
    """Return how many bytes `work` allocates at most beside what the process had, sampled every 2 ms."""
    before, most, done = resident_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0] - before


def run(step: str, folder: Path) -> None:
    """Run the step on the artifacts in a folder; what it makes is kept there for the next step."""
    from harness import run_pass

    from intaglio.exporters.float_graph.export_float import ExportFloat
    from intaglio.exporters.qdq.export_qdq import ExportQdq
    from intaglio.passes.distill.distill import Distill
    from intaglio.passes.merge import MergeAdapters

    steps = (Distill(updates=0), MergeAdapters(), ExportFloat(), ExportQdq())
    measured = next(each for each in steps if each.name == step)
    state = {key: key.type.load(folder / key.name) for key in measured.requires}
    for key, artifact in run_pass(measured, state, folder / step).items():
        if not (folder / key.name).exists():
            (folder / key.name).mkdir()
            artifact.save(folder / key.name)


def print_peaks(step: str, folder: Path) -> None:
    """Print how far the step takes this process beyond where it is after the same step on a tiny model.

    Two numbers of bytes: with the files that are mapped, and only of what is allocated, which is sampled. Freed memory
    goes back at once, so that what a step holds is counted and what it held before is not. The folder has the artifacts
    of both models, in `small` and `large`.
    """
    with giving_back():
        run(step, folder / "small")
        forget_peak()
        before = resident_bytes("VmRSS")
        allocated = allocated_by(lambda: run(step, folder / "large"))
        print(resident_bytes("VmHWM") - before, allocated)
