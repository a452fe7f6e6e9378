"""What a run needs of the machine's memory, before it begins, and what each of its steps took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    from intaglio.pipeline.model.checkpoint import Checkpoint

PER_PARAMETER = 4 * 1.2
"""Bytes that the hungriest steps hold of a float32 model, at least; `samples/benchmarks/full_size.py` measures them."""
INTERPRETER = 500_000_000
"""Bytes of Python with torch and ONNX Runtime."""
_GROUPS = ("memory.max", "memory/memory.limit_in_bytes")
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def least_bytes(parameters: int) -> int:
    """What compiling a denoiser of so many parameters takes at least."""
    return INTERPRETER + int(PER_PARAMETER * parameters)


def machine_bytes() -> int:
    """Memory and swap, or what the control group of this process allows."""
    import psutil

    found = psutil.virtual_memory().total + psutil.swap_memory().total
    for name in _GROUPS:
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return found


def check_memory(model: Checkpoint) -> None:
    """Raises RecipeError for a model that cannot be compiled here."""
    parameters = model.parameter_count()
    least, there = least_bytes(parameters), machine_bytes()
    if least > there:
        raise RecipeError(
            f"the denoiser has {parameters:,} parameters, {4 * parameters / 1e9:.1f} GB in float32: compiling it takes"
            f" at least {least / 1e9:.1f} GB, and there are {there / 1e9:.1f} GB here: run it on a larger machine"
        )


def forget_peak() -> int | None:
    """From here on the peak of this process counts; resident bytes now. None where there is no Linux to ask."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return None
    return resident_bytes("VmRSS")


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Of this process. VmRSS: now; VmHWM: at most, since it began or its peak was forgotten."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
