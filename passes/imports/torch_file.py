"""Read files of `torch.save` that anyone may have written: tensors and plain values, in bounded time and memory."""

from __future__ import annotations

import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MIB, open_stream, printable

MOST_DIRECTORY = 8 * MIB
"""Largest size in bytes of a zip file's list of entries: some 80,000 tensors."""
MOST_PICKLE = 64 * MIB
MOST_OPERATIONS = 300_000
"""Largest number of pickle operations in a small file: torch takes about one microsecond for each."""
BYTES_PER_OPERATION = 100
"""Bytes of a larger file for each further operation; large models have one operation in some 10,000 bytes."""
MOST_DEPTH = 500
"""Deepest nesting of values: Python hashes a deep tuple without checking its stack."""
GLOBALS = re.compile(
    r"collections OrderedDict|(__builtin__|builtins) (slice|set)|torch\._utils _rebuild_(tensor_v[23]|parameter)"
    r"|torch\.storage UntypedStorage|torch (Size|device|\w+Storage|(float|bfloat|u?int|bool|complex)\w*)"
    r"|modelopt\.torch\.quantization\.qtensor\.\w+_tensor \w+QTensor"
)
"""Names that a file may use: they take no more memory than the file holds. Those of Model Optimizer are replaced."""
END, END64 = struct.Struct("<4s8xLL2x"), struct.Struct("<4s36xQQ")
LOCATOR = 20
PACKED = ("fp8", "nvfp4", "int8", "int4", "mxfp4", "mxfp8", "nf4")
"""Formats in which Model Optimizer packs weights. A file of packed weights names the class of each weight."""


class PackedKind:
    """Stands for the class of Model Optimizer that a file of packed weights names: nothing of it is needed."""


def load_torch_file(path: Path) -> object:
    """Return what `torch.save` wrote; tensors stay in the file until they are read. Nothing from the file is run.

    Raises RecipeError for all other files, for damaged ones, and for those that would take much more time or memory
    than their size.
    """
    import torch

    check_torch_file(path)
    names = [
        (PackedKind, f"modelopt.torch.quantization.qtensor.{kind}_tensor.{kind.upper()}QTensor") for kind in PACKED
    ]
    with _refused(path), torch.serialization.safe_globals([slice, *names]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings are for callers of torch
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_end(path: Path) -> Path:
    """Return the path of a file that ends as `torch.save` ends one; only the end is read. Raises RecipeError."""
    with open_stream(path) as stream, _refused(path):
        _check_end(stream)
    return path


def check_torch_file(path: Path) -> None:
    """Raise RecipeError unless the file is as `torch.save` wrote it. Reads the whole file once."""
    with open_stream(path) as stream, _refused(path):
        size = _check_end(stream)
        with zipfile.ZipFile(stream) as archive:
            _check_pickle(_checked_pickle(archive, size), size)
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its entry {printable(damaged)[:80]} is damaged: other bytes than were written")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Raise RecipeError for every exception: zipfile, pickletools and torch raise any kind for damaged files."""
    try:
        yield
    except Exception as error:
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)[:300]
        raise RecipeError(f"{printable(path)}: cannot be read as tensors and plain values alone: {reason}") from error


def _check_end(stream: BinaryIO) -> int:
    """Return the file's size. Raises ValueError if it does not end as a zip file does, or its directory is large."""
    size = stream.seek(0, 2)
    stream.seek(-min(size, END.size + LOCATOR + END64.size), 2)
    tail = stream.read()
    if len(tail) < END.size or not tail[-END.size :].startswith(b"PK\5\6"):
        raise ValueError("it is no zip file of torch.save, or its end is missing")
    _, bytes_, _ = END.unpack(tail[-END.size :])
    if tail[-END.size - LOCATOR :].startswith(b"PK\6\7"):
        _, bytes_, _ = END64.unpack(tail[: END64.size])
    if bytes_ > MOST_DIRECTORY:
        raise ValueError(f"its list of entries has {bytes_} bytes: at most {MOST_DIRECTORY} are read")
    return size


def _checked_pickle(archive: zipfile.ZipFile, size: int) -> bytes:
    """Return the pickle of values.

    Raises ValueError for entries that are compressed, that have the same name, or that are larger than the file.
    """
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its entries have one name")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("its entries are compressed, which torch.save does not do")
    if (held := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"its entries have {held} bytes, but the whole file has {size}")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1 or len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise ValueError("it is no zip file of torch.save: it holds no data.pkl, or several")
    if pickles[0].file_size > MOST_PICKLE:
        raise ValueError(f"its data.pkl has {pickles[0].file_size} bytes: at most {MOST_PICKLE} are read")
    return archive.read(pickles[0])


def _check_pickle(pickle: bytes, size: int) -> None:
    """Raise ValueError for a pickle with many operations, with other names than torch's, or with deeply nested values.

    Instead of the values, the check keeps the nesting depth of each value on the stack, as pickletools describes the
    operations.
    """
    most = MOST_OPERATIONS + size // BYTES_PER_OPERATION
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        name = operation.name
        if count > most:
            raise ValueError(f"its data.pkl has more than {most} operations, the most for a file of {size} bytes")
        if operation.proto > 2 or name in ("INST", "OBJ"):
            raise ValueError(f"its data.pkl has the operation {name}, which torch.save does not write")
        if name == "GLOBAL" and not GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it names {argument}, which is neither a tensor nor a plain value")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name not in ("PROTO", "STOP"):
            _apply(operation, stack, marks)


def _apply(operation: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> None:
    """Replace the depths of the values that an operation takes by the depth of the values that it makes."""
    before, made = operation.stack_before, len(operation.stack_after)
    first = len(stack) - len(before)
    if pickletools.markobject in before:
        first = marks.pop() - before.index(pickletools.markobject)
    if first < 0:
        raise ValueError("its data.pkl takes values that are not there")
    deepest = max(stack[first:], default=0)
    del stack[first:]
    if deepest > MOST_DEPTH:
        raise ValueError(f"its values are nested more than {MOST_DEPTH} deep in each other")
    stack.extend([deepest + bool(before)] * made)
