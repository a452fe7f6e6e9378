"""Measure the machine that the process runs on."""

from pathlib import Path

_GROUPS = ("memory.max", "memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """Return the machine's memory and swap in bytes, or the limit of this process's control group."""
    import psutil

    found = psutil.virtual_memory().total + psutil.swap_memory().total
    for name in _GROUPS:
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return int(found)
