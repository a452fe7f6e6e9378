"""Read GGUF files from untrusted sources, in bounded time and memory: names, types, shapes and bytes of tensors.

The layout is that of ggml's documentation (docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, MIB, open_stream, printable

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER = 16 * MIB
"""Largest size in bytes of everything before the tensors."""
MOST_TENSORS = 100_000
MOST_NAME = 1024
MOST_AXES = 4
MOST_ALIGNMENT = 1 << 20
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value in the metadata, by its type."""
UINT32, STRING, ARRAY = 4, 8, 9
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34)}
"""Values in one block, and its bytes, for the types that are read."""
TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 30: "BF16"},
    **{39: "MXFP4", 40: "NVFP4"},
}
"""Names of the types of tensors; messages show other types as numbers."""


@dataclass(frozen=True)
class GgufTensor:
    """Tensor of a GGUF file: its type, its shape as torch has it, and its bytes (rows, bytes of a row) in uint8.

    Bytes are None for a type that is not in `BLOCKS`.
    """

    kind: str
    shape: tuple[int, ...]
    content: torch.Tensor | None


@dataclass(frozen=True)
class _Place:
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Size in bytes; 0 for a type that is not read."""
        values, held = BLOCKS.get(self.kind, (1, 0))
        return math.prod(self.shape) // values * held


def check_gguf(path: Path) -> Path:
    """Check a GGUF file without reading its tensors, and return its path. Raises RecipeError for all other files."""
    with open_stream(path) as stream, _refused(path):
        _places(stream)
    return path


def read_gguf_file(path: Path) -> dict[str, GgufTensor]:
    """Return the tensors of a GGUF file by name. Raises RecipeError for damaged files, and for all other files."""
    with open_stream(path) as stream, _refused(path):
        places, start = _places(stream)
        return {name: _tensor(stream, start, place) for name, place in places.items()}


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, EOFError, struct.error) as error:
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)[:200]
        raise RecipeError(f"{printable(path)}: cannot be read as GGUF: {reason}") from error


def _tensor(stream: BufferedReader, start: int, place: _Place) -> GgufTensor:
    import torch

    if place.kind not in BLOCKS:
        return GgufTensor(place.kind, place.shape, None)
    content = bytearray(place.size)
    stream.seek(start + place.offset)
    if stream.readinto(content) != place.size:
        raise EOFError("it ends within a tensor")
    rows = math.prod(place.shape[:-1])
    return GgufTensor(place.kind, place.shape, torch.frombuffer(content, dtype=torch.uint8).reshape(rows, -1))


def _places(stream: BufferedReader) -> tuple[dict[str, _Place], int]:
    """Return the place of every tensor after the header, and where the header ends. Raises ValueError, EOFError."""
    size = stream.seek(0, 2)
    stream.seek(0)
    if stream.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    header = _Header(stream, size)
    version, count, pairs = header.number("I"), header.number("Q"), header.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}: {' and '.join(map(str, VERSIONS))} are read, little-endian")
    if count > MOST_TENSORS or pairs > MOST_TENSORS:
        raise ValueError(f"it lists {count} tensors and {pairs} metadata values, but at most {MOST_TENSORS} are read")
    alignment = _alignment(header, pairs)
    places: dict[str, _Place] = {}
    for _ in range(count):
        name = header.text()
        if name in places:
            raise ValueError(f"it lists the tensor {printable(name)[:120]} twice")
        places[name] = header.place(name)
    start = -(-stream.tell() // alignment) * alignment
    _check_offsets(places, alignment, size - start)
    return places, start


def _check_offsets(places: Mapping[str, _Place], alignment: int, size: int) -> None:
    """Raise ValueError unless the tensors lie behind one another in `size` bytes, each at a multiple of `alignment`."""
    end = 0
    for name, place in sorted(places.items(), key=lambda each: each[1].offset):
        if place.offset % alignment or place.offset < end:
            raise ValueError(
                f"{printable(name)[:120]} is at byte {place.offset}, which is within another tensor or no multiple of"
                f" {alignment}"
            )
        end = place.offset + place.size
    if end > size:
        raise ValueError(f"its tensors need more bytes than the {max(size, 0)} that follow the header")


def _alignment(header: _Header, pairs: int) -> int:
    """Skip the metadata, and return the alignment in bytes that it gives for the tensors."""
    alignment, keys = 32, set[str]()
    for _ in range(pairs):
        key, kind = header.text(), header.number("I")
        if key in keys:
            raise ValueError(f"its metadata has {printable(key)[:120]} twice")
        keys.add(key)
        value = header.value(kind)
        if key == "general.alignment":
            if kind != UINT32:
                raise ValueError(f"general.alignment has the type {kind}: {UINT32}, a UINT32, is expected")
            alignment = value
        if key.startswith("comfy.gguf.orig_shape."):
            raise ValueError(f"{key}: tensors that are stored in another shape are not read")
    if not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}: a power of two up to {MOST_ALIGNMENT} is expected")
    return alignment


class _Header:
    """Reads what is before the tensors, piece by piece, up to `MOST_HEADER` bytes."""

    def __init__(self, stream: BufferedReader, size: int) -> None:
        self.stream, self.size = stream, size

    def number(self, kind: str) -> int:
        """Return the next number, in this format of `struct`."""
        (found,) = struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))
        return int(found)

    def text(self) -> str:
        """Return the next name, of at most `MOST_NAME` bytes."""
        length = self.number("Q")
        if length > MOST_NAME:
            raise ValueError(f"a name of {length} bytes: at most {MOST_NAME} are read")
        return self._bytes(length).decode("utf-8")

    def value(self, kind: int, *, inside: bool = False) -> int:
        """Skip a value of the metadata; return it if it is a 32-bit number, else 0."""
        if kind == UINT32:
            return self.number("I")
        if kind == STRING:
            self._bytes(self.number("Q"))
        elif kind == ARRAY and not inside:
            of, count = self.number("I"), self.number("Q")
            if of in SCALARS:
                self._bytes(SCALARS[of] * count)
            else:
                for _ in range(count):
                    self.value(of, inside=True)
        elif kind in SCALARS:
            self._bytes(SCALARS[kind])
        else:
            raise ValueError(f"a value of the type {kind}{' in a list' * inside} is not read")
        return 0

    def place(self, name: str) -> _Place:
        """Return the type, the shape and the offset of a tensor."""
        axes = self.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{printable(name)[:120]} has {axes} axes: 1 to {MOST_AXES} are read")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        number, offset = self.number("I"), self.number("Q")
        found = _Place(TYPES.get(number, f"type {number}"), shape, offset)
        values, _ = BLOCKS.get(found.kind, (1, 0))
        if 0 in shape or shape[-1] % values:
            raise ValueError(f"{printable(name)[:120]} has the shape {shape}: rows have to be whole blocks of {values}")
        if math.prod(shape) > 8 * self.size or offset + found.size > self.size:
            raise ValueError(f"{printable(name)[:120]} has the shape {shape}, which is larger than the file")
        return found

    def _bytes(self, count: int) -> bytes:
        if count > MOST_HEADER or self.stream.tell() + count > MOST_HEADER:
            raise ValueError(f"more than {MOST_HEADER} bytes before the tensors")
        found = self.stream.read(count)
        if len(found) < count:
            raise EOFError("it ends before its tensors")
        return found
