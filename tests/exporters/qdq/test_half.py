"""The values that become float16, and those that do not, in small graphs in text and in the tiny models."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from harness import Artifacts, run_pass
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from quantizing import with_plan

from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.lint.lint import lint
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.qdq.half import holds, type_half
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH, PLAN, TARGET, TRAJECTORY
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, IntInput, w4a8_step, w4a8_token
from intaglio.pipeline.formats.target import load_target

HALF, FLOAT32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


class Typed:
    """A graph in float32, and what became of it."""

    def __init__(self, text: str, amax: Mapping[str, float] | None = None, layers=(), **constants: np.ndarray) -> None:
        self.float32 = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
        self.float32.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
        for node in self.float32.graph.node:
            if node.name:
                node.metadata_props.add(key=LAYER_KEY, value=node.name.partition("_")[0])
                node.name = node.name.replace("__", "/")  # which the parser takes in no name
        model = ir.from_proto(self.float32)
        type_half(model, layers, amax or {})
        self.half = ir.to_proto(model)
        onnx.checker.check_model(self.half, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(self.half, strict_mode=True).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.types |= {tensor.name: tensor.data_type for tensor in self.half.graph.initializer}

    def of(self, op: str) -> set[int]:
        """Types of the floating-point inputs of all nodes of this operator."""
        read = [self.types[name] for node in self.half.graph.node if node.op_type == op for name in node.input]
        return set(read) & {HALF, FLOAT32}

    def run(self, **feed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs of both in ONNX's reference: ONNX Runtime on a CPU rounds to float16 at casts only."""
        found, expected = (ReferenceEvaluator(model).run(None, feed)[0] for model in (self.half, self.float32))
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        return found, expected


def rel_l2(y: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_what_needs_nothing_else_is_half_but_for_the_ends():
    w = draw(8, 6)
    w[0, 0] = 1e-9  # it may be lost: the weight as a whole is not
    typed = Typed("g (float[4, 8] x) => (float[4, 6] y) { h = MatMul (x, w)  y = Add (h, b) }", w=w, b=draw(6))
    assert typed.of("MatMul") == typed.of("Add") == {HALF}
    assert (typed.types["x"], typed.types["y"]) == (FLOAT32, FLOAT32)
    assert [node.op_type for node in typed.half.graph.node] == ["Cast", "MatMul", "Add", "Cast"]
    found, expected = typed.run(x=draw(4, 8, seed=1))
    assert 0 < rel_l2(found, expected) < 2**-10  # weight, input, product and sum are rounded by 2^-11 at most


@pytest.mark.parametrize(
    ("c", "kind"), [(2.0, HALF), (1e5, FLOAT32), (1e-5, FLOAT32), (1e-9, FLOAT32), (0.0, HALF), (-np.inf, HALF)]
)
def test_a_constant_is_half_where_half_holds_it(c, kind):
    text = "g (float[4, 8] x) => (float[4, 6] y) { h = MatMul (x, w)  y = Max (h, c) }"
    typed = Typed(text, w=draw(8, 6), c=np.float32(c))
    assert typed.of("Max") == {kind}


def test_small_elements_count_where_each_one_is_a_scale():
    mixed = np.array([1.0, 1e-6], np.float32)
    assert holds(mixed, each=False)
    assert not holds(mixed, each=True)
    assert not holds(np.full(3, 1e-6, np.float32), each=False)
    assert not holds(np.array([1.0, 1e5], np.float32), each=False)
    assert not holds(np.array([1.0, 1e25], np.float32), each=False)  # whose square float32 does not hold


@pytest.mark.filterwarnings("error")
def test_what_stands_for_infinity_becomes_it():
    mask = np.array([0.0, np.finfo(np.float32).min], np.float32)
    assert holds(mask, each=True)
    typed = Typed("g (float[4, 8] x) => (float[4, 2] y) { h = MatMul (x, w)  y = Add (h, c) }", w=draw(8, 2), c=mask)
    assert typed.of("Add") == {HALF}
    halves = [numpy_helper.to_array(t) for t in typed.half.graph.initializer if t.data_type == HALF]
    assert [0.0, -np.inf] in [each.tolist() for each in halves]


def test_a_tiny_bias_keeps_no_layer_in_float32():
    text = "g (float[4, 8] x) => (float[4, 6] y) { [a_m] h = MatMul (x, w)  [a_b] y = Add (h, b) }"
    assert Typed(text, w=draw(8, 6), b=draw(6) * np.float32(1e-6)).of("Add") == {HALF}
    assert Typed(text, w=draw(8, 6), b=draw(6) * np.float32(1e6)).of("Add") == {FLOAT32}


NORM = """g (float[2, 8, 64] x, float[2, 8, 64] r) => (float[2, 8, 64] y) {
    h = Add (x, r)
    mean = ReduceMean <keepdims = 1> (h, last)
    d = Sub (h, mean)
    d2 = Pow (d, two)
    var = ReduceMean <keepdims = 1> (d2, last)
    v = Add (var, eps)
    s = Sqrt (v)
    n = Div (d, s)
    y = Mul (n, g) }"""


def test_statistics_of_a_residual_of_30000_are_exact():
    constants = {"last": np.array([-1]), "two": np.float32(2), "eps": np.float32(1e-6), "g": draw(64)}
    typed = Typed(NORM, **constants)
    for op in ("ReduceMean", "Sub", "Pow", "Sqrt", "Div"):
        assert typed.of(op) == {FLOAT32}, op
    half = np.float16(1e4 * draw(2, 8, 64)), np.float16(2e4 + 100 * draw(2, 8, 64, seed=1))
    found, expected = typed.run(x=half[0].astype(np.float32), r=half[1].astype(np.float32))
    assert rel_l2(found, expected) < 1e-3  # the sum is rounded by 2^-11 of 3e4, and its mean is twice what is left


@pytest.mark.parametrize("op", ["LayerNormalization <axis = -1>", "Softmax <axis = -1>"])
def test_normalizations_compute_in_float32(op):
    scale = ", g" if op.startswith("Layer") else ""
    text = f"g (float[2, 64] x) => (float[2, 64] y) {{ a = Add (x, x)  h = {op} (a{scale})  y = MatMul (h, w) }}"
    typed = Typed(text, w=draw(64, 64), g=draw(64))
    assert typed.of(op.split()[0]) == {FLOAT32}
    assert typed.of("MatMul") == {HALF}


def test_angles_are_exact_back_to_the_timestep():
    text = """g (int64[2] t) => (float[2, 32] y) {
        f = Cast <to = 1> (t)
        u = Unsqueeze (f, one)
        a = MatMul (u, rates)
        s = Sin (a)
        y = MatMul (s, w) }"""
    typed = Typed(text, one=np.array([1]), rates=np.exp(-draw(1, 16)).astype(np.float32), w=np.eye(16, 32, dtype="f4"))
    assert typed.of("Sin") == {FLOAT32}
    found, expected = typed.run(t=np.array([999, 3]))
    assert np.abs(found - expected).max() < 2**-11  # only the sine is rounded: half an angle of 999 would be lost


@pytest.mark.parametrize(("amax", "kind"), [(3.0, HALF), (6e4, FLOAT32), (1e-6, FLOAT32), (0.0, HALF)])
def test_recorded_magnitudes_keep_a_product_in_float32(amax, kind):
    text = "g (float[4, 8] x) => (float[4, 4] y) { h = MatMul (x, w)  i = Mul (h, c)  y = MatMul (i, v) }"
    typed = Typed(text, {"h": amax}, w=draw(8, 6), c=np.float32(0.125), v=draw(6, 4))
    assert typed.of("Mul") == {kind}


def test_products_beyond_halfs_range_do_not_overflow():
    text = "g (float[4, 8] x) => (float[4, 6] y) { h = MatMul (x, w)  i = Mul (h, c)  y = Tanh (i) }"
    x, w = 100 * np.abs(draw(4, 8)), 200 * np.abs(draw(8, 6, seed=1))
    largest = float((x @ w).max())
    assert largest > 65504
    found, expected = Typed(text, {"h": largest}, w=w, c=np.float32(1e-2 / 8192)).run(x=x)
    assert rel_l2(found, expected) < 1e-6  # all in float32: the input, too, as the product reads it


def test_logits_of_1000_do_not_overflow_and_are_exact_where_they_were_recorded():
    text = """g (float[1, 2, 16, 32] q, float[1, 2, 32, 16] k, float[1, 2, 16, 32] v) => (float[1, 2, 16, 32] y) {
        s = MatMul (q, k)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, v) }"""
    keys = 16 * draw(1, 2, 32, 1, seed=1) + 0.02 * draw(1, 2, 32, 16, seed=3)  # logits some units apart
    feed = {"q": 16 * draw(1, 2, 16, 32), "k": keys, "v": draw(1, 2, 16, 32, seed=2)}
    feed = {name: x.astype(np.float16).astype(np.float32) for name, x in feed.items()}
    largest = float(np.abs(feed["q"] @ feed["k"]).max())
    assert largest > 1000
    rounded, exact = (rel_l2(*Typed(text, amax).run(**feed)) for amax in ({}, {"s": largest}))
    assert 0.01 < rounded < 0.25  # a logit of 1000 is rounded by up to 1/4, one of 2000 by 1/2
    assert exact < 2**-10  # only weights and output are rounded
    assert Typed(text, {"s": 200.0}).of("MatMul") == {HALF}


def test_a_group_scale_that_half_loses_keeps_the_layer_in_float32_as_a_whole():
    text = """g (float[4, 64] x) => (float[4, 8] y) {
        [a_dq] w = DequantizeLinear <axis = 0, block_size = 32> (codes, scale)
        [a_m] h = MatMul (x, w)
        y = Abs (h) }"""
    codes = np.ones((64, 8), np.int8)
    for s, kind in ((0.01, HALF), (1e-6, FLOAT32)):
        typed = Typed(text, codes=codes, scale=np.full((2, 8), s, np.float32))
        assert typed.of("DequantizeLinear") == typed.of("MatMul") == {kind}


def test_a_sum_of_two_layers_is_half_and_a_function_of_one_goes_on_in_float32():
    text = """g (float[4, 8] x) => (float[4, 4] y) {
        [a_m] a = MatMul (x, w)
        s = Sigmoid (a)
        i = Mul (a, s)
        [b_m] b = MatMul (i, w)
        r = Add (a, b)
        t = Tanh (b)
        f = Reshape (t, shape)
        y = MatMul (r, f) }"""
    typed = Typed(text, layers=("a", "b"), w=draw(8, 8), shape=np.array([8, 4]))
    assert typed.of("Sigmoid") == typed.of("Mul") == typed.of("Tanh") == {FLOAT32}
    assert typed.of("Add") == typed.of("Reshape") == {HALF}  # moved once it is half as large
    casts = [(node.input[0], node.output[0]) for node in typed.half.graph.node if node.op_type == "Cast"]
    assert len({source for source, _ in casts}) == len(casts)
    assert not {source for source, _ in casts} & {made for _, made in casts}


def test_a_basis_that_a_rounded_layer_shares_with_a_float_one_is_exact():
    text = """g (float[4, 8] x) => (float[4, 8] y) {
        [a__balance__Mul] s = Mul (x, d)
        [a__balance__MatMul] r = MatMul (s, h)
        [a_m] a = MatMul (r, w)
        [b_m] b = MatMul (r, w)
        y = Add (a, b) }"""
    typed = Typed(text, layers=("b",), d=draw(8), h=draw(8, 8), w=draw(8, 8))
    made = {node.name: {typed.types[name] for name in node.input} for node in typed.half.graph.node if node.name}
    assert made["a/balance/Mul"] == made["a/balance/MatMul"] == made["b_m"] == {FLOAT32}
    assert made["a_m"] == {HALF}


def test_what_only_moves_a_value_between_float32_nodes_does_not_round_it():
    text = """g (float[4, 8] x) => (float[8, 4] y) {
        [a_m] a = MatMul (x, w)
        f = Reshape (a, shape)
        y = Softmax <axis = -1> (f) }"""
    typed = Typed(text, layers=("a",), w=draw(8, 8), shape=np.array([8, 4]))
    assert "Cast" not in {node.op_type for node in typed.half.graph.node}


def plain(layer):
    if "time_embedding" in layer.name or layer.name in ("conv_in", "conv_out", "proj_out_1"):
        return FLOAT
    return W8A8_TOKEN if layer.op == "linear" else W8A8_STEP


def four(layer):
    if plain(layer) == FLOAT or layer.k <= 32 or layer.k % 32:
        return plain(layer)
    return w4a8_token(32) if layer.op == "linear" else w4a8_step(32)


@pytest.fixture(scope="module", params=["dit-w8a8", "unet-w8a8", "dit-w4a8", "unet-w4a8"])
def written(request, tmp_path_factory) -> Artifacts:
    model, _, weights = request.param.partition("-")
    made = with_plan(request.getfixturevalue(model), plain if weights == "w8a8" else four)
    made |= {TARGET: load_target("tensorrt-rtx")}
    return made | run_pass(ExportQdq(), made, tmp_path_factory.mktemp("half"))


def nodes_of(graph: Graph) -> list[onnx.NodeProto]:
    return list(onnx.load(graph.path, load_external_data=False).graph.node)


def test_the_engine_multiplies_the_same_integers_and_fuses_attention(written, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    engine = run_pass(BuildTensorRT(), written, tmp_path)[ENGINE]  # raises for sums that overflow
    assert engine.low_precision_products == sum(isinstance(s.input, IntInput) for s in written[PLAN].schemes.values())
    nodes = nodes_of(written[GRAPH])
    weights = [node.output[0] for node in nodes if node.op_type == "Softmax"]
    assert weights
    for name in weights:
        (attention,) = [n.name for n in nodes if n.op_type == "MatMul" and n.input[0] in (name, f"{name}/half")]
        (softmax,) = [n.name for n in nodes if n.output[0] == name]
        assert any(softmax in layer and attention in layer for layer in engine.layers), softmax


def test_no_finding_and_every_value_has_its_type(written):
    assert list(lint(written[GRAPH].path, written[TARGET])) == []
    graph = onnx.shape_inference.infer_shapes(onnx.load(written[GRAPH].path), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            layer = {p.value for p in node.metadata_props if p.key == LAYER_KEY}
            integer = layer <= set(written[GRAPH].nodes) and layer
            assert {types[name] for name in node.input} == {FLOAT32 if integer else HALF}, node.name
    assert written[GRAPH].inputs["step"].dtype == "int64" if "step" in written[GRAPH].inputs else True
    assert {spec.dtype for spec in written[GRAPH].outputs.values()} == {"float32"}


def test_a_jetson_graph_spells_normalizations_out_in_float32(unet, tmp_path):
    made = with_plan(unet, plain) | {TARGET: load_target("tensorrt-10.3-orin")}
    graph = run_pass(ExportQdq(), made, tmp_path)[GRAPH]
    assert list(lint(graph.path, made[TARGET])) == []
    inferred = onnx.shape_inference.infer_shapes(onnx.load(graph.path), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    norms = [node for node in inferred.node if node.op_type == "InstanceNormalization"]
    assert norms
    assert {types[node.input[0]] for node in norms} == {FLOAT32}


def test_a_float_model_takes_two_bytes_a_weight_and_computes_the_same(dit, tmp_path):
    made = with_plan(dit, lambda layer: FLOAT) | {TARGET: load_target("tensorrt-rtx")}
    graph = run_pass(ExportQdq(), made, tmp_path)[GRAPH]
    assert graph.size_bytes < 0.55 * dit[FLOAT_GRAPH].size_bytes  # names and shapes stay
    call = {n: v.numpy().astype(graph.inputs[n].dtype) for n, v in dit[TRAJECTORY].call(1).items()}
    found = ReferenceEvaluator(str(graph.path)).run(None, {name: call[name] for name in graph.inputs})[0]
    assert rel_l2(found, dit[TRAJECTORY].outputs[1].numpy()) < 2**-9  # 2^-11 for each of some ten layers, at random


def test_onnxruntime_keeps_float32(dit, tmp_path):
    made = with_plan(dit, lambda layer: FLOAT) | {TARGET: load_target("onnxruntime-cpu")}
    graph = run_pass(ExportQdq(), made, tmp_path)[GRAPH]
    model = onnx.load(graph.path).graph
    tables = {node.input[0] for node in model.node if node.op_type == "Gather"}  # stored so for any target
    assert HALF not in {tensor.data_type for tensor in model.initializer if tensor.name not in tables}
