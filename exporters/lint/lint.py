"""Finds in an ONNX graph what a target refuses, computes wrongly or takes off the integers. Nothing is executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from intaglio.exporters.lint.reader import Checked, Rule, named, shortened
from intaglio.exporters.lint.rules import quantized as quantized
from intaglio.exporters.lint.rules import reading as reading
from intaglio.pipeline.artifacts.findings import Finding, Findings
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import TargetError

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target


class Lint(Pass):
    """A graph without errors builds on the target and runs on integers where it says so; see RULES."""

    name: ClassVar[str] = "lint"
    version: ClassVar[int] = 3
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LINT})
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    refuse: Literal["errors", "nothing"] = Field("errors", description="findings that end the run")

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        """Return the rules by name."""
        return {rule.name: rule for rule in RULES}

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
    checked, errors = Checked.read(path), False
    for rule in RULES if checked.standard else RULES[:2]:  # the others take for granted what ONNX says
        if rule.last and errors:
            continue
        for place, (node, message) in enumerate(rule.check(checked, target)):
            errors |= rule.level == "error"
            if place == MOST_FINDINGS:
                yield Finding(rule.name, rule.level, "graph", f"more than {MOST_FINDINGS} of these", rule.fix)
                break
            yield Finding(rule.name, rule.level, named(node), shortened(message, 600), rule.fix)


MOST_FINDINGS = 100
"""Of one rule."""


RULES = (
    Rule(
        "opset",
        "error",
        reading.check_opset,
        "export with a lower one",
        "ONNX Runtime 1.31.1 loads opsets up to 26 and IR versions up to 13",
    ),
    Rule(
        "valid",
        "error",
        reading.check_valid,
        "correct the export",
        "the checker and shape inference of onnx find what parsers refuse, such as Squeeze of an axis of 64 (PixArt as "
        "torch 2.13 exports it)",
    ),
    Rule(
        "operator",
        "error",
        reading.check_operator,
        "export it as the operators it is made of, or leave that part to the application",
        "the parser has no such operator and loads no plug-in",
    ),
    Rule(
        "type",
        "error",
        reading.check_type,
        "cast it to a type that the target has, or leave that part to the application",
        "the parser of TensorRT-RTX 1.7.1 refuses inputs and casts of it",
    ),
    Rule(
        "double",
        "warning",
        reading.check_double,
        "write float32 and see whether that is precise enough",
        "in the network that the parser of TensorRT-RTX 1.7.1 makes they are in float32, without an error",
    ),
    Rule(
        "form",
        "error",
        reading.check_form,
        "write it in other operators: group normalization as Reshape, InstanceNormalization and Reshape; pads for an "
        "output_shape; the square, absolute value or logarithm for a sum over no axis",
        "the parser of TensorRT-RTX 1.7.1 refuses it, or makes something else of it: one group of channels is "
        "normalized channel by channel, 0.57 from what ONNX means",
    ),
    Rule(
        "name",
        "error",
        reading.check_name,
        "give the function another name; export the operator as the operators of ONNX it is made of",
        "the parser of TensorRT-RTX 1.7.1 looks at the name alone: a function own.Relu that negates becomes a Relu",
    ),
    Rule(
        "domain",
        "warning",
        reading.check_domain,
        "write it with the domain of ONNX if that is what it means, and give it another name if not",
        "the parser of TensorRT-RTX 1.7.1 looks at the name alone",
    ),
    Rule(
        "attention",
        "error",
        reading.check_attention,
        "export with opset 22 or lower, or in float16",
        "TensorRT-RTX 1.7.1 has float32 kernels for 3-D inputs only, and takes the operator apart for none",
    ),
    Rule(
        "shared-attention",
        "error",
        reading.check_shared_attention,
        "export with opset 22 or lower, which takes Attention apart",
        "the process of the builder of TensorRT-RTX 1.7.1 ends with SIGSEGV, in float32 always, in float16 unless an "
        "element-wise kernel makes the tensor",
    ),
    Rule(
        "code-type",
        "error",
        quantized.check_code_type,
        "write signed codes with zero point 0, and say so: QuantizeLinear without a zero point means uint8",
        "TensorRT-RTX 1.7.1 compiles uint8 inputs as int8, without a warning, and refuses other types",
    ),
    Rule(
        "zero-point",
        "error",
        quantized.check_zero_point,
        "subtract the offset before QuantizeLinear; behind the product it is a constant that joins the bias",
        "TensorRT quantizes symmetrically (NvInfer.h); the parser refuses the node",
    ),
    Rule(
        "scale",
        "error",
        quantized.check_scale,
        "bound the scale from below (2^-14 in float16), or keep it in float32",
        "the parser takes positive scales alone; 1 / s of a float16 scale below 1.5e-5 is infinite, and every code the "
        "largest or NaN",
    ),
    Rule(
        "scale-type",
        "error",
        quantized.check_scale_type,
        "give the scale the type of the tensor, and both operands the same",
        "TensorRT up to 10.12 asks for it (NvInfer.h); ONNX Runtime 1.31.1 neither loads nor runs it; TensorRT-RTX "
        "1.7.1 stops at operands that differ",
    ),
    Rule(
        "computed-scale",
        "error",
        quantized.check_computed_scale,
        "divide by the computed part before QuantizeLinear, and multiply by it behind the product",
        "an error up to TensorRT 10.12 (NvInfer.h); TensorRT-RTX 1.7.1 multiplies in floating point without a warning",
    ),
    Rule(
        "input-scale",
        "error",
        quantized.check_input_scale,
        "give the input a single scale, a scalar; scale its channels with a Mul in front",
        "TensorRT-RTX 1.7.1 multiplies in floating point, or does not build for groups; ONNX Runtime 1.31.1 fails when "
        "it runs",
    ),
    Rule(
        "weight-axis",
        "error",
        quantized.check_weight_axis,
        "scale the output channels: axis 1 of [K, N], 0 of [N, K] and of convolutions",
        "TensorRT-RTX 1.7.1 multiplies in floating point; ONNX Runtime 1.31.1 fails when it runs",
    ),
    Rule(
        "input-by-groups",
        "error",
        quantized.check_input_by_groups,
        "give the weight one scale a channel, or leave the input in float",
        "TensorRT-RTX 1.7.1 does not build it in 3-D and ignores all groups but the first in 2-D; ONNX Runtime 1.31.1 "
        "fails when it runs, or multiplies in float",
    ),
    Rule(
        "mixed-codes",
        "error",
        quantized.check_mixed_codes,
        "quantize both to one type, or leave the input in float",
        "TensorRT-RTX 1.7.1 does not build a linear layer of them (input and filter have to be the same type), and "
        "computes a convolution in float",
    ),
    Rule(
        "input-by-int4",
        "error",
        quantized.check_input_by_int4,
        "store the weight as int8 codes, or leave the input in float",
        "TensorRT calls int4 weight-only; TensorRT-RTX 1.7.1 builds linear layers with a scale for each channel; ONNX "
        "Runtime 1.31.1 multiplies in float",
    ),
    Rule(
        "requantized",
        "error",
        quantized.check_requantized,
        "quantize and read the codes with scales of one shape, finer than those of the 4-bit codes",
        "TensorRT-RTX 1.7.1 takes a pair of equal scales for none and stops at the type; on scales of two shapes its "
        "process ends with SIGSEGV",
    ),
    Rule(
        "groups",
        "error",
        quantized.check_groups,
        "take a group size that divides K, and write one scale a group",
        "the TensorRT parser ignores block_size and takes K / rows of the scale, so that a short last group regroups "
        "all weights without a warning",
    ),
    Rule(
        "int4-shape",
        "error",
        quantized.check_int4_shape,
        "store it in 2-D with an even last axis, and reshape or slice what DequantizeLinear makes",
        "4-bit weights have two axes up to TensorRT 10.6 (NvInfer.h), and are packed in pairs along the last",
    ),
    Rule(
        "half-sum",
        "error",
        quantized.check_half_sum,
        "give the weight one scale and multiply by the channels' own behind the product, or compute it in float32",
        "in the layer list of TensorRT-RTX 1.7.1 the product is Half and the scales come later: 28 % of the outputs "
        "overflow at K = 4608",
    ),
    Rule(
        "moved-codes",
        "error",
        quantized.check_moved_codes,
        "move the codes in the file, or what DequantizeLinear makes of them",
        "TensorRT-RTX 1.7.1 does not build it; Cast of TensorRT 10 takes no codes",
    ),
    Rule(
        "codes-between",
        "error",
        quantized.check_codes_between,
        "move the input before QuantizeLinear, or what DequantizeLinear makes of it",
        "TensorRT 10.16.2 does not build such a graph on Orin, but on Thor (NVIDIA/TensorRT issue 4832)",
    ),
    Rule(
        "shared-zero-point",
        "error",
        quantized.check_shared_zero_point,
        "give each weight a zero point of its own",
        "with session.x64quantprecision=1, which is exact without VNNI, ONNX Runtime 1.31.1 rewrites it for the first "
        "weight and does not load for the second",
    ),
    Rule(
        "int8-moves",
        "error",
        quantized.check_int8_moves,
        "write uint8 codes with zero point 128",
        "ONNX Runtime 1.31.1 rewrites them to uint8 on x86-64, with VNNI as without, and does not load what it wrote",
    ),
    Rule(
        "input-type",
        "warning",
        quantized.check_input_type,
        "write uint8 codes with zero point 128",
        "layers that share an int8 input, or one without a zero point, stay in float in ONNX Runtime 1.31.1",
    ),
    Rule(
        "floating",
        "warning",
        quantized.check_floating,
        "leave it in float, or accept the rounding without the speed",
        "TensorRT-RTX 1.7.1 deconvolves in float; ONNX Runtime 1.31.1 has no 8-bit Gemm, and Conv if its output is",
    ),
    Rule(
        "between",
        "warning",
        quantized.check_between,
        "quantize right before the product",
        "TensorRT-RTX 1.7.1 and ONNX Runtime 1.31.1 multiply in floating point",
    ),
    Rule(
        "channels",
        "warning",
        quantized.check_channels,
        "leave it in float",
        "TensorRT 8.6 found no kernel for 4 channels (NVIDIA/TensorRT issue 3638); multiples of 16 are safe",
    ),
    Rule(
        "loads",
        "error",
        reading.check_loads,
        "cast to float32 or float16 in front of it, or export it as operators that the runtime has",
        "what the installed ONNX Runtime says when it makes a session of the graph, with zeros for weights",
        last=True,
    ),
)
