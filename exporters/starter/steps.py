"""Choose the steps of a first recipe, with their options, from the facts about a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from intaglio.exporters.starter.effort import Effort, verified
from intaglio.pipeline.contract.recipe import Step
from intaglio.pipeline.formats.known import known_schemes
from intaglio.pipeline.formats.schemes import FEW_BITS, FLOAT, W7A8_TOKEN, W8A8_TOKEN, Float, with_output
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.runs.registry import find_pass, find_runtime, runtimes

if TYPE_CHECKING:
    from intaglio.exporters.starter.found import Found
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.formats.target import Target

INT8 = ("w8a8_token", "w8a8_step")
USUAL: Mapping[str, tuple[str, ...]] = {
    "linear": ("w8a8_token", "w8a8s_token", "w8a16", "w4a16"),
    "conv": ("w8a8_step", "w8a8s_step", "w8a16", "w4a16"),
}
"""Schemes of a first recipe, for each kind of layer."""
TIMES = "time-layers"
QUALITY_DB = 40
"""Mean PSNR of the samples that a first recipe keeps, in dB."""
LARGE_BYTES = 10**9
"""Size of float32 weights in bytes above which activations are recomputed instead of kept."""


def steps_of(found: Found, effort: Effort) -> Iterator[tuple[str, str]]:
    """Yield each step as YAML, with its comment."""
    yield f"calibrate: {{samples: {effort.calibrated}}}", "needs no data set: records the model's own trajectories"
    yield from _formats(found, effort)
    large = 4 * found.parameters >= LARGE_BYTES and found.blocks
    if effort.updates == 0:
        yield "distill: {updates: 0}", "trains nothing: plans with 4-bit weights gain most from updates, such as 120"
    elif large:
        yield "distill: {recompute: true}", "`scope: block` takes less memory still"
    else:
        yield "distill", "`updates: 0` leaves training out"
    yield from ((step, "") for step in ("merge", "export-float", "export-qdq", "lint"))
    needed = {load_target(name).runtime for name in found.targets}
    steps = dict.fromkeys(step for name, runtime in runtimes().items() if name in needed for step in runtime.steps)
    yield from ((step, "") for step in steps)
    yield f"verify: {{samples: {verified(found, effort.verified)}}}", ""
    yield ("benchmark: {rows: 2}" if effort.screened else "benchmark: {rows: 2, rounds: 5}"), ""
    yield "report", ""


def _formats(found: Found, effort: Effort) -> Iterator[tuple[str, str]]:
    """Yield the steps that choose a scheme for each layer."""
    schemes, outputs = _schemes(found.targets), _rounds_outputs(found)
    conv = _with_outputs(schemes["conv"]) if outputs else []
    if effort.screened is None:
        rounded = conv and all(load_target(name).conv_output == "int8" for name in found.targets)
        names = [schemes["linear"][0], *conv[:1], *([] if rounded else schemes["conv"][:1])]
        yield f"uniform: {{schemes: [{', '.join(names)}]}}", "no choice of formats: that takes more time"
        return
    measured = {**schemes, "conv": [*schemes["conv"], *conv]}
    drawn = min(4, effort.drawn // 2)
    if _timed(found.targets):
        yield f"{TIMES}: {{schemes: {_flow(measured)}}}", "times every distinct layer here, in each format"
    amounts = f"rows: 2, buckets: {effort.buckets}, samples: {effort.screened}, drift_samples: {drawn}"
    yield (
        f"sensitivity: {{{amounts}, schemes: {_flow(measured)}}}",
        "predicts what each format of a layer costs in quality",
    )
    asked = f"drawn: {effort.drawn}" + (", conv_output: target" if outputs else "")
    quality = f"assign: {{budget: {{psnr: {QUALITY_DB}}}, schemes: {_flow(schemes)}, {asked}}}"
    yield quality, "the fastest plan with this PSNR in dB"


def amounts_of(found: Found, effort: Effort) -> Iterator[tuple[str, int]]:
    """Yield the name of each step whose time depends on denoiser rows, with their number."""
    assert found.cost is not None  # callers have checked this
    for written, _ in steps_of(found, effort):
        step = Step.model_validate(yaml.safe_load(written))
        options = find_pass(step.uses, Path()).pass_class.model_validate(dict(step.options))
        if (rows := options.forward_rows(found.cost)) is not None:
            yield step.name, rows


def _schemes(targets: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the schemes that all targets run, for each kind of layer; with 7-bit weights for CPUs that need them.

    Float is added if 8-bit weights with float inputs are missing, or if layers are timed: float may be the fastest.
    """
    here = [find_runtime(target.runtime).here(target) for target in map(load_target, targets)]
    formats = [target.formats for target in here]
    timed = _timed(targets)
    found = {}
    for op in ("linear", "conv"):
        common = [name for name in _for_kernels(USUAL[op], here) if all(name in each[op] for each in formats)]
        if all(isinstance(known_schemes()[name].input, Float) for name in common):
            common = [name for name in (*INT8, *common) if all(name in each[op] for each in formats)]
        found[op] = [*common, FLOAT.name] if timed or "w8a16" not in common else common
    return found


def _timed(targets: Sequence[str]) -> bool:
    """Return True if layers are timed on this machine for one of the targets."""
    return any(find_pass(TIMES, Path()).pass_class.applies(load_target(name)) for name in targets)


def _for_kernels(names: Sequence[str], targets: Sequence[Target]) -> list[str]:
    """Return the schemes with the widest weights that each target multiplies fast, if there are any."""
    known = known_schemes()
    found: dict[str, None] = {}
    for name in names:
        slow = [target for target in targets if not target.is_fast(known[name])]
        if len(slow) < len(targets):
            found[name] = None
        found |= {other.name: None for other in _narrower(known[name]) if any(t.is_fast(other) for t in slow)}
    return list(found)


def _narrower(scheme: LayerScheme) -> Iterator[LayerScheme]:
    """Yield the scheme with 7-bit weights, if this scheme has 8-bit weights and a rounded input."""
    if scheme.weight == W8A8_TOKEN.weight and not isinstance(scheme.input, Float):
        yield scheme.model_copy(update={"weight": W7A8_TOKEN.weight})


def _with_outputs(names: Sequence[str]) -> list[str]:
    """Return, for each scheme that a rounded output can be added to, the name of the scheme with a rounded output.

    Such schemes have an input scale for each step, and weights of more than 4 bits. All others are left out.
    """
    known = known_schemes()
    return [with_output(known[n]).name for n in names if known[n].by_step and known[n].weight_bits > FEW_BITS]


def _rounds_outputs(found: Found) -> bool:
    """Return True if the model has convolutions that a target runs on integers only if their output is rounded."""
    return any(layer.op == "conv" for layer in found.layers) and any(
        load_target(name).conv_output == "int8" for name in found.targets
    )


def _flow(schemes: Mapping[str, Sequence[str]]) -> str:
    """Return schemes of each kind of layer as YAML in one line."""
    written = (f"{op}: [{', '.join(names)}]" for op, names in schemes.items())
    return f"{{{', '.join(written)}}}"
