"""Write the files that a command was told to write with --out: the whole file, or the old one stays as it was.

A link, a folder, a pipe or a device in the file's place is refused, and never replaced or written through.
"""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable

DELIVERED = ("graph.json", "manifest.json")
"""Files that every compiled folder has."""


def check_outside(path: Path) -> None:
    """Raise RecipeError if `path` lies in a compiled folder, or is one. Links are followed."""
    try:
        place = path.resolve()
        around = (place, *place.parents)
        inside = next((each for each in around if all((each / name).is_file() for name in DELIVERED)), None)
    except (OSError, RuntimeError, ValueError):  # no possible name, or links in a circle: the writer reports it
        return
    if inside is not None:
        raise RecipeError(
            f"{printable(path)}: lies in the compiled folder {printable(inside)}, which holds only what a run delivers:"
            " choose another --out"
        )


def check_output(path: Path) -> None:
    """Raise RecipeError if `path` is a link, a folder, a pipe, a device, or in a compiled folder.

    Raises OSError if its folder does not exist.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{printable(path)}: cannot be written: {getattr(error, 'strerror', error)}") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise RecipeError(f"{printable(path)}: is {kind_of(mode)}, and is not overwritten: choose another --out")
    if mode is None and not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    check_outside(path)


def kind_of(mode: int) -> str:
    """Return the kind of a file, in words, from its mode.

    >>> kind_of(0o010644)
    'a named pipe'
    """
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a socket" if stat.S_ISSOCK(mode) else "a device")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name, whose file takes the place of `path` when the block ends without an error.

    A killed process leaves the old file, and at worst a hidden folder beside it. Raises what `check_output` does, and
    OSError that names `path` if the disk cannot be written.
    """
    check_output(path)
    prefix = f".{path.name[:100]}."
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
            partial = Path(folder) / path.name
            yield partial
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
    except OSError as error:
        if error.errno is None or prefix not in str(error.filename or prefix):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_output(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `whole_file` does."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
