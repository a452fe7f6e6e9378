"""Define the rules that ask the runtimes which are installed here to read a graph."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from intaglio.exporters.lint.inference import ask
from intaglio.exporters.lint.reader import Checked, type_name
from intaglio.exporters.lint.rule import Problems, rule
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.tensorrt.parsing import can_parse
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRTRTX
from intaglio.pipeline.runs.registry import find_runtime

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target


@rule(
    "loads",
    "error",
    why="what the installed ONNX Runtime says when it makes a session of the graph, with zeros for weights",
    fix="cast to float32 or float16 in front of it, or export it as operators that the runtime has",
    when="no errors",
)
def check_loads(graph: Checked, target: Target) -> Problems:
    """Graphs that ONNX Runtime does not load, such as operators without a kernel for their types."""
    if not isinstance(find_runtime(target.runtime), OnnxRuntime):
        return
    complaint = ask("loads", graph.proto).complaint
    if complaint is None:
        return
    missing = _NO_KERNEL.search(complaint)
    if missing is None:
        yield None, f"ONNX Runtime does not load it: {complaint.partition(' : FAIL : ')[2] or complaint}"
        return
    if target.provider != "CPUExecutionProvider":  # another provider may have this kernel
        return
    op, made = missing.groups()
    node = next((n for n in graph.of_type(op) if any(value.name == made for value in n.outputs)), None)
    types = ", ".join(type_name(value) for value in (() if node is None else node.inputs))
    yield node, f"{target.name} has no kernel for {op} of {types or 'these types'}"


_NO_KERNEL = re.compile(r"Could not find an implementation for (\S+?)\(\d+\) node with name '(.*?)'")


@rule(
    "parses",
    "error",
    why="what the parser of the installed TensorRT-RTX says, with zeros for weights",
    fix="export that part as other operators, with constants where the parser asks for them",
    when="no errors",
)
def check_parses(graph: Checked, target: Target) -> Problems:
    """Graphs that the parser of TensorRT-RTX refuses, such as sums over axes that the graph computes."""
    if not isinstance(find_runtime(target.runtime), TensorRTRTX) or not can_parse():
        return
    complaint = ask("parses", graph.proto).complaint
    if complaint is None:
        return
    made, _, said = complaint.partition(": ")
    node = next((n for n in graph.nodes if any(value.name == made for value in n.outputs)), None)
    yield node, f"TensorRT-RTX does not parse it: {said or complaint}"
