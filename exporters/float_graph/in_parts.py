"""Run a graph that leaves its weights out: one part after the other, each with its own weights in memory.

The weights of a part are read before it is run and released after it, in every call. So neither the disk nor the memory
holds more than one part's weights, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import onnx

from intaglio.exporters.float_graph.onnx_file import MOST_BYTES, all_nodes
from intaglio.pipeline.files import read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

    Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]

PART_BYTES = 1 << 26
"""Size in bytes of the weights from which on a part ends."""


class Named(Protocol):
    """An input of a graph."""

    @property
    def name(self) -> str:
        """Name of the input."""


class Session(Protocol):
    """An opened graph, as ONNX Runtime's own sessions are."""

    def get_inputs(self) -> Sequence[Named]:
        """Return the inputs that a call gives."""

    def run(self, names: None, feed: Arrays) -> list[NDArray[np.float32]]:
        """Return all outputs, in their order, for the inputs by name."""


@dataclass
class _Piece:
    """Consecutive nodes: the values they read from before, the weights they read, and what later nodes read."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """A piece as a session, and the values that no later part reads."""

    session: onnxruntime.InferenceSession
    piece: _Piece
    done: tuple[str, ...]


class PartsSession:
    """A graph whose weights are inputs that a call does not give; they are read from `weights` for each part."""

    def __init__(self, path: Path, weights: Arrays, opened: Callable[[Path], onnxruntime.InferenceSession]) -> None:
        """Open the parts. Each is a small file for a moment, beside the graph. Raises what `opened` raises."""
        model = onnx.ModelProto.FromString(read_bytes(path, most=MOST_BYTES))
        self._weights = weights
        self._inputs = [value for value in model.graph.input if value.name not in weights]
        self._outputs = [value.name for value in model.graph.output]
        pieces = list(_pieces(model.graph, weights.keys()))
        last = {name: place for place, piece in enumerate(pieces) for name in (*piece.reads, *piece.outputs)}
        self._parts = []
        beside = path.with_name(f"part-of-{path.name}")
        for place, piece in enumerate(pieces):
            done = [name for name in (*piece.reads, *piece.outputs) if last[name] == place]
            try:
                onnx.save(_model(model, piece), beside)
                session = opened(beside)
            finally:
                beside.unlink(missing_ok=True)
            self._parts.append(_Part(session, piece, tuple(n for n in done if n not in self._outputs)))

    def get_inputs(self) -> Sequence[Named]:
        """Return the inputs of the graph without its weights."""
        return self._inputs

    def run(self, names: None, feed: Arrays) -> list[NDArray[np.float32]]:
        """Return all outputs of the graph for a call."""
        values: dict[str, Any] = dict(feed)
        for part in self._parts:
            piece = part.piece
            given = {name: values[name] for name in piece.reads}
            given |= {name: self._weights[name] for name in piece.weights}
            values |= zip(piece.outputs, part.session.run(piece.outputs, given), strict=True)
            for name in part.done:
                del values[name]
        return [values[name] for name in self._outputs]


def _pieces(graph: onnx.GraphProto, weights: Collection[str]) -> Iterator[_Piece]:
    """Cut the nodes where the weights of a piece are large enough, and the type of every value across is known."""
    typed = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    sizes = {name: 4 * prod(d.dim_value for d in typed[name].shape.dim) for name in weights}
    uses = [_reads(node) for node in graph.node]
    last_use = {name: place for place, names in enumerate(uses) for name in names}
    last_use |= {value.name: len(uses) for value in graph.output}
    before = {value.name for value in graph.input} - set(weights)
    piece, made, size = _Piece(), dict[str, None](), 0
    for place, (node, names) in enumerate(zip(graph.node, uses, strict=True)):
        piece.nodes.append(node)
        for name in names:
            if name in weights and name not in piece.weights:
                piece.weights.append(name)
                size += sizes[name]
            elif name in before and name not in piece.reads:
                piece.reads.append(name)
        made |= dict.fromkeys(name for name in node.output if name)
        ends = place + 1 == len(uses)
        if not ends and size < PART_BYTES:
            continue
        across = [name for name in made if last_use.get(name, -1) > place]
        if ends or all(name in typed and typed[name].elem_type for name in across):
            piece.outputs = across
            if across:  # else nothing reads what the nodes make
                yield piece
            before |= made.keys()
            piece, made, size = _Piece(), {}, 0


def _reads(node: onnx.NodeProto) -> dict[str, None]:
    """Return the names that a node reads, and those that graphs inside it read."""
    return dict.fromkeys(name for each in all_nodes([node]) for name in each.input if name)


def _model(whole: onnx.ModelProto, piece: _Piece) -> onnx.ModelProto:
    """Return a piece as a model whose inputs are the values that it reads, of any size, and its weights."""
    graph, part = whole.graph, onnx.ModelProto(ir_version=whole.ir_version)
    part.opset_import.extend(whole.opset_import)
    part.functions.extend(whole.functions)
    part.graph.name = graph.name
    part.graph.node.extend(piece.nodes)
    read = {name for node in piece.nodes for name in _reads(node)}
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    made = {name for node in piece.nodes for name in node.output}
    part.graph.input.extend(known[name] for name in (*piece.reads, *piece.weights))
    for value in part.graph.input[: len(piece.reads)]:  # the runtime refuses a call of another size than it is told
        for axis in value.type.tensor_type.shape.dim:
            axis.Clear()
    part.graph.output.extend(known[name] for name in piece.outputs)
    part.graph.value_info.extend(value for value in graph.value_info if value.name in made - set(piece.outputs))
    return part
