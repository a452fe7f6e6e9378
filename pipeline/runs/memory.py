"""Estimate the memory that a run needs, and measure the memory that each step takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.machine import machine_bytes

if TYPE_CHECKING:
    from intaglio.pipeline.contract.pass_base import Pass
    from intaglio.pipeline.model.checkpoint import Checkpoint

PER_PARAMETER = 4 * 1.2
"""Bytes per float32 parameter that the largest steps hold; `samples/benchmarks/full_size.py` measures them."""
PER_LAYER = 4 * 4
"""Bytes per parameter of the largest tensor that a step holds where weights stay in their files: the tensor as it is
read, and what is computed from it."""
INTERPRETER = 500_000_000
"""Bytes that Python needs with torch and ONNX Runtime."""
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def least_bytes(parameters: int) -> int:
    """Return the least memory in bytes that training a denoiser of this size and measuring its layers need."""
    return INTERPRETER + int(PER_PARAMETER * parameters)


def least_stored_bytes(largest: int) -> int:
    """Return the least memory in bytes for steps that read one weight at a time; `largest` has so many parameters."""
    return INTERPRETER + PER_LAYER * largest


def estimated_bytes(step: Pass, sizes: Sequence[int], *, large: bool) -> int | None:
    """Return about how much memory in bytes a step needs for a model's weights; None if it does not read the model.

    `sizes`: the number of values of each weight. `large`: the weights stay in their files, except in steps that hold
    them all.
    """
    from intaglio.pipeline.artifacts.keys import MODEL

    if MODEL not in step.requires:
        return None
    if step.holds_weights():
        return least_bytes(sum(sizes))
    return least_stored_bytes(max(sizes, default=0)) if large else INTERPRETER + 4 * sum(sizes)


def check_memory(model: Checkpoint, *, whole: bool) -> None:
    """Raise RecipeError if the model needs more memory than the machine has.

    `whole`: some step holds all weights. Otherwise those of a folder stay in their files; a factory makes them all.
    """
    sizes = [parameter.numel() for parameter in model.empty().parameters()]
    parameters = sum(sizes)
    least = least_bytes(parameters) if whole or model.entry else least_stored_bytes(max(sizes, default=0))
    there = machine_bytes()
    if least > there:
        raise RecipeError(
            f"the denoiser has {parameters:,} parameters, {4 * parameters / 1e9:.1f} GB in float32: compiling it takes"
            f" at least {least / 1e9:.1f} GB, and there are {there / 1e9:.1f} GB here: run it on a larger machine"
        )


def forget_peak() -> int | None:
    """Reset the peak of this process and return its resident bytes; None on systems other than Linux."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return None
    return resident_bytes("VmRSS")


def resident_bytes(field: Literal["VmRSS", "VmHWM", "RssAnon"]) -> int:
    """Return a memory figure of this process in bytes: VmRSS now, VmHWM at most since the start or a reset.

    RssAnon is the part of VmRSS that is no file: the system cannot drop it when it needs the memory.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
