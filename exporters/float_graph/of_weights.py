"""Compute at once what a program computes from weights alone by operators of linear algebra, which ONNX lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

PREFIX = "of_weights_"
"""Beginning of the names of constants that are made here."""


def with_values_of_weights(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program with constants in the place of QR, inverses and others of `torch.linalg` on weights.

    Other operators on weights stay, so that the weight of a layer is recognized. The program is changed.
    """
    values = _Values(program)
    graph, module = program.graph, program.graph_module
    for node in [node for node in graph.nodes if _lacking(node) and values.known(node)]:
        found = values.of(node)
        parts = {user: found[user.args[1]] for user in node.users} if isinstance(found, tuple) else {node: found}
        for place, (part, value) in enumerate(parts.items()):
            name = f"{PREFIX}{node.name}_{place}"
            module.register_buffer(name, value.contiguous(), persistent=False)
            program.constants[name] = value.contiguous()
            with graph.inserting_before(part):
                constant = graph.get_attr(name)
            constant.meta = dict(part.meta)
            part.replace_all_uses_with(constant)
            if part is not node:
                graph.erase_node(part)
        graph.erase_node(node)
    module.recompile()
    return program


def _lacking(node: Node) -> bool:
    """Return True for an operator of linear algebra without one in ONNX."""
    name = str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2]
    return name.startswith("linalg_") or name == "matrix_exp"


class _Values:
    """Values of the nodes of a program that depend on its weights and constants alone."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        held = {**program.state_dict, **program.constants}
        self._found: dict[Node, Any] = {}
        self._targets = {s.arg.name: held[s.target] for s in program.graph_signature.input_specs if s.target in held}
        self._known: set[Node] = set()
        for node in program.graph.nodes:
            inputs = node.all_input_nodes
            computed = node.op == "call_function" and inputs and all(each in self._known for each in inputs)
            if computed or (node.op == "placeholder" and node.name in self._targets):
                self._known.add(node)

    def known(self, node: Node) -> bool:
        """Return True for a node that depends on weights and constants alone."""
        return node in self._known

    def of(self, node: Node) -> Any:
        """Return the value of a node that is known."""
        if node not in self._found:
            if node.op == "placeholder":
                self._found[node] = self._targets[node.name].detach()
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self.of)
                target: Any = node.target
                self._found[node] = target(*args, **kwargs)
        return self._found[node]
