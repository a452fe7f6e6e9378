"""Opens files that somebody else may have written.

Every file that does not come from the running process is opened here: only regular files, only up to a stated size, and
text only in UTF-8. A library that opens a file by its path gets the path from `checked_file`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intaglio.pipeline.errors import IntaglioError, RecipeError

MIB = 1 << 20
MOST_JSON = 16 * MIB
"""Bytes of a JSON file that are read. Python needs up to 30 times as much memory for what they say."""
MOST_HEADER = 16 * MIB
"""Bytes of a safetensors file's header: room for the names of 100,000 tensors."""
LONGEST_LINE = 1000
"""Characters of another library's message that are passed on."""
MOST_NUMBER_DIGITS = 4300
"""Python's own limit for the digits of a whole number."""


def checked_file(
    path: Path, *, most: int | None = None, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> Path:
    """Return `path` after checking that it is a regular file of at most `most` bytes, for a library that opens paths.

    `inside`: a folder that the file must lie in when all links are followed. Raises `error`.
    """
    os.close(_opened(path, most, inside, error)[0])
    return path


def read_bytes(path: Path, *, most: int, inside: Path | None = None, error: type[IntaglioError] = RecipeError) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises `error` as `checked_file` does."""
    descriptor, size = _opened(path, most, inside, error)
    try:
        with os.fdopen(descriptor, "rb") as stream:
            content = stream.read(most + 1)
    except OSError as e:
        raise error(f"{printable(path)}: cannot be read: {e.strerror}") from e
    if len(content) > most:  # it grew, or a file system does not know its size
        raise error(f"{printable(path)}: more than {most} bytes, the most that is read ({size} when it was opened)")
    return content


def read_text(path: Path, *, most: int, inside: Path | None = None, error: type[IntaglioError] = RecipeError) -> str:
    """Return the text of a regular file in UTF-8 of at most `most` bytes. Raises `error`."""
    content = read_bytes(path, most=most, inside=inside, error=error)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{printable(path)}: is not text in UTF-8: {e.reason} at byte {e.start}") from e


def read_json(
    path: Path, *, most: int = MOST_JSON, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> object:
    """Return what a JSON file says. Raises `error` as `parse_json` does."""
    return parse_json(read_text(path, most=most, inside=inside, error=error), source=printable(path), error=error)


def read_json_object(
    path: Path, *, most: int = MOST_JSON, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> dict[str, object]:
    """Return the object that a JSON file holds. Raises `error` where it holds anything else."""
    found = read_json(path, most=most, inside=inside, error=error)
    if not isinstance(found, dict):
        raise error(f"{printable(path)}: holds a {type(found).__name__} where a JSON object is expected")
    return found


def parse_json(text: str, *, source: str, error: type[IntaglioError] = RecipeError) -> object:
    """Return what a JSON text says; `source` names it in the message.

    Raises `error` where it is no JSON, is nested too deep, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise error(f"{source}: is not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except ValueError as e:
        raise error(f"{source}: a number with more than {MOST_NUMBER_DIGITS} digits") from e
    except RecursionError as e:
        raise error(f"{source}: lists and objects are nested too deep in each other") from e


@contextmanager
def open_safetensors(
    path: Path, *, framework: str = "np", inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> Iterator[Any]:
    """Open a safetensors file: what `safetensors.safe_open` gives, which reads a tensor when it is asked for.

    Raises `error` for another file, and for one whose header is larger than `MOST_HEADER`.
    """
    from safetensors import SafetensorError, safe_open

    name = printable(path)
    descriptor, _ = _opened(path, None, inside, error)
    try:
        length = int.from_bytes(os.read(descriptor, 8), "little")
    finally:
        os.close(descriptor)
    if length > MOST_HEADER:
        raise error(
            f"{name}: is not a safetensors file, or its header is too large: {length} bytes by its own count,"
            f" the most that is read is {MOST_HEADER}"
        )
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise error(f"{name}: is not a safetensors file: {one_line(e)}") from e


def printable(text: object) -> str:
    """Return the text with control characters, and bytes that are no UTF-8, written as escapes.

    >>> printable("a\\x1b[31m\\udce9")
    'a\\\\x1b[31m\\\\udce9'
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))


def one_line(text: object) -> str:
    """Return the text in one printable line of at most `LONGEST_LINE` characters.

    >>> one_line("size mismatch\\n  for\\ta.weight")
    'size mismatch for a.weight'
    """
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."


def _opened(path: Path, most: int | None, inside: Path | None, error: type[IntaglioError]) -> tuple[int, int]:
    """Return the descriptor of a regular file that is open for reading, and the file's size in bytes."""
    name = printable(path)
    try:
        if inside is not None and not path.resolve().is_relative_to(inside.resolve()):
            raise error(f"{name}: is a link out of {printable(inside)}: put the file itself there")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, RuntimeError, ValueError) as e:  # RuntimeError: links in a circle; ValueError: no possible name
        raise error(f"{name}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    found = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "is a folder, not a file" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
    elif most is not None and found.st_size > most:
        problem = f"has {found.st_size} bytes, the most that is read is {most}"
    if problem is not None:
        os.close(descriptor)
        raise error(f"{name}: {problem}")
    return descriptor, found.st_size
