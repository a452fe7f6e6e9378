"""Read an ONNX file that anyone may have written, in bounded memory, without reading files outside its folder.

A model without its weights is small. So weights are not loaded: they stay in their files. All else is checked against
limits before protobuf parses it, because protobuf needs up to 200 times the size of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MIB, checked_file, printable, read_bytes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Nodes: TypeAlias = "Sequence[onnx.NodeProto]"
INLINE_BYTES = 1024
"""Largest size in bytes of a tensor in a file that is read: shapes and scalars, which shape inference needs."""
MOST_BYTES = (1 << 31) - 1
"""Largest size in bytes of the file: protobuf has no larger messages."""
MOST_STRUCTURE = 64 * MIB
"""Largest size in bytes of everything but the raw data of tensors."""
MOST_NUMBERS = MIB
"""Largest size in bytes of an attribute's numbers, or of a tensor's listed numbers; each takes 40 in memory."""
MOST_NODES = 25_000
"""Largest number of nodes, with each call of a function counted as its nodes. Large models have 10 000."""
MOST_FIELDS = 40 * MOST_NODES
"""Largest number of protobuf fields. Graphs of torch's exporter have 15 for each node."""


def read_model(path: Path) -> ir.Model:
    """Read a model and leave its weights in their files. Raises RecipeError."""
    import onnx_ir as ir

    proto = read_proto(path)
    try:
        model = ir.from_proto(proto)
    except Exception as e:  # any kind, if the file decodes but its content is impossible
        raise RecipeError(f"{printable(path)}: is no ONNX model: {printable(e)[:300]}") from e
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def read_proto(path: Path) -> onnx.ModelProto:
    """Read a model; larger tensors stay in their files, even in the model's own file. Raises RecipeError."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    content = _Structure(path, read_bytes(path, most=MOST_BYTES)).content()
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception as e:  # protobuf's errors have no common class
        raise RecipeError(f"{printable(path)}: is no ONNX model, or only a part of one: {printable(e)}") from e
    if not proto.HasField("graph") or not proto.opset_import:
        raise RecipeError(
            f"{printable(path)}: is no ONNX model: it has no graph, or does not say which opset it is written in"
        )
    if (count := sum(len(nodes) for _, nodes in graphs(proto))) > MOST_NODES:
        raise RecipeError(f"{printable(path)}: has {count} nodes: at most {MOST_NODES} are read")
    problems = []
    for tensor in tensors(proto):
        if not uses_external_data(tensor):
            continue
        if problem := _external_problem(tensor, path):
            problems.append(problem)
        elif (nbytes(tensor) or 0) <= INLINE_BYTES:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise RecipeError(*problems[:20], *more)
    return proto


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of all graphs and functions, always in the same order."""
    for graph, nodes in graphs(proto):
        if graph is not None:
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        for node in nodes:
            for attribute in node.attribute:
                yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.data_type)


def graphs(proto: onnx.ModelProto) -> Iterator[tuple[onnx.GraphProto | None, Nodes]]:
    """Yield every graph with its nodes, also graphs inside nodes; for a function, None with its nodes."""
    yield from _within(proto.graph, proto.graph.node)
    for function in proto.functions:
        yield from _within(None, function.node)


def all_nodes(nodes: Nodes) -> Iterator[onnx.NodeProto]:
    """Yield these nodes, and those of the graphs inside them."""
    return (node for _, inner in _within(None, nodes) for node in inner)


def _within(graph: onnx.GraphProto | None, nodes: Nodes) -> Iterator[tuple[onnx.GraphProto | None, Nodes]]:
    pending = [(graph, nodes)]
    while pending:
        graph, nodes = pending.pop()
        yield graph, nodes
        inner = (g for node in nodes for a in node.attribute for g in (a.g, *a.graphs) if g.node or g.initializer)
        pending += [(each, each.node) for each in inner]


def nbytes(tensor: onnx.TensorProto) -> int | None:
    """Return the size of a tensor in bytes; None for a type without a size."""
    import onnx_ir as ir

    try:
        bits: int = prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):  # strings, and numbers that stand for no type
        return None
    return -(-bits // 8)


def _external_problem(tensor: onnx.TensorProto, path: Path) -> str | None:
    """Describe a problem with the place of an external tensor; None if there is none."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = place.get("location", ""), path.parent
    name, where, size = _short(tensor.name), _short(location), nbytes(tensor)
    if size is None:
        return (
            f"{name}: its data is in {where}, but a tensor of this type cannot have external data: store it in the"
            " model file"
        )
    try:
        offset = int(place.get("offset", 0))
        length = int(place.get("length", size))
    except ValueError:
        return f"{name}: its place in {where} is not a number of bytes"
    if any(axis < 0 for axis in tensor.dims):
        return f"{name}: has {min(tensor.dims)} elements along an axis"
    file = folder / location
    if location != path.name:  # the model itself has been read, and may be a link
        try:
            inside, there = file.resolve().is_relative_to(folder.resolve()), file.exists()
        except (OSError, RuntimeError, ValueError) as e:  # a name that no file can have, or links in a circle
            return f"{name}: its data is in '{printable(location[:40])}', which is no possible file name: {e.args[-1]}"
        if not inside:
            return f"{name}: its data is in {where}, outside the model's folder: move it there"
        if not there:
            return f"{name}: its data is in {where}, which is not there: copy it beside the model"
    try:
        end = checked_file(file).stat().st_size
    except RecipeError as e:
        return f"{name}: its data is in {where}: {e}"
    if offset < 0 or length != size or offset + length > end:
        said = f", not the {length} that the model names" if length != size else ""
        return f"{name}: {size} bytes at {offset}{said}, but {_short(file.name)} ends at {end}"
    return None


def _short(name: str) -> str:
    """Return at most 100 characters, all of them printable."""
    text = printable(name[:100])
    return text if len(name) <= 100 else f"{text[:97]}..."


_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": dict.fromkeys((5, 10), "tensor")
    | dict.fromkeys((6, 11), "graph")
    | dict.fromkeys((14, 15), "value")
    | dict.fromkeys((22, 23), "sparse"),
    "function": {7: "node", 11: "attribute", 12: "value"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
}
"""Fields of each message of onnx.proto3 that are messages with more than texts."""
_NUMBERS = {"attribute": (7, 8), "tensor": (1, 5, 7, 11)}
"""Lists of numbers that take more space in memory than in the file."""
_NAME = {"attribute": 1, "tensor": 8}
_RAW_DATA = 9
_DEEPEST = 100
"""Deepest nesting of messages that protobuf reads."""


class _Structure:
    """Scan of a model's messages that counts them and leaves out the raw data of larger tensors."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.file = path, content
        self.fields = self.numbers = 0

    def content(self) -> bytes:
        """Return the model with larger tensors as external data of its own file. Raises RecipeError for excess size."""
        found = self._message("model", 0, len(self.file), 0)
        left = self.file if found is None else found
        if len(left) > MOST_STRUCTURE:
            raise self._error(
                f"has {len(left)} bytes besides the raw data of its tensors: at most {MOST_STRUCTURE} are read:"
                " save it again with onnx.save, and without doc strings"
            )
        return left

    def _message(self, kind: str, start: int, end: int, depth: int) -> bytes | None:
        """Return the bytes that replace the message; None if it stays unchanged."""
        if depth > _DEEPEST:
            raise self._error(f"has messages that are nested more than {_DEEPEST} deep")
        pieces: list[bytes] = []
        begin = done = start
        name, listed, place = b"", 0, b""
        while begin < end:
            field, behind_key, first, at = self._field(begin, end)
            if field in _NUMBERS.get(kind, ()):
                listed += at - begin  # one number for each field, or all numbers in one field
                self._count_numbers(kind, name, listed, at - begin)
            elif field == _NAME.get(kind):
                name = self.file[first : min(at, first + 100)]
            elif kind == "tensor" and field == _RAW_DATA and at - first > INLINE_BYTES:
                pieces.append(self.file[done:begin])
                done, place = at, _external(self.path.name, first, at - first)
            elif inner := _MESSAGES.get(kind, {}).get(field):
                changed = self._inner(inner, first, at, depth)
                if changed is not None:
                    pieces += [self.file[done:behind_key], _varint(len(changed)), changed]
                    done = at
            begin = at
        # protobuf reads the last value of a field, so this place overrides one that the tensor has already
        return b"".join([*pieces, self.file[done:end], place]) if pieces else None

    def _inner(self, kind: str, first: int, at: int, depth: int) -> bytes | None:
        if kind != "value":
            return self._message(kind, first, at, depth + 1)
        self._count((at - first) // 8)  # its bytes are a name and some axes
        return None

    def _field(self, begin: int, end: int) -> tuple[int, int, int, int]:
        """Return a field's number, the end of its key, and the ends of its content. Raises RecipeError if broken."""
        key, behind_key = self._number(begin)
        first = behind_key
        match key & 7:
            case 0:
                at = self._number(first)[1]
            case 1:
                at = first + 8
            case 2:
                size, first = self._number(first)
                at = first + size
            case 5:
                at = first + 4
            case _:
                at = end + 1
        if at > end:
            raise self._error("is no ONNX model, or only a part of one")
        self._count(1)
        return key >> 3, behind_key, first, at

    def _number(self, at: int) -> tuple[int, int]:
        """Return a varint and its end; a position far after the file if it does not end."""
        file, value = self.file, 0
        for place in range(min(10, len(file) - at)):
            byte = file[at + place]
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                return value, at + place + 1
        return 0, MOST_BYTES + 1

    def _count(self, fields: int) -> None:
        self.fields += fields
        if self.fields > MOST_FIELDS:
            raise self._error(
                f"has more names, numbers and nodes than the {MOST_FIELDS} that are read: split it, or simplify it"
            )

    def _count_numbers(self, kind: str, name: bytes, listed: int, size: int) -> None:
        self.numbers += size
        if max(listed, self.numbers // 8) > MOST_NUMBERS:
            raise self._error(
                f"its {kind} {_short(name.decode(errors='backslashreplace'))} lists more than {MOST_NUMBERS} bytes of"
                f" numbers one by one, or all together more than {8 * MOST_NUMBERS}: store them as raw data"
            )

    def _error(self, problem: str) -> RecipeError:
        return RecipeError(f"{printable(self.path)}: {problem}")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _external(file: str, offset: int, length: int) -> bytes:
    """Return the fields of a tensor that say where its data is."""
    import onnx

    tensor = onnx.TensorProto()
    place_outside(tensor, file, offset, length)
    fields: bytes = tensor.SerializeToString()
    return fields


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Return True if a tensor's data is in a file of its own."""
    return tensor.data_location == tensor.EXTERNAL


def place_outside(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    """Say that a tensor's data is in this file: `length` bytes from `offset` on."""
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": file, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
