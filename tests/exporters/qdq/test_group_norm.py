import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tensorrt_layers import axes_of, layers, parse

from intaglio.exporters.qdq.group_norm import spell_out_group_norm
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.pipeline.formats.target import load_target

OLD, RTX, CPU = load_target("tensorrt-10.3-orin"), load_target("tensorrt-rtx"), load_target("onnxruntime-cpu")
TWO = ["InstanceNormalization", "BatchNormalization"]


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("shape", ["2,8,4,4", "2,8,5"])
@pytest.mark.parametrize("target", [OLD, CPU], ids=["unknown", "without a kernel"])
def test_older_operators_compute_the_same(target, shape, groups):
    model = normalization(shape, groups)
    rng = np.random.default_rng(0)
    feed = {v.name: rng.standard_normal([int(d) for d in v.shape]).astype(np.float32) * 3 for v in model.graph.inputs}
    before = open_session(ir.to_proto(model).SerializeToString()).run(None, feed)[0]
    spell_out_group_norm(model.graph, target)
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    after = open_session(proto.SerializeToString()).run(None, feed)[0]
    assert np.allclose(before, after, atol=1e-5)  # float32 moments of some ten values


def normalization(shape, groups):
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[{shape}] x, float[8] s, float[8] b) => (float[{shape}] y) {{
      [norm] h = GroupNormalization <num_groups = {groups}, epsilon = 0.01> (x, s, b)
      y = Abs (h)
    }}"""
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    ("target", "groups", "kept"),
    [("tensorrt-rtx", 1, False), ("tensorrt-10", 1, False), ("tensorrt-rtx", 4, True), ("onnxruntime-cpu", 4, False)],
)
def test_it_is_spelled_out_where_the_runtime_misreads_one_group_or_has_no_kernel(target, groups, kept):
    model = normalization("2,8,4,4", groups)
    spell_out_group_norm(model.graph, load_target(target))
    assert ("GroupNormalization" in {node.op_type for node in model.graph}) == kept


@pytest.mark.parametrize(("groups", "operators"), [(8, ["InstanceNormalization"]), (4, TWO), (1, TWO)])
def test_a_target_without_a_kernel_scales_and_adds_in_one_pass(groups, operators):
    model = normalization("2,8,4,4", groups)
    spell_out_group_norm(model.graph, CPU)
    moved = ("Reshape", "Shape")
    assert [node.op_type for node in model.graph if node.op_type not in moved] == [*operators, "Abs"]


def test_onnx_runtime_has_no_kernel_of_it(tmp_path):
    """The reason for `expanded` of its target: if this fails, the operator may stay as it is."""
    executed = tmp_path / "executed.onnx"
    open_session(ir.to_proto(normalization("2,8,4,4", 4)).SerializeToString(), optimized=executed)
    operators = [node.op_type for node in onnx.load(executed).graph.node]
    assert "GroupNormalization" not in operators
    assert len(operators) > 10


def test_tensorrt_rtx_normalizes_the_group_as_a_whole():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = normalization("2,8,4,4", 1)
    spell_out_group_norm(model.graph, RTX)
    network, errors, _alive = parse(trt, ir.to_proto(model).SerializeToString())
    assert not errors
    (found,) = [layer for kind, layer in layers(trt, network) if kind == "NORMALIZATION"]
    assert (tuple(found.get_input(0).shape), axes_of(found.axes, 3)) == ((2, 1, 128), (2,))
    assert found.epsilon == pytest.approx(0.01)
