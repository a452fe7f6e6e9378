"""Ask the installed parser of TensorRT-RTX about a graph."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.exporters.float_graph.onnx_file import graphs, is_outside, place_outside

if TYPE_CHECKING:
    import onnx

MODULE = "tensorrt_rtx"


def can_parse() -> bool:
    """Return True if the parser of TensorRT-RTX is installed here."""
    return find_spec(MODULE) is not None


def parse(model: onnx.ModelProto, ones: Path) -> str | None:
    """Return why TensorRT-RTX does not parse a graph; None if it does. Nothing is built.

    The data of external tensors is beside `ones`, a file that is written here: the parser refuses scales of zero, so
    that the scales among them get the value one.
    """
    import tensorrt_rtx as trt

    with open(ones, "wb") as file:
        for tensor in _scales(model):
            place = file.tell()
            file.write(_ones(tensor))
            place_outside(tensor, ones.name, place, file.tell() - place)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString(), str(ones.with_name("model.onnx"))):
        return None
    said = [parser.get_error(place) for place in range(parser.num_errors)]
    return "; ".join(f"{error.node_name()}: {error.desc()}" for error in said[:3]) or "it gives no reason"


def _scales(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the scales of QuantizeLinear and DequantizeLinear that are external tensors."""
    found = list(graphs(model))
    names = {
        node.input[1]
        for _, nodes in found
        for node in nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1
    }
    held = [tensor for graph, _ in found if graph is not None for tensor in graph.initializer if tensor.name in names]
    held += [
        attribute.t
        for _, nodes in found
        for node in nodes
        if node.op_type == "Constant" and node.output[0] in names
        for attribute in node.attribute
    ]
    yield from filter(is_outside, held)


def _ones(tensor: onnx.TensorProto) -> bytes:
    """Return the data of a tensor of this type and shape whose elements are all one."""
    from math import prod

    import numpy as np
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.ones(prod(tensor.dims), kind).tobytes()
