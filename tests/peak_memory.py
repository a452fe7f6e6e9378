"""Measures the peak memory of one step, or of one run of a session, in a process that has freed nothing before.

    python tests/peak_memory.py distill|merge|export-float|export-qdq FOLDER     the artifacts of two models, in `small`
                                                                                 and `large`
    python tests/peak_memory.py lean MODEL

It imports only what is measured.
"""

import json
import resource
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from intaglio.pipeline.machine import giving_back
from intaglio.pipeline.runs.memory import forget_peak, resident_bytes


def print_lean_peak(model: Path) -> None:
    """Print how many bytes one run of a lean session takes at most."""
    from intaglio.exporters.runtimes.onnxruntime.session import lean_session

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


def print_limited(folder: Path, recipe: str, most_bytes: int) -> None:
    """Compile the model in `large` while the process may allocate so many bytes beside what it has after `small`.

    Print the outputs of each step with weights in their files; then the error with all weights in memory.
    """
    from intaglio import Recipe, Store, compile
    from intaglio.pipeline.errors import IntaglioError
    from intaglio.pipeline.model import checkpoint

    def made(name: str, share: float) -> list[dict[str, str]]:
        checkpoint.FEW = share
        store = Store(folder / f"{name}-{share}")
        (target,) = compile(Recipe.parse(recipe), store, base=folder / name).values()
        return [dict(run.outputs) for run in target.runs]

    made("small", 0.0)
    status = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + most_bytes, resource.RLIM_INFINITY))
    print(json.dumps(made("large", 0.0)))
    try:
        print(made("large", sys.float_info.max))
    except IntaglioError as error:
        print(error)


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

    Two numbers of bytes: with the files that are mapped, and only of what is allocated, which is sampled.
    """
    run(step, folder / "small")
    forget_peak()
    before, anon_before = resident_bytes("VmRSS"), resident_bytes("RssAnon")
    anon, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            anon[0] = max(anon[0], resident_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(step, folder / "large")
    done.set()
    watcher.join()
    print(resident_bytes("VmHWM") - before, anon[0] - anon_before)


if __name__ == "__main__":
    if sys.argv[1] == "lean":
        print_lean_peak(Path(sys.argv[2]))
    else:
        print_peaks(sys.argv[1], Path(sys.argv[2]))
