"""Channel scales folded into what precedes them: how far they go, that no value changes by it, and where they stay."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from intaglio.exporters.qdq.folding import ChannelScale, fold_scales
from intaglio.pipeline.artifacts.graph import ScaledBy

D = np.array([2, -0.5, 4, 1.5, -3, 0.25, 1.25, 8], np.float32)
RANDOM = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "one": np.float32(1),
    "g": values(8),
    "h": values(8),
    "w": values(8, 8),
    "wide": values(8, 16),
    "narrow": values(8, 4),
    "codes": RANDOM.integers(-127, 128, (8, 8)).astype(np.int8),
    "s": np.abs(values(8)),
    "zeros": np.zeros(8, np.int8),
    "groups": np.abs(values(2, 8)),
    "heads": np.array([0, 0, 2, 4]),
    "merged": np.array([0, 0, 8]),
    "last": np.array([-1]),
}
MODULATED = "float[2,4,8] z, float[2,1,8] a, float[2,1,8] b"
ATTENTION = """
    k = MatMul (z, w) v = Reshape (k, heads) t = Transpose <perm = [0, 2, 1, 3]> (v)
    o = MatMul (q, t) u = Transpose <perm = [0, 2, 1, 3]> (o) x = Reshape (u, merged)
"""
GATED = "p = MatMul (z, wide) u, v = Split <axis = -1, num_outputs = 2> (p)"
TWO = "i = LayerNormalization (z, g, h) j = LayerNormalization (a, g, h)"


class Folded:
    """A graph that ends in tanh(x * D), as it was and with the scale folded."""

    def __init__(self, nodes: str, *ends: str, inputs: str = "float[2,4,8] z") -> None:
        image = inputs == "float[2,8,2,2] z"
        of = "float[2,8,2,2]" if image else "float[2,4,8]"
        text = f"{nodes} [in_front] scaled = Mul (x, d) y = Tanh (scaled)"
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({of} y) <{of} x> {{{text}}}'
        )
        d = D.reshape(1, 8, 1, 1) if image else D
        constants = CONSTANTS | {"d": d}
        model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
        self.before = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        after = ir.from_proto(self.before)
        product = next(node.outputs[0] for node in after.graph if node.name == "in_front")
        self.scaled, self.factors = fold_scales(after.graph, [ChannelScale("layer", product, d)], ends)
        self.after = ir.to_proto(after)
        onnx.checker.check_model(self.after, full_check=True)

    @property
    def is_folded(self) -> bool:
        return not any(node.name == "in_front" for node in self.after.graph.node)

    @property
    def factors_of(self) -> list[str]:
        """Values that folding made the input of a new multiplication."""
        old = {node.name for node in self.before.graph.node}
        return [node.input[0] for node in self.after.graph.node if node.op_type == "Mul" and node.name not in old]

    def error(self) -> float:
        """Relative L2 distance of what both compute."""
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in self.before.graph.input}
        feed = {name: values(*shape) for name, shape in shapes.items()}
        before, after = (ReferenceEvaluator(model).run(None, feed)[0] for model in (self.before, self.after))
        return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        ("x = LayerNormalization (z, g, h)", "float[2,4,8] z"),
        ("x = LayerNormalization (z, g)", "float[2,4,8] z"),
        ("x = GroupNormalization <num_groups = 2> (z, g, h)", "float[2,8,2,2] z"),
        ("n = LayerNormalization (z, g) m = Add (a, one) p = Mul (m, n) x = Sub (p, h)", MODULATED),
        ("p = MatMul (z, w) x = Add (p, h)", "float[2,4,8] z"),
        ("v = DequantizeLinear <axis = 1> (codes, s, zeros) x = MatMul (z, v)", "float[2,4,8] z"),
        ("v = DequantizeLinear <axis = 0, block_size = 4> (codes, groups) x = MatMul (z, v)", "float[2,4,8] z"),
        ("v = DequantizeLinear (codes, one) p = MatMul (z, v) x = Mul (p, s)", "float[2,4,8] z"),
        ("r = ReduceMax (z, last) p = MatMul (z, w) x = Mul (r, p)", "float[2,4,8] z"),
        ("r = ReduceMax (z, last) p = MatMul (z, w) x = Div (p, r)", "float[2,4,8] z"),
        (ATTENTION, "float[2,4,8] z, float[2,2,4,4] q"),
        (f"{GATED} e = Tanh (v) x = Mul (e, u)", "float[2,4,8] z"),
        (f"{TWO} x = Concat <axis = 1> (i, j)", "float[2,2,8] z, float[2,2,8] a"),
        (
            "i = MatMul (z, narrow) j = MatMul (a, narrow) x = Concat <axis = -1> (i, j)",
            "float[2,4,8] z, float[2,4,8] a",
        ),
    ],
)
def test_it_goes_into_constants(nodes, inputs):
    graph = Folded(nodes, inputs=inputs)
    assert graph.is_folded
    assert graph.factors_of == []
    assert graph.error() < 1e-6


@pytest.mark.parametrize(
    ("nodes", "inputs", "factors"),
    [
        ("n = LayerNormalization (z, g) m = Add (a, one) p = Mul (n, m) x = Add (p, b)", MODULATED, ["b"]),
        ("p = Mul (z, a) x = Add (p, b)", MODULATED, ["a", "b"]),
        ("p = Mul (z, a) x = Add (p, h)", MODULATED, ["a"]),
    ],
)
def test_what_all_tokens_share_is_multiplied_instead_of_them(nodes, inputs, factors):
    graph = Folded(nodes, inputs=inputs)
    assert graph.is_folded
    assert graph.factors_of == factors
    assert graph.error() < 1e-6


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        ("x = Identity (z)", "float[2,4,8] z"),
        ("p = MatMul (z, w) x = Gelu (p)", "float[2,4,8] z"),
        ("p = MatMul (z, w) e = Sigmoid (p) x = Mul (p, e)", "float[2,4,8] z"),
        ("p = MatMul (z, w) x = Mul (p, p)", "float[2,4,8] z"),
        ("p = MatMul (z, w) x = Add (p, z)", "float[2,4,8] z"),
        ("r = ReduceMax (z, last) p = MatMul (z, w) x = Div (r, p)", "float[2,4,8] z"),
        ("x = LayerNormalization (z, g, h) other = Tanh (x)", "float[2,4,8] z"),
        ("v = DequantizeLinear <axis = 0> (codes, s, zeros) x = MatMul (z, v)", "float[2,4,8] z"),
        ("v = DequantizeLinear (codes, one) x = MatMul (z, v)", "float[2,4,8] z"),
        ("v = DequantizeLinear <axis = 1> (codes, s, zeros) x = MatMul (z, v) o = MatMul (z, v)", "float[2,4,8] z"),
        (f"{GATED} e = Tanh (v) x = Mul (e, u) other = Tanh (p)", "float[2,4,8] z"),
        (f"{TWO} x = Concat <axis = 1> (i, j) other = Tanh (j)", "float[2,2,8] z, float[2,2,8] a"),
        ("p = Mul (z, a) r = Relu (p) x = Add (r, b)", MODULATED),
    ],
)
def test_it_stays_where_others_read_it_or_nothing_takes_it(nodes, inputs):
    graph = Folded(nodes, inputs=inputs)
    assert not graph.is_folded
    assert graph.after.graph == ir.to_proto(ir.from_proto(graph.before)).graph
    assert (graph.scaled, graph.factors) == ({}, {})


@pytest.mark.parametrize(
    ("nodes", "end", "start"),
    [
        ("p = MatMul (z, w) x = Add (p, h)", "x", 0),
        (ATTENTION, "k", 0),
        (f"{GATED} e = Tanh (v) x = Mul (e, u)", "p", 0),
        (f"{GATED} e = Tanh (u) x = Mul (e, v)", "p", 8),
    ],
)
def test_the_ends_of_layers_that_it_went_through_are_named(nodes, end, start):
    graph = Folded(
        nodes, end, "z", inputs="float[2,4,8] z, float[2,2,4,4] q" if nodes == ATTENTION else "float[2,4,8] z"
    )
    assert graph.scaled == {end: ScaledBy("layer", start)}
    assert graph.factors[end] == 8
    assert "z" not in graph.factors


def test_an_end_whose_channels_are_in_another_order_is_left_alone():
    swapped = ATTENTION.replace(
        "u = Transpose <perm = [0, 2, 1, 3]> (o) x", "u = Transpose <perm = [0, 2, 3, 1]> (o) x"
    )
    inputs = "float[2,4,8] z, float[2,2,4,4] q"
    assert Folded(swapped, inputs=inputs).is_folded
    assert Folded(swapped, inputs=inputs).error() < 1e-6
    assert not Folded(swapped, "k", inputs=inputs).is_folded
