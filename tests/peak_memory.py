"""Measures the peak memory of one step, or of one run of a session, in a process that has freed nothing before.

It imports only what is measured.
"""

from pathlib import Path

import numpy as np

from intaglio.pipeline.runs.memory import forget_peak, resident_bytes


def print_lean_peak(model: Path) -> None:
    """Print how many bytes one run of a lean session takes at most."""
    from intaglio.exporters.runtimes.onnxruntime.session import lean_session

    with lean_session(model) as session:
        before = resident_bytes("VmRSS")
        forget_peak()
        session.run(None, {"x": np.ones(1, np.float32)})
    print(resident_bytes("VmHWM") - before)


def run(step: str, folder: Path) -> None:
    """Run the step on the artifacts in a folder; a float graph is kept there for the next step."""
    from harness import run_pass

    from intaglio.exporters.float_graph.export_float import ExportFloat
    from intaglio.exporters.qdq.export_qdq import ExportQdq
    from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH

    measured = {"export-float": ExportFloat(), "export-qdq": ExportQdq()}[step]
    state = {key: key.type.load(folder / key.name) for key in measured.requires}
    made = run_pass(measured, state, folder / step)
    if FLOAT_GRAPH in made:
        (folder / FLOAT_GRAPH.name).mkdir()
        made[FLOAT_GRAPH].save(folder / FLOAT_GRAPH.name)


def print_peak(step: str, folder: Path) -> None:
    """Print how far the step takes this process beyond where it is after the same step on a tiny model."""
    run(step, folder / "small")
    forget_peak()
    before = resident_bytes("VmRSS")
    run(step, folder / "large")
    print(resident_bytes("VmHWM") - before)
