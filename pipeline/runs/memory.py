"""Estimate the memory that a run needs, and measure the memory that each step takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    from intaglio.pipeline.model.checkpoint import Checkpoint

PER_PARAMETER = 4 * 1.2
"""Bytes per float32 parameter that the largest steps hold; `samples/benchmarks/full_size.py` measures them."""
INTERPRETER = 500_000_000
"""Bytes that Python needs with torch and ONNX Runtime."""
_GROUPS = ("memory.max", "memory/memory.limit_in_bytes")
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def least_bytes(parameters: int) -> int:
    """Return the least memory in bytes that compiling a denoiser of this size needs."""
    return INTERPRETER + int(PER_PARAMETER * parameters)


def machine_bytes() -> int:
    """Return the machine's memory and swap in bytes, or the limit of this process's control group."""
    import psutil

    found = psutil.virtual_memory().total + psutil.swap_memory().total
    for name in _GROUPS:
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return found


def check_memory(model: Checkpoint) -> None:
    """Raise RecipeError if the model needs more memory than the machine has."""
    parameters = model.parameter_count()
    least, there = least_bytes(parameters), machine_bytes()
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


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return a memory figure of this process in bytes. VmRSS: now; VmHWM: the peak since start or reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
