"""Open files that somebody else may have written, and write values of known types as JSON files.

Every file that the running process did not write is opened here: only regular files, only up to a stated size, and text
only in UTF-8. A library that opens a file by its path gets the path from `checked_file`.
"""

import copy
import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

from intaglio.pipeline.errors import IntaglioError, RecipeError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def _is_unset(value: object) -> bool:
    return value is None or value is False or value in ((), {})


OPTIONAL: Any = Field(exclude_if=_is_unset)
"""Annotation of a field that `write_typed` leaves out where it is None, False, or an empty tuple or mapping."""
MIB = 1 << 20
MOST_JSON = 16 * MIB
"""Largest size in bytes of a JSON file. Python needs up to 30 times as much memory for its values."""
MOST_ARTIFACT = 64 * MIB
"""Largest size in bytes of a JSON file of known types."""
MOST_VALUES = 2_000_000
"""Largest number of values of a JSON file, counted by its commas and opening brackets."""
LONGEST_LINE = 1000
"""Largest number of characters that are kept of another library's message."""
MOST_NUMBER_DIGITS = 4300
"""Largest number of digits of a whole number, as in Python itself."""
MOST_HEADER = 16 * MIB
"""Largest size in bytes of a safetensors header: names, types, places of its tensors, and metadata."""
LFS = b"version https://git-lfs"
"""First bytes of the file that Git leaves in the place of a large one, if Git LFS is not installed."""
LISTED_PLACES = 3
"""Largest number of places in a damaged file that a message lists."""
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of code that reads content of an unexpected kind."""


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
            content = stream.read(size + 1)  # Python allocates as many bytes as are requested
    except OSError as e:
        raise error(f"{printable(path)}: cannot be read: {e.strerror}") from e
    if len(content) > size:
        raise error(f"{printable(path)}: had {size} bytes when it was opened, and more when it was read")
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
    """Return the content of a JSON file. Raises `error` as `parse_json` does."""
    return parse_json(read_text(path, most=most, inside=inside, error=error), source=printable(path), error=error)


def read_json_object(
    path: Path, *, most: int = MOST_JSON, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> dict[str, object]:
    """Return the object that a JSON file holds. Raises `error` if it holds anything else."""
    found = read_json(path, most=most, inside=inside, error=error)
    if not isinstance(found, dict):
        raise error(f"{printable(path)}: holds a {type(found).__name__} where a JSON object is expected")
    return found


def read_typed(
    path: Path,
    kind: type[T],
    *,
    most: int = MOST_ARTIFACT,
    inside: Path | None = None,
    error: type[IntaglioError] = RecipeError,
    may_lack: Collection[str] | None = None,
) -> T:
    """Return a JSON file's content as a value of `kind`: a dataclass, a TypedDict, a model of pydantic or a generic.

    Types are exact: a text is no number. The file may lack every field that has a default, or only those fields of
    dataclasses that `may_lack` names. Raises `error` with the first places of another type.
    """
    text = read_text(path, most=most, inside=inside, error=error)
    _check_count(text, printable(path), error)
    try:
        names = None if may_lack is None else frozenset(may_lack)
        validator = _validator(kind, names)  # type: ignore[arg-type]  # every type is hashable
        found: T = validator.validate_json(text, strict=True)
    except ValidationError as e:
        raise error(f"{printable(path)}: is damaged: {damaged_places(e)}") from e
    return found


def write_typed(path: Path, content: T, kind: type[T], *, indent: int | None = 1, sort_keys: bool = False) -> None:
    """Write `content` as the JSON file that `read_typed` reads as a value of `kind`, its fields in their order.

    `kind` may be a base class of the value's own dataclass: the file has the fields of `kind` alone.
    """
    path.write_text(typed_json(content, kind, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")


def typed_json(content: T, kind: type[T], *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """Return the JSON text of a value of `kind`, in ASCII: floats as Python writes them, among them NaN and Infinity.

    >>> typed_json({"a": (1, 0.5)}, dict[str, tuple[int, float]], indent=None)
    '{"a": [1, 0.5]}'
    """
    return json.dumps(_adapter(kind).dump_python(content, by_alias=True), indent=indent, sort_keys=sort_keys)  # type: ignore[arg-type]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _validator(kind: Any, may_lack: frozenset[str] | None) -> SchemaValidator:
    """Return the validator of values of `kind`, which stops at the first wrong element of a list or mapping."""
    schema = copy.deepcopy(_adapter(kind).core_schema)
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            if part.get("type") in ("dict", "list", "tuple"):
                part["fail_fast"] = True
            if part.get("type") == "dataclass-field" and may_lack is not None and part["name"] not in may_lack:
                part["schema"] = part["schema"].get("schema", part["schema"])  # without its default
        elif isinstance(part, list | tuple):
            parts += part
    return SchemaValidator(schema)


def damaged_places(error: ValidationError) -> str:
    """Return the first places of a damaged file that have another type than expected, and how many more do."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    said = []
    for detail in found[:LISTED_PLACES]:
        place = "".join(f"{printable(part)[:80]}: " for part in detail["loc"])
        said.append(
            place
            + ("is missing" if detail["type"] == "missing" else printable(detail["msg"].removeprefix("Value error, ")))
        )
    more = f"; and {len(found) - LISTED_PLACES} more" if len(found) > LISTED_PLACES else ""
    return "; ".join(said) + more


@contextmanager
def damage_of(path: Path, *, error: type[IntaglioError] = RecipeError) -> Iterator[None]:
    """Raise `error`, which names the file, if the block cannot use the content of the file."""
    try:
        yield
    except DAMAGE as e:
        said = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) and e.args else str(e) or type(e).__name__
        raise error(f"{printable(path)}: is damaged: {printable(said)}") from e


@contextmanager
def open_safetensors(
    path: Path,
    *,
    framework: Literal["pt", "np"] = "pt",
    inside: Path | None = None,
    error: type[IntaglioError] = RecipeError,
) -> Iterator[Any]:
    """Open a safetensors file, which is a regular file with a header of at most `MOST_HEADER` bytes.

    Yields safetensors' own reader: `keys()`, `metadata()`, `get_slice(name)`, `get_tensor(name)`. Raises `error` for
    other files, and where the block reads a tensor that the reader cannot return.
    """
    from safetensors import SafetensorError, safe_open

    descriptor, _ = _opened(path, None, inside, error)
    with os.fdopen(descriptor, "rb") as stream:
        first = stream.read(len(LFS))
    if first == LFS:
        raise error(
            f"{printable(path)}: is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder"
        )
    if (header := int.from_bytes(first[:8], "little")) > MOST_HEADER:
        reason = f"its header would have {header} bytes: at most {MOST_HEADER} are read"
        raise error(f"{printable(path)}: is not a safetensors file: {reason}")
    try:
        with safe_open(path, framework=framework) as opened:
            yield opened
    except (SafetensorError, OSError, RuntimeError) as e:  # RuntimeError: torch cannot map a file of that size
        raise error(f"{printable(path)}: is not a safetensors file: {printable(e)}") from e


def load_tensors(
    path: Path, *, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> dict[str, "torch.Tensor"]:
    """Return all tensors of a safetensors file, by name. Raises `error` as `open_safetensors` does."""
    with open_safetensors(path, inside=inside, error=error) as opened, damage_of(path, error=error):
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def parse_json(text: str, *, source: str, error: type[IntaglioError] = RecipeError) -> object:
    """Return the content of a JSON text; `source` names it in the message.

    Raises `error` if it is no JSON, is nested too deep, or has a number of too many digits.
    """
    _check_count(text, source, error)
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise error(f"{source}: is not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except ValueError as e:
        raise error(f"{source}: a number with more than {MOST_NUMBER_DIGITS} digits") from e
    except RecursionError as e:
        raise error(f"{source}: lists and objects are nested too deep in each other") from e


def _check_count(text: str, source: str, error: type[IntaglioError]) -> None:
    """Raise `error` for more than MOST_VALUES values: each takes up to a hundred bytes of memory, even as a digit."""
    count = text.count(",") + text.count("[") + text.count("{")
    if count > MOST_VALUES:
        raise error(f"{source}: holds up to {count} values: at most {MOST_VALUES} are read")


def printable(text: object) -> str:
    r"""Return the text with control characters, and bytes that are no UTF-8, written as escapes.

    >>> printable("a\x1b[31m\udce9")
    'a\\x1b[31m\\udce9'
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))


@contextmanager
def open_stream(
    path: Path, *, inside: Path | None = None, error: type[IntaglioError] = RecipeError
) -> Iterator[BufferedReader]:
    """Open a regular file of any size for reading piece by piece. Raises `error` as `checked_file` does."""
    with os.fdopen(_opened(path, None, inside, error)[0], "rb") as stream:
        yield stream


def one_line(text: object) -> str:
    r"""Return the text in one printable line of at most `LONGEST_LINE` characters.

    >>> one_line("size mismatch\n  for\ta.weight")
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
        problem = f"has {found.st_size} bytes: at most {most} are read"
    if problem is not None:
        os.close(descriptor)
        raise error(f"{name}: {problem}")
    return descriptor, found.st_size
