"""Reads an ONNX file that anyone may have written, without following it out of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    import onnx

INLINE_BYTES = 1024
"""Tensors in files beside the model are read up to this size: shapes and scalars, which shape inference needs."""


def read_proto(path: Path) -> onnx.ModelProto:
    """The model; of tensors in other files, those that are small. Raises RecipeError."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as e:
        raise RecipeError(f"{path}: cannot be read: {e.strerror}") from e
    except Exception as e:  # protobuf's errors have no common class
        raise RecipeError(f"{path}: is no ONNX model, or only a part of one: {e}") from e
    if not proto.HasField("graph") or not proto.opset_import:
        raise RecipeError(f"{path}: is no ONNX model: it has no graph, or does not say which opset it is written in")
    problems = []
    for tensor in _tensors(proto):
        if not uses_external_data(tensor):
            continue
        if problem := _external_problem(tensor, path.parent):
            problems.append(problem)
        elif _nbytes(tensor) <= INLINE_BYTES:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    if problems:
        raise RecipeError(*problems)
    return proto


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Of all graphs and functions."""
    graphs, functions = [proto.graph], [function.node for function in proto.functions]
    while graphs or functions:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            functions.append(graph.node)
        for node in functions.pop():
            for attribute in node.attribute:
                graphs += [g for g in (attribute.g, *attribute.graphs) if g.node or g.initializer]
                yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.data_type)


def _nbytes(tensor: onnx.TensorProto) -> int:
    import onnx_ir as ir

    size = 1
    for axis in tensor.dims:
        size *= axis
    return -(-size * ir.DataType(tensor.data_type).bitwidth // 8)


def _external_problem(tensor: onnx.TensorProto, folder: Path) -> str | None:
    """What is wrong with the place where the tensor is kept."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / place.get("location", "")
    try:
        offset = int(place.get("offset", 0))
        length = int(place.get("length", _nbytes(tensor)))
    except ValueError:
        return f"{tensor.name}: its place in {place.get('location')} is not a number of bytes"
    try:
        inside, there = file.resolve().is_relative_to(folder.resolve()), file.is_file()
    except (OSError, ValueError) as e:  # a name that no file can have
        return f"{tensor.name}: its data is in {place['location'][:40]!r}, which no file can be named: {e.args[-1]}"
    if not inside:
        return f"{tensor.name}: its data is in {place.get('location')}, outside the model's folder: move it there"
    if not there:
        return f"{tensor.name}: its data is in {place.get('location')}, which is not there: copy it beside the model"
    if offset < 0 or length < _nbytes(tensor) or offset + length > file.stat().st_size:
        return f"{tensor.name}: {_nbytes(tensor)} bytes at {offset}, but {file.name} ends at {file.stat().st_size}"
    return None
