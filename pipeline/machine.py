"""Measure the memory of the machine that the process runs on, and return freed memory to it."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GROUPS = ("memory.max", "memory/memory.limit_in_bytes")
_MMAP_THRESHOLD = -3
"""Number of M_MMAP_THRESHOLD in malloc.h: the size in bytes above which a block is mapped on its own."""
_TRIM_THRESHOLD = -1
"""Number of M_TRIM_THRESHOLD: the free bytes at the end of the heap above which they are returned.

Setting one of the two fixes both, this one at 128 KiB: then the end of the heap is returned and mapped again for every
result of a few hundred KiB, which takes longer than to compute it."""
_giving_back = [0]
"""Number of blocks of `giving_back` that are open."""


def machine_bytes() -> int:
    """Return the machine's memory and swap in bytes, or the limit of this process or of its control group."""
    import psutil

    found = min(psutil.virtual_memory().total + psutil.swap_memory().total, *_process_limits())
    for name in _GROUPS:
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return int(found)


def _process_limits() -> Iterator[int]:
    """Yield the limits in bytes of what this process may allocate, as `ulimit -d` and `ulimit -v` set them."""
    yield sys.maxsize
    if sys.platform != "win32":
        import resource

        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                yield limit


@contextmanager
def giving_back() -> Iterator[None]:
    """Return freed memory to the system at once, where the C library can: blocks of 1 MiB or more.

    glibc keeps freed blocks below 32 MB for later ones. Where small blocks lie between them, they are not joined, and a
    process that frees what it allocates grows nevertheless. Each block is mapped on its own instead, which takes some
    processor time.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    _giving_back[0] += 1
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    mallopt(_TRIM_THRESHOLD, 16 << 20)
    trim(0)
    try:
        yield
    finally:
        _giving_back[0] -= 1
        if not _giving_back[0]:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)
