"""Define rules about what a target can read: operators, types and forms that it refuses or misreads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from intaglio.exporters.float_graph.products import code_type, constant, is_constant, producer, shape
from intaglio.exporters.lint.reader import Checked, shortened
from intaglio.exporters.lint.rule import Problems, rule

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.pipeline.formats.target import Target


@rule(
    "opset",
    "error",
    why="the runtime refuses newer opsets and IR versions; the facts of the target have the source",
    fix="export with a lower one",
    when="always",
)
def check_opset(graph: Checked, target: Target) -> Problems:
    """An opset or an IR version above those that the target reads."""
    if graph.opset > target.opset_max:
        yield None, f"opset {graph.opset}, but {target.name} reads up to {target.opset_max}"
    highest = target.limits.ir_version_max
    if highest is not None and graph.model.ir_version > highest:
        yield None, f"IR version {graph.model.ir_version}, but {target.name} reads up to {highest}"


@rule(
    "valid",
    "error",
    why=(
        "the checker and shape inference of onnx find what parsers refuse, such as Squeeze of an axis of 64 (PixArt as "
        "torch 2.13 exports it)"
    ),
    fix="correct the export",
    when="always",
)
def check_valid(graph: Checked, target: Target) -> Problems:
    """Constructs that the ONNX standard does not allow, and types and shapes that do not fit together."""
    if graph.complaint is not None:
        what = "types and shapes do not fit together" if graph.standard else "not what the ONNX standard allows"
        yield None, f"{what}: {graph.complaint}"
    if not graph.standard:
        return
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):  # the checker of onnx ignores their axes
        x, scale = (shape(value) for value in node.inputs[:2])
        axis = node.attributes.get_int("axis", 1)
        if x is None or scale is None or len(scale) != 1 or scale == (1,):
            continue
        if not -len(x) <= axis < len(x):
            yield node, f"scales along axis {axis} of {len(x)}"
        elif scale[0] != x[axis]:
            yield node, f"{scale[0]} scales along axis {axis}, which has {x[axis]} elements"


@rule(
    "operator",
    "error",
    why="the parser has no such operator and loads no plug-in",
    fix="export it as the operators it is made of, or leave that part to the application",
)
def check_operator(graph: Checked, target: Target) -> Problems:
    """Operators, or attributes of operators, that the target does not have."""
    refused = frozenset(target.limits.unsupported)
    for node in graph.nodes:
        op, name = node.op_type, shortened(f"{node.domain}.{node.op_type}".removeprefix("."), 100)
        if (node.domain, op) in graph.functions:
            continue
        foreign = node.domain not in ("", "ai.onnx", *target.limits.domains)
        if foreign and (target.limits.reads_domains or op not in _standard()):
            yield node, f"{target.name} has no operator {name}"
        if op in refused or (op in _standard() and f"{op}-{_since(op, graph.opset)}" in refused):
            yield node, f"{target.name} has no operator {op}"
        for key, attribute in node.attributes.items():
            usual = attribute.value in _USUAL or set(attribute.value if isinstance(attribute.value, tuple) else ()) == {
                1
            }
            if (f"{op}.{key}" in refused and not usual) or f"{op}.{key}={attribute.value}" in refused:
                yield node, f"{target.name} takes no {op} with {key} = {shortened(attribute.value, 40)}"


_USUAL = (0, 0.0, "none", "stretch")
"""Values of attributes that change nothing; so do dilations of 1."""


@rule(
    "type",
    "error",
    why="the parser of TensorRT-RTX 1.7.1 refuses inputs of such a type, and casts to it",
    fix="cast it to a type that the target has, or leave that part to the application",
)
def check_type(graph: Checked, target: Target) -> Problems:
    """Values of a type that the target does not have; codes have rules of their own."""
    known = frozenset(target.limits.types)
    for node, value in _values(graph) if known else ():
        if value.dtype is None or value.dtype.name in known or value.dtype.name == "UNDEFINED":
            continue
        near = {value.producer(), *(use.node for use in value.uses())}
        if not any(each is not None and each.op_type in ("QuantizeLinear", "DequantizeLinear") for each in near):
            yield node, f"{shortened(value.name, 100)} is in {value.dtype.name}, which {target.name} does not have"


@rule(
    "double",
    "warning",
    why="the parser of TensorRT-RTX 1.7.1 turns float64 values into float32 without an error",
    fix="write float32 and see whether that is precise enough",
)
def check_double(graph: Checked, target: Target) -> Problems:
    """Values in float64 that the target computes in float32."""
    for node, value in _values(graph) if target.limits.double_as_float else ():
        if value.dtype is not None and value.dtype.name == "DOUBLE":
            yield node, f"{shortened(value.name, 100)} is in float64, and {target.name} computes it in float32"


def _values(graph: Checked) -> Iterator[tuple[ir.Node | None, ir.Value]]:
    """Yield the inputs and constants of all graphs, and the outputs of every node."""
    main = graph.model.graph
    for owner in (main, *main.subgraphs()):
        yield from ((None, value) for value in (*owner.inputs, *owner.initializers.values()))
    yield from ((node, value) for node in graph.nodes for value in node.outputs)


@rule(
    "form",
    "error",
    why=(
        "the parser of TensorRT-RTX 1.7.1 refuses it, or makes something else of it: one group of channels is "
        "normalized channel by channel, with a relative error of 0.57"
    ),
    fix=(
        "write constant axes; convert old opsets; write it in other operators: group normalization as Reshape, "
        "InstanceNormalization and Reshape; pads for an output_shape; the square, absolute value or logarithm for a "
        "sum over no axis"
    ),
)
def check_form(graph: Checked, target: Target) -> Problems:
    """Forms of operators that the target refuses, or computes differently from ONNX."""
    for name in target.limits.forms:
        for node in graph.nodes:
            if message := FORMS[name](node):
                yield node, message


def _one_group_norm(node: ir.Node) -> str | None:
    if node.op_type != "GroupNormalization" or node.attributes.get_int("num_groups", 0) != 1:
        return None
    x = node.inputs[0]
    channels = None if x is None or x.shape is None or len(x.shape) < 2 else x.shape[1]
    if channels == 1:
        return None
    return f"one group of {channels if isinstance(channels, int) else 'all'} channels: the target normalizes each alone"


def _output_shape(node: ir.Node) -> str | None:
    if node.op_type != "ConvTranspose" or "output_shape" not in node.attributes:
        return None
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    return "output_shape without auto_pad: if the padding is odd, the target pads the wrong side by one"


def _reduce_nothing(node: ir.Node) -> str | None:
    if node.op_type not in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare"):
        return None
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if not node.attributes.get_int("noop_with_empty_axes", 0) or (axes is not None and shape(axes) != (0,)):
        return None
    return f"{node.op_type} over no axis: the target returns the input, ONNX Runtime reduces each element by itself"


def _flat_group_norm(node: ir.Node) -> str | None:
    flat = node.op_type in ("GroupNormalization", "InstanceNormalization") and _rank(node.inputs[0]) == 2
    return f"{node.op_type} of a tensor with two axes: the target needs three or more" if flat else None


def _vector_by_batch(node: ir.Node) -> str | None:
    if node.op_type != "MatMul" or _rank(node.inputs[0]) != 1 or (_rank(node.inputs[1]) or 0) < 3:
        return None
    return "MatMul of a vector and a batch of matrices"


def _reduction_of_truths(node: ir.Node) -> str | None:
    x = node.inputs[0] if node.op_type in ("ReduceMax", "ReduceMin") else None
    return f"{node.op_type} of booleans" if x is not None and x.dtype is not None and x.dtype.name == "BOOL" else None


def _computed_axes(node: ir.Node) -> str | None:
    op, value = node.op_type, node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or not (op in ("Squeeze", "Unsqueeze") or op.startswith("Reduce")) or is_constant(value):
        return None
    shapes, pending, seen = ("Shape", "Size"), [value], set[object]()
    while pending:  # the sizes of a tensor can be known when the engine is built
        current = pending.pop()
        made = producer(current)
        if made is None and constant(current) is None:
            return f"{op} over axes that the graph computes from its inputs"
        if made is not None and made not in seen and made.op_type not in shapes:
            seen.add(made)
            pending += [each for each in made.inputs if each is not None]
    return None


def _old_broadcast(node: ir.Node) -> str | None:
    opset = 7 if node.graph is None else node.graph.opset_imports.get("", 7)
    old = opset < 7 and node.op_type in _BROADCASTING
    return f"{node.op_type} of opset {opset}: the target broadcasts as opset 7 does" if old else None


_BROADCASTING = frozenset(["Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "PRelu", "Sub"])


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


FORMS: Mapping[str, Callable[[ir.Node], str | None]] = {
    "one-group-norm": _one_group_norm,
    "deconvolution-output-shape": _output_shape,
    "reduction-of-nothing": _reduce_nothing,
    "flat-group-norm": _flat_group_norm,
    "vector-by-batch": _vector_by_batch,
    "reduction-of-truths": _reduction_of_truths,
    "computed-axes": _computed_axes,
    "old-broadcast": _old_broadcast,
}
"""Functions that describe what a target does with a node, by the name of the form in `limits.forms`.

Each returns None for nodes of another form."""


@rule(
    "name",
    "error",
    why="the parser of TensorRT-RTX 1.7.1 looks at the name alone: a function own.Relu that negates becomes a Relu",
    fix="give the function another name; export the operator as the operators of ONNX it is made of",
)
def check_name(graph: Checked, target: Target) -> Problems:
    """Functions, and operators of other domains, that the target confuses with ONNX operators of that name."""
    if target.limits.reads_domains:
        return
    for node in graph.nodes:
        op = node.op_type
        if (node.domain, op) in graph.functions and op in _standard():
            yield node, f"function {shortened(node.domain, 40)}.{op} is executed as the operator {op} of ONNX"
        elif node.domain == "com.microsoft" and op in _OTHERWISE:
            yield node, f"com.microsoft.{op} is read as the operator {op} of ONNX, which has other inputs"


_OTHERWISE = frozenset({"Attention", "CausalConvWithState", "LinearAttention", "RotaryEmbedding"})
"""Operators of ONNX Runtime that share a name with ONNX's but take other inputs."""


@rule(
    "domain",
    "warning",
    why="the parser of TensorRT-RTX 1.7.1 looks at the name alone",
    fix="write it with the domain of ONNX if that is what it means, and give it another name if not",
)
def check_domain(graph: Checked, target: Target) -> Problems:
    """Operators of other domains that the target reads by their names alone."""
    if target.limits.reads_domains:
        return
    for node in graph.nodes:
        known = ("", "ai.onnx", "com.microsoft", "trt")
        if (
            node.domain not in known
            and node.op_type in _standard()
            and (node.domain, node.op_type) not in graph.functions
        ):
            yield node, f"{shortened(node.domain, 40)}.{node.op_type} is read as the operator {node.op_type} of ONNX"


@rule(
    "attention",
    "error",
    why="TensorRT-RTX 1.7.1 has float32 kernels for 3-D inputs only, and never decomposes the operator",
    fix="export with opset 22 or lower, or in float16",
)
def check_attention(graph: Checked, target: Target) -> Problems:
    """Attention in float32 where the target has no kernel for it."""
    for node in graph.of_type("Attention"):
        q = node.inputs[0]
        if target.limits.float32_attention or q is None or q.dtype is None or q.shape is None:
            continue
        if q.dtype.name == "FLOAT" and len(q.shape) == 4:
            yield node, f"{target.name} has no Attention in float32 with heads as an axis of their own"


@rule(
    "shared-attention",
    "error",
    why=(
        "the process of the builder of TensorRT-RTX 1.7.1 ends with SIGSEGV, in float32 always, in float16 unless an "
        "element-wise kernel makes the tensor"
    ),
    fix="export with opset 22 or lower, which takes Attention apart",
)
def check_shared_attention(graph: Checked, target: Target) -> Problems:
    """Attention that takes one tensor as both q and k."""
    for node in () if target.limits.shared_attention else graph.of_type("Attention"):
        q, k = (_identity(value) for value in node.inputs[:2])
        if q is k:
            yield node, f"q and k are one tensor, {'' if q is None else q.name}"


def _identity(value: ir.Value | None) -> ir.Value | None:
    """Return the value that this one is a copy of."""
    while (node := producer(value)) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value


@rule(
    "code-type",
    "error",
    why="TensorRT-RTX 1.7.1 compiles uint8 inputs as int8, without a warning, and refuses other types",
    fix="write signed codes with zero point 0, and say so: QuantizeLinear without a zero point means uint8",
)
def check_code_type(graph: Checked, target: Target) -> Problems:
    """Codes of a type that the target reads as another type, or not at all."""
    known = frozenset(target.limits.code_types)
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        made = producer(node.inputs[0])
        if node.op_type == "DequantizeLinear" and made is not None and made.op_type == "QuantizeLinear":
            continue  # reported for the node that makes the codes
        if (found := code_type(node)) not in known and found not in ("unknown", "INT32"):  # INT32: a bias
            yield node, f"codes of type {found}, but {target.name} reads {', '.join(target.limits.code_types)}"


@cache
def _standard() -> frozenset[str]:
    """Return the names of all operators that ONNX has or had."""
    import onnx

    return frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain)


def _since(op: str, opset: int) -> int:
    """Return the opset that defines `op` as `opset` has it; 0 if there is none."""
    import onnx

    try:
        return int(onnx.defs.get_schema(op, max(1, min(opset, onnx.defs.onnx_opset_version()))).since_version)
    except onnx.defs.SchemaError:
        return 0
