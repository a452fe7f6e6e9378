"""Rewrite the complex numbers of a program of torch as pairs of real numbers: ONNX Runtime computes no complex ones.

A complex tensor (...,) becomes a real tensor (..., 2), as `torch.view_as_real` returns it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from intaglio.exporters.float_graph.fourier import FOURIER
from intaglio.pipeline.errors import StepFailed

aten = torch.ops.aten

MOVES = frozenset(
    (
        *("alias", "cat", "chunk", "clone", "contiguous", "copy", "detach", "expand", "flatten", "flip", "index"),
        *("index_select", "lift_fresh_copy", "mean", "narrow", "neg", "permute", "repeat", "reshape", "roll", "select"),
        *("select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "sum"),
        *("transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view"),
    )
)
"""Operators of ATen that do the same to both parts of complex numbers."""
VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Operators that need numbers in an order of memory that pairs may not have."""
TRANSFORMS = (
    *(getattr(aten, name).default for name in dir(aten) if name.startswith("fft_")),
    *(aten.stft.default, aten.stft.center, aten.istft.default),
)
"""Fourier transforms, which torch computes by those of FOURIER."""
PRODUCTS = (aten.einsum.default, aten.matmul.default)
"""Products that torch computes by others."""
ZEROS = frozenset({"empty", "empty_like", "new_empty", "new_zeros", "zeros", "zeros_like"})
SIZES = {"size": 2, "shape": 2, "repeats": 1}
"""Arguments with one number for each axis, and that of the axis of the two parts."""
AXES = frozenset({"dim", "dim0", "dim1", "start_dim", "end_dim", "dims"})


def with_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program with pairs in place of complex numbers; it is returned as it is if it has none.

    Raises StepFailed for complex operators that have no such form, and for complex inputs and outputs.
    """
    if not any(_is_complex(node) for node in program.graph.nodes):
        return program
    known = torch.export.default_decompositions()
    composed = {each: known[each] for each in TRANSFORMS} | {each: partial(_composed, known[each]) for each in PRODUCTS}
    program = program.run_decompositions({**composed, **FOURIER})  # this also replaces operators that work in place
    _Pairs(program).rewrite()
    for node in program.graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
    program.graph_module.recompile()
    return program


def _composed(by_others: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute an operator by others if a number is complex. Operators of real numbers stay as they are."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    return by_others(*args, **kwargs) if any(each.is_complex() for each in tensors) else NotImplemented


def _is_complex(value: object) -> bool:
    """Return True for a node that is a complex tensor, or a list of them."""
    if not isinstance(value, Node):
        return False
    found = value.meta.get("val")
    some = found[0] if isinstance(found, list | tuple) and found else found
    return isinstance(some, torch.Tensor) and some.is_complex()


def _name(node: Node) -> str:
    """Return the name of an operator of ATen, such as `mul`."""
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


class _Pairs:
    """Rewriting of one program, node by node: `made` are the pairs of its complex nodes."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        self.made: dict[Node, Node] = {}
        self.at = next(iter(self.graph.nodes))

    def rewrite(self) -> None:
        """Rewrite all nodes. Changes the program."""
        constants = {spec.arg.name: spec.target for spec in self.program.graph_signature.input_specs}
        replaced = []
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and self._complex(node):
                self.made[node] = self._constant(node, constants[node.name])
            elif node.op == "output" and any(map(self._complex, node.all_input_nodes)):
                raise StepFailed("torch cannot export the model: it returns complex numbers")
            elif _name(node) == "_assert_tensor_metadata" and self._complex(node.args[0]):
                replaced.append(node)
            elif node.op == "call_function" and any(map(self._complex, (node, *node.all_input_nodes))):
                self.at = node
                with self.graph.inserting_before(node):
                    new = self._rewritten(node)
                if self._complex(node):
                    self.made[node] = new
                else:
                    node.replace_all_uses_with(new)
                replaced.append(node)
        for node in reversed(replaced):
            self.graph.erase_node(node)

    def _complex(self, value: object) -> bool:
        return value in self.made or _is_complex(value)

    def _constant(self, node: Node, target: str | None) -> Node:
        """Make a constant a pair."""
        for held in (self.program.constants, self.program.state_dict):
            if target in held:
                pair = torch.view_as_real(held[target].detach().resolve_conj()).contiguous()
                trained = isinstance(held[target], torch.nn.Parameter)
                held[target] = torch.nn.Parameter(pair, requires_grad=False) if trained else pair
                node.meta["val"] = torch.view_as_real(node.meta["val"])
                return node
        raise StepFailed(f"torch cannot export the model: its input {node.name} is complex")

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node for an operator, with the metadata of the node that is rewritten."""
        operation = aten.reshape.default if operation in VIEWS else operation
        new: Node = self.graph.call_function(operation, args, kwargs)
        new.meta = dict(self.at.meta)
        values = map_arg((args, kwargs), lambda node: node.meta["val"])
        new.meta["val"] = operation(*values[0], **values[1])
        return new

    def _rewritten(self, node: Node) -> Node:
        """Return the node that computes the pair, or the real tensor, that this node stands for. Raises StepFailed."""
        if node.target is operator.getitem:
            return self._call(operator.getitem, self.made[node.args[0]], node.args[1])  # type: ignore[index]  # a node
        name = _name(node)
        found = self._between(node, name) or self._computed(node, name)
        if found is None and (name in MOVES or name in ZEROS):
            found = self._moved(node, name)
        if found is None:
            raise StepFailed(
                f"torch cannot export the model: no real form of the complex operator {node.target} is known"
            )
        return found

    def _between(self, node: Node, name: str) -> Node | None:
        """Return the form of an operator that goes between complex and real numbers."""
        args: Any = node.args
        match name:
            case "view_as_complex":
                found: Node = args[0]
                return found
            case "view_as_real" | "view_as_real_copy" | "resolve_conj":
                return self._pair(args[0])
            case "real" | "imag":
                return self._parts(args[0])[name == "imag"]
            case "complex":
                return self._joined(args[0], args[1])
            case "polar":
                sides = (self._call(side.default, args[1]) for side in (aten.cos, aten.sin))
                return self._joined(*(self._call(aten.mul.Tensor, args[0], side) for side in sides))
            case "abs":
                real, imaginary = (self._call(aten.mul.Tensor, part, part) for part in self._parts(args[0]))
                return self._call(aten.sqrt.default, self._call(aten.add.Tensor, real, imaginary))
            case "to" | "_to_copy":
                return self._converted(node)
            case _:
                return None

    def _computed(self, node: Node, name: str) -> Node | None:
        """Return the form of an operator that computes with both parts."""
        args: Any = node.args
        match name:
            case "conj" | "_conj" | "_conj_physical" | "conj_physical":
                real, imaginary = self._parts(args[0])
                return self._joined(real, self._call(aten.neg.default, imaginary))
            case "mul":
                return self._product(*args[:2])
            case "bmm" | "mm":
                return self._product_of_pairs(node.target, *args[:2])
            case "div" if not self._complex(args[1]):
                return self._call(node.target, self._pair(args[0]), self._beside(args[1]))
            case "add" | "sub" if all(isinstance(arg, Node) for arg in args):
                return self._call(node.target, *map(self._pair, args), **node.kwargs)
            case "constant_pad_nd" if not any(args[2:]):
                return self._call(node.target, self._pair(args[0]), [0, 0, *args[1]])
            case "gather":
                index = self._beside(args[2])
                both = self._call(aten.expand.default, index, [*args[2].meta["val"].shape, 2])
                return self._call(aten.gather.default, self._pair(args[0]), self._axis(args[1], args[0]), both)
            case _:
                return None

    def _pair(self, value: Any) -> Node:
        """Return the pair of a complex node; a real one gets an imaginary part of zero."""
        if value in self.made:
            return self.made[value]
        return self._joined(value, self._call(aten.zeros_like.default, value))

    def _parts(self, value: Any) -> tuple[Node, Node]:
        pair = self._pair(value)
        return self._call(aten.select.int, pair, -1, 0), self._call(aten.select.int, pair, -1, 1)

    def _joined(self, real: Any, imaginary: Any) -> Node:
        return self._call(aten.stack.default, [real, imaginary], -1)

    def _beside(self, value: Any) -> Any:
        """Return a real operand with an axis for the two parts; a number stays a number."""
        return self._call(aten.unsqueeze.default, value, -1) if isinstance(value, Node) else value

    def _product(self, a: Any, b: Any) -> Node:
        """Return the product of two pairs, or of a pair and a real factor."""
        if not (self._complex(a) and self._complex(b)):
            pair, factor = (a, b) if self._complex(a) else (b, a)
            if isinstance(factor, complex):
                raise StepFailed("torch cannot export the model: it multiplies by a complex number")
            return self._call(aten.mul.Tensor, self._pair(pair), self._beside(factor))
        return self._product_of_pairs(aten.mul.Tensor, a, b)

    def _product_of_pairs(self, operation: Any, a: Any, b: Any) -> Node:
        """Return (a_r b_r - a_i b_i, a_r b_i + a_i b_r), where `operation` multiplies two real tensors."""
        (ar, ai), (br, bi) = self._parts(a), self._parts(b)
        rr, ii, ri, ir = (self._call(operation, x, y) for x, y in ((ar, br), (ai, bi), (ar, bi), (ai, br)))
        return self._joined(self._call(aten.sub.Tensor, rr, ii), self._call(aten.add.Tensor, ri, ir))

    def _converted(self, node: Node) -> Node:
        """Convert the element type: to another complex one, from a real one, or to the real part."""
        dtype = node.meta["val"].dtype
        x = self._pair(node.args[0]) if dtype.is_complex else self._parts(node.args[0])[0]
        wanted = dtype.to_real() if dtype.is_complex else dtype
        return x if x.meta["val"].dtype == wanted else self._call(aten._to_copy.default, x, dtype=wanted)

    def _axis(self, axis: Any, of: Any, more: int = 0) -> Any:
        """Return an axis counted from the front, so that the axis of the two parts stays the last one."""
        found = of[0] if isinstance(of, list | tuple) else of
        rank = found.meta["val"].dim() + more - (self.made.get(found) is found)  # constants are pairs already
        return [a % rank for a in axis] if isinstance(axis, list | tuple) else axis % rank

    def _moved(self, node: Node, name: str) -> Node:
        """Do to the pair what an operator without arithmetic between the parts does to a complex tensor."""
        arguments = node.target._schema.arguments  # type: ignore[union-attr]  # an operator of ATen
        if name in ("mean", "sum") and arguments[1].name != "dim":
            raise StepFailed(f"torch cannot export the model: no real form of {node.target} is known")
        args = [self._moved_argument(node, name, a.name, x) for a, x in zip(arguments, node.args, strict=False)]
        kwargs = {argument: self._moved_argument(node, name, argument, x) for argument, x in node.kwargs.items()}
        return self._call(node.target, *args, **kwargs)

    def _moved_argument(self, node: Node, name: str, argument: str, value: Any) -> Any:
        """Return an argument of an operator for the pair of the tensor that it moves."""
        if argument in SIZES:
            value = [*value, SIZES[argument]]
        elif argument in AXES and value is not None:
            value = self._axis(value, node.args[0], int(name in ("unsqueeze", "stack")))
        elif argument == "dtype" and value is not None:
            value = value.to_real()
        if name == "permute" and argument == "dims":
            value = [*value, len(value)]
        return map_arg(value, lambda each: self.made.get(each, each))
