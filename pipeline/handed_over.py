"""Move files into the store instead of copying them where nobody else has them: the scratch files of a step.

A large graph would otherwise be on the disk twice while it is stored. Files anywhere else may be the user's. They are
copied, never linked: the store makes its files read-only, and a link would do that to the user's file too.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

_owned: ContextVar[Path | None] = ContextVar("_owned", default=None)


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
