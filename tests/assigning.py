"""Tables of errors and costs of a few layers, and every plan that they allow."""

import itertools

from harness import Artifacts

from intaglio.pipeline.artifacts.keys import SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.formats.cost import bit_operations, latency_s
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.numerics.quality import SampleRange

SCHEMES = {"float": FLOAT, "w8a8_token": W8A8_TOKEN, "w4a16": w4a16(32)}
ERRORS = ((1e-6, 5e-4), (2e-6, 3e-4), (3e-6, 9e-4), (1e-7, 2e-5), (4e-6, 1e-4))
EVERY = {"linear": tuple(SCHEMES)}
RTX = load_target("tensorrt-rtx")
SAMPLES = SampleRange(-2.0, 1.0, 0.5)


def table(*errors: tuple[float, float]) -> Sensitivity:
    layers = tuple(Layer(name=f"l{i}", op="linear", shape=(8 * (i + 1), 64), bias=False) for i in range(len(errors)))
    error = {
        layer.name: {"float": (0.0,), "w8a8_token": (e8,), "w4a16": (e4,)}
        for layer, (e8, e4) in zip(layers, errors, strict=True)
    }
    return Sensitivity(((0, 1),), (1.0,), layers, {layer.name: SCHEMES for layer in layers}, error, samples=SAMPLES)


def given(*errors: tuple[float, float], rows: tuple[float, ...] = (16, 4096, 256, 1, 1024), same_input=()) -> Artifacts:
    """A table of layers, how many rows they see, and a target with a device."""
    t = table(*errors)
    workload = Workload({layer.name: n for layer, n in zip(t.layers, rows, strict=False)}, same_input)
    return {SENSITIVITY: t, TARGET: RTX, WORKLOAD: workload}


def costs(artifacts, plan: dict[str, str]) -> dict[str, float]:
    """Return the costs of a plan relative to float, added up layer by layer."""
    rows, layers, device = artifacts[WORKLOAD].rows, artifacts[SENSITIVITY].layers, RTX.devices[0]
    amounts = {
        "size": lambda layer, s: layer.size_bytes(s),
        "latency": lambda layer, s: latency_s(layer, s, int(rows[layer.name]), device),
        "bops": lambda layer, s: bit_operations(layer, s, rows[layer.name]),
    }
    return {
        n: sum(f(x, SCHEMES[plan[x.name]]) for x in layers) / sum(f(x, FLOAT) for x in layers)
        for n, f in amounts.items()
    }


def every_plan(artifacts) -> list[dict[str, str]]:
    names = [layer.name for layer in artifacts[SENSITIVITY].layers]
    return [dict(zip(names, pick, strict=True)) for pick in itertools.product(SCHEMES, repeat=len(names))]


def loss(artifacts, plan: dict[str, str]) -> float:
    return sum(artifacts[SENSITIVITY].total(n, s) for n, s in plan.items())


def named(plan) -> dict[str, str]:
    return {n: s.name for n, s in plan.schemes.items()}
