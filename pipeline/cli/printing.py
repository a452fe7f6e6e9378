"""Print results on a terminal."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from intaglio.pipeline.cli.console import duration, print_table, printing
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.known import known_schemes
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.runs.machine import Found, Machine
from intaglio.pipeline.runs.runner import PlannedStep

LONGEST_PROBLEM = 8000
"""Largest number of characters of one problem in a message."""


def say(text: str, *, end: str = "\n", error: bool = False) -> None:
    """Print lines, to stderr if they are an error, with control characters written as escapes.

    Names and messages may come from untrusted files: every command prints through here or through `print_table`.
    """
    lines = "\n".join(map(printable, text.split("\n")))
    with nullcontext() if error else printing():
        print(lines, end=end, file=sys.stderr if error else sys.stdout)


def shortened(problem: str) -> str:
    """Return the message of one problem; its middle is left out if it has more than LONGEST_PROBLEM characters."""
    if len(problem) <= LONGEST_PROBLEM:
        return problem
    left_out = len(problem) - LONGEST_PROBLEM
    return f"{problem[: LONGEST_PROBLEM // 2]} ... ({left_out} characters) ... {problem[-LONGEST_PROBLEM // 2 :]}"


class EscapedFormatter(logging.Formatter):
    """Format log lines with control characters written as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or the lines of a traceback."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def print_machine(machine: Machine) -> None:
    """Print processor, memory, GPUs, packages, and what this machine can do for each target."""
    features = machine.cpu_features
    known = "features not known" if features is None else " ".join(n for n, there in features.items() if there) or "-"
    memory = "not known" if machine.memory_bytes is None else f"{machine.memory_bytes / 1e9:.1f} GB"
    gpus = [f"{gpu.name}, {gpu.memory_bytes / 1e9:.1f} GB, {gpu.compute_capability}" for gpu in machine.gpus]
    lines = [
        f"Python      {machine.python}, {machine.system}",
        f"CPU         {machine.cpu}, {machine.cores} cores, {known}",
        f"memory      {memory}",
        f"GPU         {'; '.join(gpus) or 'none that torch can use'}",
        *(f"{name:<11} {fact.text}" for name, fact in machine.facts.items()),
        *(f"FAULT       {what}: {fault}" for what, fault in machine.faults.items()),
    ]
    say("\n".join(lines))

    def state(found: Found) -> str:
        return found.fault or found.version or f"not here: {found.install}"

    print_table("", ("package", "", "for"), [(name, state(p), p.serves) for name, p in machine.packages.items()])
    columns = ("target", "compile", "build the engine", "run", "check the graph")
    rows = [
        (name, *(a.how if a.here else f"no: {a.how}" for a in (each.compile, each.build, each.run, each.verify)))
        for name, each in machine.targets.items()
    ]
    print_table("", columns, rows)


def plan_row(step: PlannedStep) -> tuple[str, str, str, str, str]:
    """Return the row of one step for the table that `intaglio plan` prints."""

    def size(count: int | None) -> str:
        return "" if count is None else f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

    status = {"hit": "in the store", "runs": "runs", "depends": "runs if an earlier output changes"}[step.status]
    if step.seconds is not None:
        return step.step, status, duration(step.seconds), size(step.peak_bytes), size(step.disk_bytes)
    seconds = "a few seconds" if step.estimate_s is None else f"about {duration(step.estimate_s)}"
    held, stored = (f"about {size(count)}" if count else "" for count in (step.estimate_bytes, step.disk_bytes))
    return step.step, "runs", seconds, held, stored


def target_rows(target: Target) -> Iterator[tuple[str, ...]]:
    """Yield a row for each device of a target, or one row if it lists none."""
    formats = (_in_short(target.formats[op]) for op in ("linear", "conv"))
    about: tuple[str, ...] = (target.name, str(target.opset_max), *formats)
    for device in target.devices:
        figures = (device.bandwidth_gb_s, device.fp16_tflops, device.int8_tops)
        yield *about, device.description, f"{device.memory_gb:g} GB", *(f"{figure:g}" for figure in figures)
        about = ("",) * len(about)
    if not target.devices:
        yield *about, "-", *("",) * 4


def _in_short(schemes: Sequence[str]) -> str:
    """Return weights and inputs alone: `w8a8_token, w8a8s_step` -> `w8a8`."""
    known = known_schemes()
    return " ".join(dict.fromkeys(known[name].label for name in schemes if known[name] != FLOAT))


def print_target(target: Target) -> None:
    """Print a target: its runtime, its limits, its formats and the sources of its facts."""
    limits = target.limits
    lines = [
        f"{target.name}: {target.description}",
        f"runtime     {target.runtime}, opsets up to {target.opset_max}",
        *(f"{op:<11} {', '.join(schemes)}" for op, schemes in target.formats.items()),
        f"groups of   {', '.join(map(str, target.group_sizes))} input features",
        f"codes       {target.activation_dtype} inputs; reads {', '.join(limits.code_types)}",
        f"multiplies  {f'codes in {products}' if (products := ', '.join(limits.integer_products)) else 'no codes'}",
    ]
    if target.kernels:
        lines.append(
            f"kernels     {', else '.join(kernels.name for kernels in target.kernels)}: the first that are exact"
        )
    for device in target.devices:
        figures = f"{device.memory_gb:g} GB, {device.bandwidth_gb_s:g} GB/s"
        peak = f"{device.fp16_tflops:g} TFLOPS in float16, {device.int8_tops:g} TOPS in int8"
        lines += ["", f"{device.description}, compute capability {device.compute_capability}: {figures}, {peak}"]
        lines.append(f"    [{device.source}]")
    for fact in target.facts:
        lines += ["", fact.fact, f"    [{fact.source}]"]
    say("\n".join(lines))
