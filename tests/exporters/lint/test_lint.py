"""Every verdict of `lint` is held against the runtime: what it passes builds, what it refuses is really refused.

A refused graph fails, ends the builder's process, multiplies in floating point, is one of the hazards that the layer
list shows, or compiles to the very plan of another graph. Versions that cannot be run here are linted alone.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from harness import Artifacts, run_pass
from lint_cases_others import ATTENTION, DOCUMENTED, DOCUMENTED_CASES, OLD, ORT_CASES, SHARED
from lint_cases_rtx import LEGAL, REFUSED, WARNED
from lint_graphs import FLOATING, ORT, RTX, Case, found, named
from quantizing import with_plan

from intaglio.exporters.lint.lint import RULES, Lint
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.runtimes.tensorrt.build_log import Layer, count_products, find_hazards, read_layers
from intaglio.pipeline.artifacts.keys import LINT, TARGET
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.formats.layer import illegal
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import load_target, target_names

INTEGER = {"MatMulIntegerToFloat", "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger"}


def plan_of(path: Path) -> tuple[bytes, tuple[Layer, ...], tuple[int, int]]:
    """The engine, its layers, and its products on integers and in floating point. Raises TargetError."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no verdict can be tested")
    plan, log = BuildTensorRT()._build(trt, path, {}, RTX)
    layers = read_layers(log)
    products = {
        n.name or f"node_of_{n.output[0]}"
        for n in onnx.load(path).graph.node
        if n.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose")
    }
    return plan, layers, count_products(layers, products)


@pytest.mark.parametrize("case", named(LEGAL))
def test_what_passes_builds_and_runs_on_integers_where_it_says_so(case, tmp_path):
    path = case.write(tmp_path)
    assert found(path, RTX) == ((), case.warnings)
    _, layers, counts = plan_of(path)
    assert counts == case.counts
    assert not find_hazards(layers)


@pytest.mark.parametrize("case", named(WARNED))
def test_what_is_warned_about_builds_and_multiplies_in_floating_point(case, tmp_path):
    path = case.write(tmp_path)
    assert found(path, RTX) == ((), case.warnings)
    assert plan_of(path)[2] == FLOATING


@pytest.mark.parametrize("case", named(REFUSED))
def test_what_is_refused_is_really_refused(case, tmp_path):
    path = case.write(tmp_path)
    assert set(found(path, RTX)[0]) == set(case.rules)
    match case.evidence:
        case "misread":  # what it computes instead is in test_importer.py
            plan_of(path)
        case "fails":
            with pytest.raises(TargetError):
                plan_of(path)
        case "crashes":
            assert builder_ends_with(path) == -11  # SIGSEGV
        case "float":
            assert plan_of(path)[2] == FLOATING
        case "hazard":
            assert find_hazards(plan_of(path)[1])
        case "no scale":  # of the kernel that quantizes
            quantize = next(layer for layer in plan_of(path)[1] if layer.outputs[0].dtype == "Int8")
            assert not quantize.constants
        case "nonsense":
            plan_of(path)
            assert computes_nonsense(path)
        case None:
            onnx.save(case.model(case.same_plan), tmp_path / "other.onnx")
            assert plan_of(path)[0] == plan_of(tmp_path / "other.onnx")[0]


def builder_ends_with(path: Path) -> int:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no verdict can be tested")
    code = (
        "import sys, tensorrt_rtx; from pathlib import Path; "
        "from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT; "
        "from intaglio.pipeline.formats.target import load_target; "
        "BuildTensorRT()._build(tensorrt_rtx, Path(sys.argv[1]), {}, load_target('tensorrt-rtx'))"
    )
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60).returncode


def test_every_rule_has_a_case_on_some_runtime():
    tried = {
        rule
        for case in (*REFUSED, *WARNED, *ORT_CASES, *(case for _, case in DOCUMENTED_CASES), *SHARED)
        for rule in (*case.rules, *case.warnings)
    } | {"name", "domain", "type", "double"}
    assert tried == {rule.name for rule in RULES}
    assert all(rule.why and rule.fix for rule in RULES)


@pytest.mark.parametrize("case", named(ORT_CASES))
def test_onnx_runtime_agrees(case, tmp_path, monkeypatch):
    # what loads and what is fused is asked, not what is exact on this CPU
    monkeypatch.setattr("intaglio.exporters.runtimes.onnxruntime.session.exact_kernels", lambda code=127: {})
    path = case.write(tmp_path)
    errors, warnings = found(path, ORT)
    assert (set(errors), warnings) == (set(case.rules), case.warnings)
    match case.evidence:
        case "fails":
            with pytest.raises(Exception, match="ONNXRuntimeError"):
                run(path)
        case "nonsense":
            assert computes_nonsense(path)
        case "float":
            assert run(path)[1] == FLOATING
        case _:
            assert run(path)[1] == case.counts


@pytest.mark.parametrize("case", named(SHARED))
def test_weights_with_one_zero_point_do_not_load_with_the_kernels_for_cpus_without_vnni(case, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "intaglio.exporters.runtimes.onnxruntime.session.exact_kernels", lambda code=127: ORT.kernels[-1].settings
    )
    own = ORT.model_copy(update={"limits": ORT.limits.model_copy(update={"shared_zero_points": False})})
    path = case.write(tmp_path)
    assert found(path, own)[0] == case.rules
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(path)
    apart = replace(case, nodes=case.nodes.replace("(w8_b, s_n, z_n)", "(w8_b, s_n, z_b)")).write(tmp_path)
    assert found(apart, own) == ((), ())
    assert run(apart)[1] == (2, 0)


def run(path: Path) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Return the outputs of ONNX Runtime, and the numbers of its products on integers and in floating point."""
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    optimized = path.with_name("optimized.onnx")
    session = open_session(path, threads=1, optimized=optimized)
    rng = np.random.default_rng(3)
    types = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(double)": np.float64,
    }
    feed = {i.name: rng.normal(size=i.shape).astype(types[i.type]) for i in session.get_inputs()}
    ops = [node.op_type for node in onnx.load(optimized).graph.node]
    integer = sum(op in INTEGER for op in ops)
    floating = sum(op in ("MatMul", "FusedMatMul", "Gemm", "Conv", "MatMulNBits") for op in ops)
    return session.run(None, feed), (integer, floating)


def computes_nonsense(path: Path) -> bool:
    """NaN, Inf or zero, on random input."""
    return not all(np.isfinite(y).all() and y.any() for y in run(path)[0])


@pytest.mark.parametrize("target", DOCUMENTED)
def test_versions_that_cannot_run_here_follow_their_documents(target, tmp_path):
    for where, case in DOCUMENTED_CASES:
        if "Attention" in case.nodes and target in OLD:
            continue  # it has no such operator at all
        errors, warnings = found(case.write(tmp_path), load_target(target))
        later = () if case.rules == ("opset",) else ("opset",)  # is tested alone
        assert set(errors) - set(later) == (set(case.rules) if target in where else set()), case.name
        assert warnings == case.warnings, case.name


def test_an_attention_of_one_tensor_is_for_no_version_before_it_had_the_operator(tmp_path):
    case = Case("attention", "y = Attention (x, k, v)", **ATTENTION)
    path = case.write(tmp_path)
    assert {name for name in DOCUMENTED if "operator" in found(path, load_target(name))[0]} == OLD


def planned(layer):
    if layer.op == "conv":
        return FLOAT if layer.name in ("conv_in", "conv_out") else W8A8_STEP
    if "attn" in layer.name or "attention" in layer.name:
        return W8A8_TOKEN
    return w4a16(64) if layer.k >= 128 and "time_embedding" not in layer.name else W8A8_STEP


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_our_own_graphs_pass(name, target, request, tmp_path):
    there = load_target(target)

    def legal(layer):  # a patch embedding has too few channels for some
        return planned(layer) if illegal(layer, planned(layer), there) is None else FLOAT

    artifacts: Artifacts = with_plan(request.getfixturevalue(name), legal) | {TARGET: there}
    artifacts |= run_pass(ExportQdq(), artifacts, tmp_path / "qdq")
    findings = run_pass(Lint(), artifacts, tmp_path / "lint")[LINT]
    assert {f.rule for f in findings.findings} <= ({"floating"} if there.runtime == "onnxruntime" else set())
    assert not findings.at("error")
