"""Finds in an ONNX graph what a target refuses, computes wrongly or takes off the integers. Nothing is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field

from intaglio.exporters._onnx_file import read_proto
from intaglio.exporters._quantized_graph import (
    Operand,
    Product,
    array,
    code_type,
    constant,
    dequantized,
    granularity,
    is_constant,
    producer,
    products,
    shape,
)
from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.findings import Finding, Findings, Level
from intaglio.pipeline.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.pass_base import Pass

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from intaglio.pipeline.target import Target


class Lint(Pass):
    """A graph without errors builds on the target and runs on integers where it says so; see RULES."""

    name: ClassVar[str] = "lint"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LINT})
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    refuse: Literal["errors", "nothing"] = Field("errors", description="findings that end the run")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises TargetError with every error, RecipeError for a file that cannot be read."""
        found = Findings(tuple(lint(state[GRAPH].path, state[TARGET])))
        errors = found.at("error")
        if errors and self.refuse == "errors":
            raise TargetError(*map(str, errors))
        for rule in RULES:
            if warnings := [f for f in found.at("warning") if f.rule == rule.name]:
                ctx.log.warning("%d of %s, the first: %s", len(warnings), rule.name, warnings[0])
        return {LINT: found}


def lint(path: Path, target: Target) -> Iterator[Finding]:
    """Everything that the rules find. Raises RecipeError where the file cannot be read, or its data is elsewhere."""
    proto = read_proto(path)
    checked = Checked.read(path, proto)
    for rule in RULES if checked.standard else RULES[:2]:  # the others take for granted what ONNX says
        for node, message in rule.check(checked, target):
            yield Finding(rule.name, rule.level, _named(node), message, rule.fix)


@dataclass(frozen=True)
class Checked:
    """A model with the types and shapes of all values that can be inferred, and what inference complains about."""

    model: ir.Model
    opset: int
    nodes: list[ir.Node]
    """Of all graphs and functions."""
    products: list[Product]
    standard: bool
    """Whether it is ONNX, apart from types and shapes."""
    complaint: str | None
    """The reason that it is not, or that its types and shapes do not fit together."""

    @classmethod
    def read(cls, path: Path, proto: onnx.ModelProto) -> Checked:
        """Raises RecipeError for what is no graph."""
        import onnx
        import onnx_ir as ir

        standard, complaint = False, None
        try:
            _check(path)
            standard = True
            _check_ranges(proto)
            proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        except Exception as e:  # they raise whatever the operators' own functions raise
            complaint = " ".join(str(e).split())
        try:
            model = ir.from_proto(proto)
        except Exception as e:  # likewise: the file decodes, but says something impossible
            raise RecipeError(f"{path}: is no ONNX model: {' '.join(str(e).split())}") from e
        ir.external_data.set_base_dir(model.graph, path.parent)
        graphs = (model.graph, *(function.graph for function in model.functions.values()))
        nodes = [node for graph in graphs for node in graph.all_nodes()]
        opset = model.opset_imports.get("", 1)
        return cls(model, opset, nodes, list(products(nodes)) if standard else [], standard, complaint)

    def of_type(self, *op_types: str) -> Iterator[ir.Node]:
        return (node for node in self.nodes if node.op_type in op_types)


def _check(path: Path) -> None:
    """Raises what the checker of onnx raises, except for old operators: runtimes execute them."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as e:
        if "is deprecated" not in str(e):  # GroupNormalization of opsets 18 to 20
            raise


def _check_ranges(proto: onnx.ModelProto) -> None:
    """Raises ValueError for a Range that inference would take minutes, and all memory, to write down."""
    import onnx

    numbers = {tensor.name: tensor for tensor in proto.graph.initializer if not tensor.dims}
    for node in proto.graph.node:
        ends = [onnx.numpy_helper.to_array(numbers[name]) for name in node.input[:2] if name in numbers]
        if node.op_type == "Range" and any(abs(float(end)) > _LONGEST_RANGE for end in ends):
            raise ValueError(f"Range of more than {_LONGEST_RANGE} numbers, up to {ends[-1]:g}")


_LONGEST_RANGE = 1 << 24

Problems: TypeAlias = Iterator[tuple["ir.Node | None", str]]
"""Where something is wrong (None: in the whole graph), and what, with its numbers."""


@dataclass(frozen=True)
class Rule:
    """A row of the table: what is looked for, what to do about it, and the reason that it matters."""

    name: str
    level: Level
    check: Callable[[Checked, Target], Problems]
    fix: str
    why: str

    @property
    def finds(self) -> str:
        """What it looks for, in one line."""
        return self.check.__doc__ or ""


def _opset(graph: Checked, target: Target) -> Problems:
    """An opset or an IR version above what the target reads."""
    if graph.opset > target.opset_max:
        yield None, f"opset {graph.opset}, but {target.name} reads up to {target.opset_max}"
    highest = target.limits.ir_version_max
    if highest is not None and graph.model.ir_version > highest:
        yield None, f"IR version {graph.model.ir_version}, but {target.name} reads up to {highest}"


def _valid(graph: Checked, target: Target) -> Problems:
    """What the ONNX standard does not allow, and types and shapes that do not fit together."""
    if graph.complaint is not None:
        what = "types and shapes do not fit together" if graph.standard else "not what the ONNX standard allows"
        yield None, f"{what}: {graph.complaint}"
    if not graph.standard:
        return
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):  # the checker does not look at their axes
        x, scale = (shape(value) for value in node.inputs[:2])
        axis = node.attributes.get_int("axis", 1)
        if x is None or scale is None or len(scale) != 1 or scale == (1,):
            continue
        if not -len(x) <= axis < len(x):
            yield node, f"scales along axis {axis} of {len(x)}"
        elif scale[0] != x[axis]:
            yield node, f"{scale[0]} scales along axis {axis}, which has {x[axis]} places"


def _operator(graph: Checked, target: Target) -> Problems:
    """Operators, or attributes of them, that the target does not have."""
    import onnx

    refused = frozenset(target.limits.unsupported)
    own = {(domain, name) for domain, name, _ in graph.model.functions}
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    for node in graph.nodes:
        op = node.op_type
        if (node.domain, op) in own:
            continue
        if node.domain not in ("", "ai.onnx", *target.limits.domains) and op not in standard:
            yield node, f"{target.name} has no operator {node.domain}.{op}"
        if op in refused or (op in standard and f"{op}-{_since(op, graph.opset)}" in refused):
            yield node, f"{target.name} has no operator {op}"
        for name, attribute in node.attributes.items():
            if f"{op}.{name}" in refused and attribute.value not in (0, 0.0):
                yield node, f"{target.name} takes no {op} with {name} = {attribute.value}"


def _since(op: str, opset: int) -> int:
    """The opset that defines `op` as `opset` has it; 0 where it has none."""
    import onnx

    try:
        return int(onnx.defs.get_schema(op, max(1, min(opset, onnx.defs.onnx_opset_version()))).since_version)
    except onnx.defs.SchemaError:
        return 0


def _attention(graph: Checked, target: Target) -> Problems:
    """The operator Attention in float32 where there is no kernel for it."""
    for node in graph.of_type("Attention"):
        q = node.inputs[0]
        if target.limits.float32_attention or q is None or q.dtype is None or q.shape is None:
            continue
        if q.dtype.name == "FLOAT" and len(q.shape) == 4:
            yield node, f"{target.name} has no Attention in float32 with heads as an axis of their own"


def _shared_attention(graph: Checked, target: Target) -> Problems:
    """The operator Attention with one tensor as q and as k."""
    for node in () if target.limits.shared_attention else graph.of_type("Attention"):
        q, k = (_identity(value) for value in node.inputs[:2])
        if q is k:
            yield node, f"q and k are one tensor, {'' if q is None else q.name}"


def _identity(value: ir.Value | None) -> ir.Value | None:
    """What the value is a copy of."""
    while (node := producer(value)) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value


def _code_type(graph: Checked, target: Target) -> Problems:
    """Codes of a type that the target reads as another, or not at all."""
    known = frozenset(target.limits.code_types)
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        made = producer(node.inputs[0])
        if node.op_type == "DequantizeLinear" and made is not None and made.op_type == "QuantizeLinear":
            continue  # said of the node that makes the codes
        if (found := code_type(node)) not in known and found not in ("unknown", "INT32"):  # INT32: a bias
            yield node, f"codes of type {found}, but {target.name} reads {', '.join(target.limits.code_types)}"


def _zero_point(graph: Checked, target: Target) -> Problems:
    """Zero points that are not zero where quantization is symmetric."""
    import numpy as np

    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
        if target.limits.symmetric and zero is not None and np.any(zero.astype(np.float32) != 0):
            yield node, f"zero point {zero.astype(np.float32).ravel()[:1].item():g}, but {target.name} has none"


def _scale(graph: Checked, target: Target) -> Problems:
    """Scales that are not numbers, not positive, or have no reciprocal in their type."""
    import numpy as np

    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        scale = array(node.inputs[1])
        if scale is None:
            continue
        s = scale.astype(np.float64).ravel()
        bad = s[~(np.isfinite(s) & ((s > 0) if target.limits.symmetric else (s != 0)))]
        if bad.size:
            yield node, f"{bad.size} of {s.size} scales cannot be divided by, such as {bad[0]:g}"
        largest = 65504  # of float16; for types of more range, a reciprocal always fits
        tiny = s[(s > 0) & (s < 1 / largest)] if scale.dtype == np.float16 else s[:0]
        if tiny.size and target.limits.reciprocal_scales and node.op_type == "QuantizeLinear":
            yield node, f"scale {tiny[0]:.2g}, whose reciprocal float16 does not hold"


def _scale_type(graph: Checked, target: Target) -> Problems:
    """Scales of another type than their tensor, or than the other operand."""
    for node in graph.of_type("QuantizeLinear"):
        x, scale = node.inputs[0], node.inputs[1]
        if target.limits.mixed_scale_types or x is None or scale is None or x.dtype is None or scale.dtype is None:
            continue
        if x.dtype != scale.dtype:
            yield node, f"{x.dtype.name} values with a scale in {scale.dtype.name}"
    for product in graph.products:
        x, w = product.x.dequantize.inputs[1], product.w.dequantize.inputs[1]
        apart = x is not None and w is not None and x.dtype != w.dtype
        if apart and product.w.granularity == "channel" and not product.is_convolution:
            yield product.node, f"the input has its scale in {_type(x)}, the weight's channels theirs in {_type(w)}"


def _type(value: ir.Value | None) -> str:
    return "a type not known" if value is None or value.dtype is None else value.dtype.name


def _computed_scale(graph: Checked, target: Target) -> Problems:
    """Scales that the graph computes, which keep a product off the integers."""
    if not target.limits.constant_scales:
        return
    for product in graph.products:
        for operand in (product.x, product.w):
            if not is_constant(operand.dequantize.inputs[1]):
                yield operand.dequantize, f"its scale is computed, and {_named(product.node)} needs a constant"


def _input_scale(graph: Checked, target: Target) -> Problems:
    """Inputs of products with a scale for each channel or group."""
    for product in graph.products:
        op = product.node.op_type
        for operand in (product.x, product.w):
            if operand.is_weight:
                continue
            scale = shape(operand.dequantize.inputs[1])
            if operand.granularity in ("channel", "group"):
                yield operand.dequantize, f"scales of shape {list(scale or ())} for the input of {_named(product.node)}"
            elif scale and op not in target.limits.one_element_scales:
                yield operand.dequantize, f"a scale of shape {list(scale)}, which {op} takes for one a channel"


def _weight_axis(graph: Checked, target: Target) -> Problems:
    """Weights with scales along another axis than the output channels."""
    for product in graph.products:
        if not product.w.is_weight or product.w.granularity != "channel":
            continue
        axis = product.w.channel_axis
        if axis is not None and axis != product.output_axis:
            yield (
                product.w.dequantize,
                f"scales along axis {axis} of the weight of {_named(product.node)}, whose channels are on axis "
                f"{product.output_axis}",
            )


def _input_by_groups(graph: Checked, target: Target) -> Problems:
    """8-bit inputs by weights in groups."""
    for product in graph.products:
        if product.w.is_weight and product.w.granularity == "group":
            groups = shape(product.w.dequantize.inputs[1])
            yield product.node, f"an 8-bit input and a weight with scales of shape {list(groups or ())}"


def _input_by_int4(graph: Checked, target: Target) -> Problems:
    """8-bit inputs by 4-bit weights."""
    for product in graph.products:
        kind: Literal["conv", "linear"] = "conv" if product.is_convolution else "linear"
        if product.w.code_type not in ("INT4", "UINT4") or product.w.granularity == "group":
            continue
        if kind not in target.limits.int4_by_int8:
            yield product.node, f"an 8-bit input and a 4-bit weight in a {kind} layer"
        elif product.w.granularity == "tensor":
            yield product.node, "an 8-bit input and a 4-bit weight with a single scale"


def _requantized(graph: Checked, target: Target) -> Problems:
    """Weights that are scaled and quantized again in the graph, with scales that the builder cannot take."""
    import numpy as np

    for dequantize in graph.of_type("DequantizeLinear"):
        quantize = producer(dequantize.inputs[0])
        if quantize is None or quantize.op_type != "QuantizeLinear" or not is_constant(quantize.inputs[0]):
            continue
        before = dequantized(quantize.inputs[0])
        if before is not None and before.code_type == "INT4" and target.limits.symmetric:
            first, second = array(before.dequantize.inputs[1]), array(quantize.inputs[1])
            if first is not None and second is not None and np.array_equal(first, second):
                yield quantize, "4-bit codes are scaled and quantized again with the same scale"
        users = {use.node.op_type for use in dequantize.outputs[0].uses()}
        if target.limits.mixed_pairs or not users & {"MatMul", "Gemm"}:
            continue
        if granularity(quantize) == "tensor" and granularity(dequantize) == "channel":
            yield dequantize, "a weight quantized with one scale is read with one for each channel"


def _groups(graph: Checked, target: Target) -> Problems:
    """Groups that do not divide an axis, lie along the wrong one, or are not as many as the scales."""
    limits = target.limits
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        size, codes, scale = node.attributes.get_int("block_size", 0), shape(node.inputs[0]), shape(node.inputs[1])
        if not size or codes is None or scale is None or len(codes) != len(scale):
            continue
        axis = node.attributes.get_int("axis", 1) % len(codes)
        k = codes[axis]
        if k % size and not limits.ragged_groups:
            yield node, f"{k} input features are not a multiple of the group size {size}"
        expected = (*codes[:axis], -(-k // size), *codes[axis + 1 :])
        if scale != expected:
            yield node, f"scales of shape {list(scale)}, but groups of {size} need {list(expected)}"
        if limits.trailing_groups and axis < len(codes) - 2:
            yield node, f"groups along axis {axis} of {len(codes)}, but {target.name} takes the last two"


def _int4_shape(graph: Checked, target: Target) -> Problems:
    """4-bit weights of too many axes, or with an odd last one."""
    most = target.limits.int4_rank_max
    for node in graph.of_type("DequantizeLinear"):
        codes = shape(node.inputs[0])
        if code_type(node) != "INT4" or not codes:
            continue
        if most is not None and len(codes) > most:
            yield node, f"a 4-bit weight of {len(codes)} axes, but {target.name} takes {most}"
        if target.limits.int4_even and codes[-1] % 2:
            yield node, f"a 4-bit weight of shape {list(codes)}, but {target.name} takes an even last axis"


def _half_sum(graph: Checked, target: Target) -> Problems:
    """Float16 products that are written before the scales of their channels."""
    for product in graph.products:
        scale = product.w.dequantize.inputs[1]
        if not target.limits.unscaled_half_sums or product.is_convolution or product.w.granularity != "channel":
            continue
        cast = any(node.op_type == "Cast" for node in product.w.between)
        if not cast and scale is not None and scale.dtype is not None and scale.dtype.name == "FLOAT16":
            yield product.node, "the sum of 8-bit products is written to float16 before its channels are scaled"


def _moved_codes(graph: Checked, target: Target) -> Problems:
    """Constant codes that something else than DequantizeLinear reads."""
    if not target.limits.codes_only_dequantized:
        return
    for owner in (graph.model.graph, *graph.model.graph.subgraphs()):
        for value in owner.initializers.values():
            if value.dtype is None or value.dtype.name not in ("INT8", "INT4"):
                continue
            for node in dict.fromkeys(use.node for use in value.uses()):
                if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                    yield node, f"reads the codes {value.name}, which {target.name} gives to DequantizeLinear alone"


def _codes_between(graph: Checked, target: Target) -> Problems:
    """Operators between QuantizeLinear and DequantizeLinear."""
    for node in () if target.limits.moves_codes else graph.of_type("DequantizeLinear"):
        mover = producer(node.inputs[0])
        if mover is not None and mover.op_type != "QuantizeLinear" and not is_constant(node.inputs[0]):
            yield mover, f"moves codes on their way to {_named(node)}"


def _shared_zero_point(graph: Checked, target: Target) -> Problems:
    """8-bit weights with one zero point in common."""
    seen: dict[str, ir.Node] = {}
    for product in () if target.limits.shared_zero_points else graph.products:
        weight = product.w.dequantize
        zero = weight.inputs[2] if product.w.is_weight and len(weight.inputs) > 2 else None
        if zero is None or zero.name is None or product.w.code_type != "INT8":
            continue
        first = seen.setdefault(zero.name, weight)
        if first is not weight:
            yield weight, f"has its zero point {zero.name} in common with {_named(first)}"


def _channels(graph: Checked, target: Target) -> Problems:
    """8-bit convolutions whose channels are not multiples of what kernels take."""
    multiple = target.limits.conv_channels_multiple
    for product in graph.products:
        filters = shape(product.node.inputs[1]) if product.is_convolution else None
        if filters is not None and (filters[0] % multiple or filters[1] % multiple):
            yield product.node, f"8-bit filters of shape {list(filters)}, not of multiples of {multiple} channels"


def _int8_moves(graph: Checked, target: Target) -> Problems:
    """Int8 inputs that are moved about, which does not load."""
    if target.limits.moves_int8 or graph.opset < 21:
        return
    for node in graph.of_type("DequantizeLinear"):
        operand = Operand(node, ())
        quantize = operand.quantize
        if quantize is None or operand.is_weight or operand.code_type != "INT8" or len(quantize.inputs) < 3:
            continue
        for user in dict.fromkeys(use.node for use in node.outputs[0].uses()):
            if user.op_type in ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"):
                yield user, "moves an input that was quantized to int8 with a zero point"
            elif user.op_type == "MatMul" and _biased(user):
                yield user, "an int8 input with a zero point, in a product that becomes a Gemm with its bias"


def _biased(node: ir.Node) -> bool:
    """Whether it is MatMul, of more than two axes, and Add of a constant, and nothing else."""
    users = [use.node for use in node.outputs[0].uses()]
    x = node.inputs[0]
    wide = x is not None and x.shape is not None and len(x.shape) > 2
    return (
        wide and [user.op_type for user in users] == ["Add"] and any(constant(v) is not None for v in users[0].inputs)
    )


def _input_type(graph: Checked, target: Target) -> Problems:
    """Int8 inputs of products where the target multiplies unsigned ones."""
    for product in graph.products:
        if target.activation_dtype == "uint8" and product.x.code_type == "INT8":
            yield product.x.dequantize, f"int8 codes for the input of {_named(product.node)}"


def _floating(graph: Checked, target: Target) -> Problems:
    """Products of codes that the target computes in floating point."""
    for product in graph.products:
        op = product.node.op_type
        match target.limits.integer_products.get(op):
            case None:
                yield product.node, f"{target.name} computes {op} in floating point, on rounded values"
            case "output":
                users = [use.node.op_type for use in product.node.outputs[0].uses()]
                if users != ["QuantizeLinear"]:
                    yield product.node, f"{target.name} computes {op} in floating point unless its output is quantized"
            case "input":
                pass


def _between(graph: Checked, target: Target) -> Problems:
    """Operators between DequantizeLinear and a product, which keep it in floating point."""
    for product in graph.products:
        casts = [sum(node.op_type == "Cast" for node in end.between) for end in (product.x, product.w)]
        if casts[0] != casts[1]:
            yield product.node, "Cast between DequantizeLinear and the product keeps it in floating point"
    for node in graph.of_type("MatMul", "Gemm", "Conv"):
        w = dequantized(node.inputs[1]) if len(node.inputs) > 1 else None
        stop = producer(node.inputs[0])
        if w is None or not w.is_weight or w.code_type not in ("INT8", "UINT8") or stop is None:
            continue
        if stop.op_type not in ("Add", "Clip", "Concat", "Mul", "Relu", "Resize") or _harmless(stop):
            continue
        before = [dequantized(value) for value in stop.inputs]
        if any(operand is not None and not operand.is_weight for operand in before):
            yield node, f"{stop.op_type} between DequantizeLinear and the product keeps it in floating point"


def _harmless(node: ir.Node) -> bool:
    """A factor joins the scale, and parts that share one scale are one tensor."""
    if node.op_type == "Mul":
        return any(shape(value) == () and constant(value) is not None for value in node.inputs)
    if node.op_type == "Concat":
        scales = [array(o.dequantize.inputs[1]) if (o := dequantized(v)) is not None else None for v in node.inputs]
        return all(s is not None and s.shape == () and s == scales[0] for s in scales)
    return False


def _named(node: ir.Node | None) -> str:
    """Its name, or by what it makes."""
    if node is None:
        return "graph"
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


RULES = (
    Rule(
        "opset",
        "error",
        _opset,
        "export with a lower one",
        "ONNX Runtime 1.31.1 loads opsets up to 26 and IR versions up to 13",
    ),
    Rule(
        "valid",
        "error",
        _valid,
        "correct the export",
        "the checker and shape inference of onnx find what parsers refuse, such as Squeeze of an axis of 64 (PixArt as "
        "torch 2.13 exports it)",
    ),
    Rule(
        "operator",
        "error",
        _operator,
        "export it as the operators it is made of, or leave that part to the application",
        "the parser has no such operator and loads no plug-in",
    ),
    Rule(
        "attention",
        "error",
        _attention,
        "export with opset 22 or lower, or in float16",
        "TensorRT-RTX 1.7.1 has float32 kernels for 3-D inputs only, and takes the operator apart for none",
    ),
    Rule(
        "shared-attention",
        "error",
        _shared_attention,
        "export with opset 22 or lower, which takes Attention apart",
        "the process of the builder of TensorRT-RTX 1.7.1 ends with SIGSEGV, in float32 always, in float16 unless an "
        "element-wise kernel makes the tensor",
    ),
    Rule(
        "code-type",
        "error",
        _code_type,
        "write signed codes with zero point 0, and say so: QuantizeLinear without a zero point means uint8",
        "TensorRT-RTX 1.7.1 compiles uint8 inputs as int8, without a warning, and refuses other types",
    ),
    Rule(
        "zero-point",
        "error",
        _zero_point,
        "subtract the offset before QuantizeLinear; behind the product it is a constant that joins the bias",
        "TensorRT quantizes symmetrically (NvInfer.h); the parser refuses the node",
    ),
    Rule(
        "scale",
        "error",
        _scale,
        "bound the scale from below (2^-14 in float16), or keep it in float32",
        "the parser takes positive scales alone; 1 / s of a float16 scale below 1.5e-5 is infinite, and every code the "
        "largest or NaN",
    ),
    Rule(
        "scale-type",
        "error",
        _scale_type,
        "give the scale the type of the tensor, and both operands the same",
        "TensorRT up to 10.12 asks for it (NvInfer.h); ONNX Runtime 1.31.1 neither loads nor runs it; TensorRT-RTX "
        "1.7.1 stops at operands that differ",
    ),
    Rule(
        "computed-scale",
        "error",
        _computed_scale,
        "divide by the computed part before QuantizeLinear, and multiply by it behind the product",
        "an error up to TensorRT 10.12 (NvInfer.h); TensorRT-RTX 1.7.1 multiplies in floating point without a warning",
    ),
    Rule(
        "input-scale",
        "error",
        _input_scale,
        "give the input a single scale, a scalar; scale its channels with a Mul in front",
        "TensorRT-RTX 1.7.1 multiplies in floating point, or does not build for groups; ONNX Runtime 1.31.1 fails when "
        "it runs",
    ),
    Rule(
        "weight-axis",
        "error",
        _weight_axis,
        "scale the output channels: axis 1 of [K, N], 0 of [N, K] and of convolutions",
        "TensorRT-RTX 1.7.1 multiplies in floating point; ONNX Runtime 1.31.1 fails when it runs",
    ),
    Rule(
        "input-by-groups",
        "error",
        _input_by_groups,
        "give the weight one scale a channel, or leave the input in float",
        "TensorRT-RTX 1.7.1 does not build it in 3-D and ignores all groups but the first in 2-D; ONNX Runtime 1.31.1 "
        "fails when it runs, or multiplies in float",
    ),
    Rule(
        "input-by-int4",
        "error",
        _input_by_int4,
        "store the weight as int8 codes, or leave the input in float",
        "TensorRT calls int4 weight-only; TensorRT-RTX 1.7.1 builds linear layers with a scale for each channel; ONNX "
        "Runtime 1.31.1 multiplies in float",
    ),
    Rule(
        "requantized",
        "error",
        _requantized,
        "quantize and read the codes with scales of one shape, finer than those of the 4-bit codes",
        "TensorRT-RTX 1.7.1 takes a pair of equal scales for none and stops at the type; on scales of two shapes its "
        "process ends with SIGSEGV",
    ),
    Rule(
        "groups",
        "error",
        _groups,
        "take a group size that divides K, and write one scale a group",
        "the TensorRT parser ignores block_size and takes K / rows of the scale, so that a short last group regroups "
        "all weights without a warning",
    ),
    Rule(
        "int4-shape",
        "error",
        _int4_shape,
        "store it in 2-D with an even last axis, and reshape or slice what DequantizeLinear makes",
        "4-bit weights have two axes up to TensorRT 10.6 (NvInfer.h), and are packed in pairs along the last",
    ),
    Rule(
        "half-sum",
        "error",
        _half_sum,
        "give the weight one scale and multiply by the channels' own behind the product, or compute it in float32",
        "in the layer list of TensorRT-RTX 1.7.1 the product is Half and the scales come later: 28 % of the outputs "
        "overflow at K = 4608",
    ),
    Rule(
        "moved-codes",
        "error",
        _moved_codes,
        "move the codes in the file, or what DequantizeLinear makes of them",
        "TensorRT-RTX 1.7.1 does not build it; Cast of TensorRT 10 takes no codes",
    ),
    Rule(
        "codes-between",
        "error",
        _codes_between,
        "move the input before QuantizeLinear, or what DequantizeLinear makes of it",
        "TensorRT 10.16.2 does not build such a graph on Orin, but on Thor (NVIDIA/TensorRT issue 4832)",
    ),
    Rule(
        "shared-zero-point",
        "error",
        _shared_zero_point,
        "give each weight a zero point of its own",
        "with session.x64quantprecision=1, which is exact without VNNI, ONNX Runtime 1.31.1 rewrites it for the first "
        "weight and does not load for the second",
    ),
    Rule(
        "int8-moves",
        "error",
        _int8_moves,
        "write uint8 codes with zero point 128",
        "ONNX Runtime 1.31.1 rewrites them to uint8 on x86-64, with VNNI as without, and does not load what it wrote",
    ),
    Rule(
        "input-type",
        "warning",
        _input_type,
        "write uint8 codes with zero point 128",
        "layers that share an int8 input, or one without a zero point, stay in float in ONNX Runtime 1.31.1",
    ),
    Rule(
        "floating",
        "warning",
        _floating,
        "leave it in float, or accept the rounding without the speed",
        "TensorRT-RTX 1.7.1 deconvolves in float; ONNX Runtime 1.31.1 has no 8-bit Gemm, and Conv if its output is",
    ),
    Rule(
        "between",
        "warning",
        _between,
        "quantize right before the product",
        "TensorRT-RTX 1.7.1 and ONNX Runtime 1.31.1 multiply in floating point",
    ),
    Rule(
        "channels",
        "warning",
        _channels,
        "leave it in float",
        "TensorRT 8.6 found no kernel for 4 channels (NVIDIA/TensorRT issue 3638); multiples of 16 are safe",
    ),
)
