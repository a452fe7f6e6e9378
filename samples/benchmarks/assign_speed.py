"""Measure how long assigning takes on a large random model of linear layers, with six formats and three budgets.

    python samples/benchmarks/assign_speed.py [--layers 1000] [--size 0.3 --latency 0.285 --bops 0.12] [--json]

Widths, rows and sensitivities are drawn at random: errors of layers spread over orders of magnitude, and formats differ
by factors of their own from layer to layer. Latency is the roofline of an RTX 4090. The gap is to the relaxed problem,
in which a layer may mix formats: no plan is better than that.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.pipeline.artifacts.keys import FRONT, SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.layer import Layer, structural_schemes
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.numerics.quality import SampleRange

WORST = {"float": 0, "w8a8_token": 1, "w8a8_step": 1.5, "w4a16": 20, "w4a8_token": 22, "w4a4_token": 300}
"""Error of a layer in each scheme, about, relative to w8a8_token."""


def main(
    layers: Annotated[int, typer.Option(help="of the model")] = 1000,
    size: Annotated[float, typer.Option(help="bytes allowed, relative to fp16")] = 0.3,
    latency: Annotated[float, typer.Option(help="time allowed, relative to fp16")] = 0.285,
    bops: Annotated[float, typer.Option(help="bit operations allowed, relative to 16 x 16 bits")] = 0.12,
    gap: Annotated[float, typer.Option(help="assign.mip_rel_gap")] = 1e-3,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    table, workload = model(layers, np.random.default_rng(seed))
    artifacts = {SENSITIVITY: table, WORKLOAD: workload, TARGET: load_target("tensorrt-rtx")}
    limits = {"size": size, "latency": latency, "bops": bops}
    step = AssignPrecision(budget=Budget(**limits), schemes={"linear": tuple(WORST)}, mip_rel_gap=gap, front=0)
    began = time.perf_counter(), time.process_time()
    chosen = run(step, artifacts)[FRONT].chosen
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    bound = step._problem(table, workload, artifacts[TARGET], Context(Path())).knapsack.bound(limits)
    assert bound is not None  # there is a plan
    began = time.perf_counter(), time.process_time()
    front = run(step.model_copy(update={"front": 16}), artifacts)[FRONT]
    figures = {
        "layers": layers,
        "formats": len(WORST),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gap": 1 - bound / chosen.loss,
        **{f"{name} of {limit:g}": chosen.costs[name] for name, limit in limits.items()},
        "predicted_db": front.psnr_db(chosen),
        "seconds_with_front": time.perf_counter() - began[0],
        "cpu_seconds_with_front": time.process_time() - began[1],
        "front_points": len(front.points),
        "front_sizes": [front.points[0].costs["size"], front.points[-1].costs["size"]],
    }
    print(json.dumps(figures) if as_json else "\n".join(f"{name:24} {value}" for name, value in figures.items()))


def run(step: AssignPrecision, artifacts: dict) -> State:
    return State(step.run(State(artifacts, reader="assign"), Context(Path())), reader="benchmark")


def model(count: int, rng: np.random.Generator) -> tuple[Sensitivity, Workload]:
    """Layers of 64 to 2496 features in and out, on 1 to 4096 rows."""
    layers, schemes, error, rows = [], {}, {}, {}
    for i in range(count):
        n, k = (64 * int(width) for width in rng.integers(1, 40, 2))
        layer = Layer(name=f"layer.{i}", op="linear", shape=(n, k), bias=True)
        loss = 10 ** rng.normal(-6, 1)
        found = {scheme.name: scheme for scheme in structural_schemes(layer, names=tuple(WORST))}
        layers.append(layer)
        schemes[layer.name] = found
        error[layer.name] = {name: (loss * WORST[name] * 10 ** rng.normal(0, 0.15),) for name in found}
        rows[layer.name] = float(rng.choice([1, 77, 256, 1024, 4096]))
    samples = SampleRange(-1.0, 1.0, 0.25)
    return Sensitivity(((0, 1),), (1.0,), tuple(layers), schemes, error, samples=samples), Workload(rows)


if __name__ == "__main__":
    typer.run(main)
