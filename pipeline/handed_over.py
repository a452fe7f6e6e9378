"""Move or copy files into the store so that no large file is on the disk twice while it is stored.

The scratch files of a step are moved, because nobody else has them. Files anywhere else may be the user's. They are
copied, never linked: the store makes its files read-only, and a link would do that to the user's file too. Weights are
copied only when the store is known to lack them.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from errno import ENOSPC
from pathlib import Path

_owned: ContextVar[Path | None] = ContextVar("_owned", default=None)
_put_off: ContextVar[dict[Path, Path] | None] = ContextVar("_put_off", default=None)


@contextmanager
def handed_over(scratch: Path) -> Iterator[None]:
    """Let `place_file` move the files of this folder, which belong to the step that is being stored."""
    token = _owned.set(scratch.resolve())
    try:
        yield
    finally:
        _owned.reset(token)


def place_file(source: Path, to: Path) -> None:
    """Put an artifact's file at `to`: the file itself if it is handed over, else a copy. Raises OSError."""
    owned = _owned.get()
    if owned is not None and not source.is_symlink() and source.stat().st_nlink == 1:
        with suppress(OSError):  # another file system: the copy follows
            if source.resolve().is_relative_to(owned):
                source.replace(to)
                return
    shutil.copyfile(source, to)


@contextmanager
def copies_put_off() -> Iterator[dict[Path, Path]]:
    """Let `copy_weights` write empty files, and yield the file of the user that each of them stands for."""
    copies: dict[Path, Path] = {}
    token = _put_off.set(copies)
    try:
        yield copies
    finally:
        _put_off.reset(token)


def copy_weights(files: Iterable[tuple[Path, Path]]) -> None:
    """Copy files, each given with the place of its copy, or put that off. Raises OSError if they do not fit the disk.

    Nothing is written then.
    """
    copies, put_off = list(files), _put_off.get()
    if put_off is not None:
        for source, to in copies:
            to.touch()
            put_off[to] = source.resolve()
        return
    if not copies:
        return
    needed, place = sum(source.stat().st_size for source, _ in copies), copies[0][1].parent
    if needed > (free := shutil.disk_usage(place).free):
        raise OSError(ENOSPC, f"the weights have {needed:,} bytes, and {free:,} are free", str(place))
    for source, to in copies:
        shutil.copyfile(source, to)
