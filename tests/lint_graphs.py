"""Graphs that `lint` is tested on: each by its nodes, its constants by their names.

Shapes: 64 in features, 32 out features, groups of 16; 16 in channels and 32 out channels of 8 x 8.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from intaglio.exporters.lint.lint import lint
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.formats.target import Target, load_target

RTX = load_target("tensorrt-rtx")
ORT = load_target("onnxruntime-cpu")

Evidence = Literal["misread", "fails", "crashes", "float", "hazard", "no scale", "nonsense"]


@dataclass(frozen=True)
class Case:
    """A graph by its nodes; constants are taken from TENSORS by their names. `rules`: its errors, then its warnings."""

    name: str
    nodes: str
    x: str = "float[2,16,64] x"
    y: str = "float[2,16,32] y"
    opset: int = 21
    ir: int = 10
    rules: tuple[str, ...] = ()
    counts: tuple[int, int] = (0, 0)
    """Numbers of products on integers and in floating point."""
    evidence: Evidence | None = None
    same_plan: str | None = None
    """Nodes of the graph that it is taken for."""
    warnings: tuple[str, ...] = ()
    tensors: dict[str, object] = field(default_factory=dict)

    def model(self, nodes: str | None = None) -> onnx.ModelProto:
        head = f'<ir_version: {self.ir}, opset_import: ["": {self.opset}, "com.microsoft": 1, "my": 1]>'
        model = onnx.parser.parse_model(f"{head}\ngraph ({self.x}) => ({self.y})\n{{{nodes or self.nodes}}}")
        made = {o for n in model.graph.node for o in n.output} | {i.name for i in model.graph.input} | {""}
        for name in sorted({i for n in model.graph.node for i in n.input} - made):
            if (content := {**TENSORS, **self.tensors}[name]) is not None:
                model.graph.initializer.append(_tensor(name, content))
        del model.opset_import[1:]
        model.opset_import.extend(
            helper.make_opsetid(domain, 1) for domain in sorted({n.domain for n in model.graph.node} - {""})
        )
        return model

    def write(self, folder: Path) -> Path:
        onnx.save(self.model(), folder / "model.onnx")
        return folder / "model.onnx"


def _tensor(name: str, content: object) -> onnx.TensorProto:
    if isinstance(content, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(content)
        tensor.name = name
        return tensor
    return numpy_helper.from_array(np.asarray(content), name)


def int8(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-127, 128, shape).astype(np.int8)


def int4(*shape: int, kind: int = TensorProto.INT4) -> onnx.TensorProto:
    low = 0 if kind == TensorProto.UINT4 else -8
    codes = np.random.default_rng(7).integers(low, low + 16, int(np.prod(shape)))
    return helper.make_tensor("", kind, shape, codes)


def floats(kind: int, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(7).choice([0, 0.5, 1, -1, 2, 3], int(np.prod(shape)))
    return helper.make_tensor("", kind, shape, values)


def scales(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.linspace(0.01, 0.02, int(np.prod(shape)), dtype=dtype).reshape(shape)


def zeros4(*shape: int, value: int = 0) -> onnx.TensorProto:
    return helper.make_tensor("", TensorProto.INT4, shape, [value] * int(np.prod(shape)))


TENSORS: dict[str, object] = {
    "s": scales(), "t": np.float32(0.03), "one": np.float32(1), "zero": np.int8(0), "u0": np.uint8(0),
    "u128": np.uint8(128), "s_vec": scales(1), "z_vec": np.zeros(1, np.int8), "half": scales(dtype=np.float16),
    "w8": int8(64, 32), "w8_t": int8(32, 64), "w4": int4(64, 32), "w4_t": int4(32, 64), "w": scales(64, 32),
    "s_n": scales(32), "s_k": scales(64), "s_g": scales(4, 32), "s_gt": scales(32, 4), "s_row": scales(1, 32),
    "fine": scales(32) / np.float32(16), "z_n": np.zeros(32, np.int8), "z_k": np.zeros(64, np.int8),
    "half_n": scales(32, dtype=np.float16), "bias": scales(32), "ratio": scales(32), "table": scales(3),
    "c8": int8(32, 16, 3, 3), "c8_flat": int8(32, 144), "c4": int4(32, 16, 3, 3), "c4_flat": int4(32, 144),
    "s_cg": scales(32, 9), "s_c4": scales(32, 2, 3, 3), "s_in": scales(16), "oihw": np.array([32, 16, 3, 3]),
    "ct8": int8(16, 32, 2, 2), "dw8": int8(16, 1, 3, 3), "last": np.array([-1]), "eps": np.float32(1e-7),
    "first": np.array([0]), "second": np.array([1]), "flat": np.array([32, 64]), "kn": np.array([64, 32]),
    "w_fp8": floats(TensorProto.FLOAT8E4M3FN, 64, 32), "w_fp4": floats(TensorProto.FLOAT4E2M1, 64, 32),
    "whole": np.full((4, 32), 3, np.float32), "ones_n": np.ones(32, np.float32),
}  # fmt: skip

IN = "q = QuantizeLinear (x, s, zero) d = DequantizeLinear (q, s, zero) "
IN_HALF = IN.replace("s, zero", "half, zero")
IN_FP8 = "q = QuantizeLinear <output_dtype = 17> (x, s) d = DequantizeLinear (q, s) "
IN_U8 = IN.replace("zero", "u128")
CHANNELS = "v = DequantizeLinear <axis = 1> (w8, s_n) "
GROUPS = "v = DequantizeLinear <axis = 0, block_size = 16> (w4, s_g) "
PRODUCT = "y = MatMul (d, v)"
FILTERS = "v = DequantizeLinear <axis = 0> (c8, s_n) "
CONVOLUTION = "y = Conv <pads = [1, 1, 1, 1]> (d, v)"
ROWS = {"x": "float[16,64] x", "y": "float[16,32] y"}
IMAGE = {"x": "float[1,16,8,8] x", "y": "float[1,32,8,8] y"}
HALF = {"x": "float16[2,16,64] x", "y": "float16[2,16,32] y"}
ONE, FLOATING = (1, 0), (0, 1)


def refused(rule: str, evidence: Evidence | None, name: str, nodes: str, **more: object) -> Case:
    return Case(name, nodes, rules=(rule,), evidence=evidence, **more)  # type: ignore[arg-type]  # tests only


PAIR = "k = QuantizeLinear (v0, s, zero) v = DequantizeLinear <axis = 1> (k, s_n, z_n) " + PRODUCT


def named(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


def found(path: Path, target: Target) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rules of its errors and of its warnings."""
    findings = Findings(tuple(lint(path, target)))
    return tuple(f.rule for f in findings.at("error")), tuple(f.rule for f in findings.at("warning"))
