"""Replace a folder by a new one atomically, and keep files in it that intaglio did not write.

Beside `TARGET`, while it is replaced, lies `.TARGET.intaglio-<random>`; the working process holds its `lock`:

staged/   the new folder, while it is filled: copies of delivered files, and hard links to the user's files
whole/    the new folder when it is complete; after the exchange, the older folder
older/    the older folder, on systems that cannot exchange two folders and rename them one after the other
"""

import ctypes
import errno
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from intaglio.pipeline.errors import LISTED
from intaglio.pipeline.files import printable
from intaglio.pipeline.runs.manifest import MANIFEST, intact_files
from intaglio.pipeline.runs.store import entries_below, remove_tree

log = logging.getLogger(__name__)

LOCK, STAGED, WHOLE, OLDER = "lock", "staged", "whole", "older"
KEPT = ".kept"
"""Suffix of a user's file whose name a delivered file now has."""

_EXCHANGE: dict[str, tuple[str, Callable[[bytes, bytes], tuple[object, ...]]]] = {
    "linux": ("renameat2", lambda a, b: (-100, a, -100, b, 2)),  # AT_FDCWD, RENAME_EXCHANGE
    "darwin": ("renamex_np", lambda a, b: (a, b, 2)),  # RENAME_SWAP
}
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends without an error.

    At every moment `folder` is either the complete older folder or the complete new one. Files that the older folder's
    own manifest lists, and that were not changed, are removed. All other files stay in `folder`, where they were; a
    file whose name the new folder needs is renamed to NAME.kept. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.intaglio-"
    for left in [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]:
        _clear_left(left, folder)
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with FileLock(place / LOCK), _cleared(place, folder):
            (place / STAGED).mkdir()
            yield place / STAGED
            kept = _take_along(folder, place / STAGED)
            (place / STAGED).rename(place / WHOLE)
            _put_in_place(place, folder)
            _tell(folder, kept)
    finally:
        _remove_empty(place)


def _take_along(folder: Path, fresh: Path) -> list[tuple[Path, Path]]:
    """Link the user's files of `folder` into `fresh`. Returns the old and the new path of each.

    A file that cannot be linked, as on some file systems, is moved after the exchange.
    """
    if not folder.is_dir():
        return []
    own = intact_files(folder)
    ours = {parent for path in own for parent in path.parents}
    folders, others = entries_below(folder)
    for each in folders:
        if each not in ours:
            _parents(folder, each / "x", fresh)
    kept = []
    for path in others:
        if path not in own:
            to = _free(_parents(folder, path, fresh) / path.name)
            with suppress(OSError, NotImplementedError):
                os.link(path, to, follow_symlinks=False)
            kept.append((path.relative_to(folder), to.relative_to(fresh)))
    for each in (*reversed(folders), folder):
        if (made := fresh / each.relative_to(folder)).is_dir() and not made.is_symlink():
            shutil.copymode(each, made)
    return kept


def _put_in_place(place: Path, folder: Path) -> None:
    if not os.path.lexists(folder):
        (place / WHOLE).rename(folder)
    elif not _exchanged(place / WHOLE, folder):
        folder.rename(place / OLDER)
        try:
            (place / WHOLE).rename(folder)
        except OSError:
            (place / OLDER).rename(folder)
            raise


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two folders in one moment. Returns False if the system cannot do that. Raises OSError."""
    if sys.platform not in _EXCHANGE:
        return False
    name, arguments = _EXCHANGE[sys.platform]
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    if call(*arguments(os.fsencode(a), os.fsencode(b))) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _clear_left(place: Path, folder: Path) -> None:
    """Clear away the files of a killed run, unless its process is alive."""
    if place.is_symlink() or not place.is_dir():
        return
    try:
        if (place / LOCK).is_file():
            with FileLock(place / LOCK, timeout=0):
                _clear(place, folder)
    except Timeout:
        return
    except OSError as error:
        log.warning("%s: cannot be cleared away: %s", printable(place), error.strerror or error)
        return
    _remove_empty(place)


@contextmanager
def _cleared(place: Path, folder: Path) -> Iterator[None]:
    """Remove duplicates after the block, and move the user's files into `folder`."""
    try:
        yield
    finally:
        _clear(place, folder)


def _clear(place: Path, folder: Path) -> None:
    try:
        remove_tree(place / STAGED)
        if (place / OLDER).is_dir() and not os.path.lexists(folder):
            (place / OLDER).rename(folder)
        for tree in (place / WHOLE, place / OLDER):
            if tree.is_dir():
                _empty(tree, folder)
    except OSError as error:
        log.warning(
            "%s: cannot be cleared away (%s): move your own files out of it by hand",
            printable(place),
            error.strerror or error,
        )


def _empty(tree: Path, folder: Path) -> None:
    own = intact_files(tree)
    there = {_identity(path) for path in entries_below(folder)[1]} if folder.is_dir() else set()
    folders, others = entries_below(tree)
    for each in folders:
        each.chmod(each.stat().st_mode | stat.S_IRWXU)  # files cannot leave a read-only folder
    for path in sorted(others, key=lambda path: path == tree / MANIFEST):  # last: it lists the delivered files
        if path in own or _identity(path) in there:
            path.unlink()
        else:
            path.rename(_free(_parents(tree, path, folder) / path.name))
    for each in (*reversed(folders), tree):
        each.rmdir()


def _remove_empty(place: Path) -> None:
    """Remove the place of work, unless there is something in it that could not be cleared away."""
    with suppress(OSError):
        if [path.name for path in place.iterdir()] in ([], [LOCK]):
            (place / LOCK).unlink(missing_ok=True)
            place.rmdir()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _parents(root: Path, path: Path, other: Path) -> Path:
    """Make in `other` the folders that `path` is in below `root`. Return the last."""
    made = other
    made.mkdir(exist_ok=True)
    for name in path.relative_to(root).parts[:-1]:
        made = made / name
        while os.path.lexists(made) and (made.is_symlink() or not made.is_dir()):
            made = made.with_name(made.name + KEPT)
        made.mkdir(exist_ok=True)
    return made


def _free(path: Path) -> Path:
    while os.path.lexists(path):
        path = path.with_name(path.name + KEPT)
    return path


def _tell(folder: Path, kept: Sequence[tuple[Path, Path]]) -> None:
    """Log the files in the folder that were not delivered."""
    for name, what in (
        ("keeps files that no run wrote", [f"{a}" for a, b in kept if a == b]),
        ("keeps files that were changed since a run wrote them", [f"{a} as {b}" for a, b in kept if a != b]),
    ):
        if what:
            more = f" and {len(what) - LISTED} more" if len(what) > LISTED else ""
            log.info("%s: %s: %s%s", printable(folder), name, printable(", ".join(what[:LISTED])), more)
