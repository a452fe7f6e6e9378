"""Read the graph that the rules of `lint` check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.exporters.float_graph.onnx_file import MOST_NODES, all_nodes, graphs, read_proto, tensors
from intaglio.exporters.float_graph.products import Product, products
from intaglio.exporters.lint.inference import ask
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@dataclass(frozen=True)
class Checked:
    """Model with all types and shapes that can be inferred, and the complaints of inference."""

    model: ir.Model
    opset: int
    nodes: list[ir.Node]
    """Nodes of all graphs and functions."""
    products: list[Product]
    standard: bool
    """True if the model is valid ONNX, types and shapes aside."""
    complaint: str | None
    """Reason why the model is not valid, or why its types and shapes do not fit together."""

    proto: onnx.ModelProto
    """Model as it was read; its larger tensors stay in files."""

    @cached_property
    def functions(self) -> frozenset[tuple[str, str]]:
        """Domain and name of every function that the model defines itself."""
        return frozenset((domain, name) for domain, name, _ in self.model.functions)

    @classmethod
    def read(cls, path: Path) -> Checked:
        """Read a model. Raises RecipeError if it cannot be read, is no graph, or has data outside its folder."""
        import onnx_ir as ir

        proto = read_proto(path)
        inferred, standard = proto, False
        complaint = _expansion(proto) or ask("standard", proto).complaint
        if complaint is None:
            standard, complaint = True, _long_range(proto)
        if complaint is None:
            answer = ask("types", proto)
            inferred, complaint = answer.model or proto, answer.complaint
        try:
            model = ir.from_proto(inferred)
        except Exception as e:  # the file decodes, but its content is impossible
            raise RecipeError(f"{printable(path)}: is no ONNX model: {shortened(e)}") from e
        ir.external_data.set_base_dir(model.graph, path.parent)
        graphs = (model.graph, *(function.graph for function in model.functions.values()))
        nodes = [node for graph in graphs for node in graph.all_nodes()]
        opset = model.opset_imports.get("", 1)
        return cls(model, opset, nodes, list(products(nodes)) if standard else [], standard, complaint, proto)

    def of_type(self, *op_types: str) -> Iterator[ir.Node]:
        """Return the nodes of these operators, in all graphs and functions."""
        return (node for node in self.nodes if node.op_type in op_types)


def _expansion(proto: onnx.ModelProto) -> str | None:
    """Describe functions that call themselves or expand to too many nodes; None if there are none."""
    called: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for function in proto.functions:
        inner = all_nodes(function.node)
        called[function.domain, function.name] = Counter((node.domain, node.op_type) for node in inner)
    try:
        inner_calls = {name: calls.keys() & called.keys() for name, calls in called.items()}
        order = list(TopologicalSorter(inner_calls).static_order())
    except CycleError as e:
        return f"function {shortened('.'.join(e.args[1][0]))} calls itself"
    size: dict[tuple[str, str], int] = {}
    for name in order:
        size[name] = sum(count * size.get(each, 1) for each, count in called[name].items())
    total = sum(size.get((node.domain, node.op_type), 1) for node in all_nodes(proto.graph.node))
    if total > MOST_NODES:
        return f"functions that call each other stand for {total:.3g} nodes: at most {MOST_NODES} are checked"
    return None


def _long_range(proto: onnx.ModelProto) -> str | None:
    """Describe a Range that is too long for inference; None if there is none."""
    import onnx

    numbers = {tensor.name: tensor for tensor in tensors(proto) if not tensor.dims}
    for _, nodes in graphs(proto):
        for node in nodes:
            if node.op_type != "Range":
                continue
            ends = [float(onnx.numpy_helper.to_array(numbers[name])) for name in node.input[:2] if name in numbers]
            if any(abs(end) > _LONGEST_RANGE for end in ends):
                return f"Range of more than {_LONGEST_RANGE} numbers, up to {ends[-1]:g}"
    return None


_LONGEST_RANGE = 1 << 24


def named(node: ir.Node | None) -> str:
    """Return the name of a node, or one made from its operator and output."""
    if node is None:
        return "graph"
    return shortened(node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}")


def shortened(text: object, length: int = 200) -> str:
    """Return a text in one printable line of at most `length` characters."""
    line = printable(" ".join(str(text)[: 2 * length].split()))
    return line if len(line) <= length else f"{line[: length - 3]}..."


def type_name(value: ir.Value | None) -> str:
    """Return the name of the value's element type, or say that it is not known."""
    return "a type not known" if value is None or value.dtype is None else value.dtype.name
