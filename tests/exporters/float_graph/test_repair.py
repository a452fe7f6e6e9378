"""A bias behind a Reshape of its product is added before it."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from intaglio.exporters.float_graph.repair import repair

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
toy (float[6, 2] x) => (float[2, 3, 3] z)
<float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 0, -1}, int64[3] shape = {2, 3, 3}>
{
    y = MatMul (x, w)
    r = Reshape (y, shape)
    a = Add (r, b)
    z = Relu (a)
}
"""


@pytest.mark.parametrize(("scopes", "moved"), [(("layer", "layer"), True), (("layer", "other"), False)])
def test_the_bias_of_a_layer_is_added_to_its_product(scopes, moved):
    made = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT))
    x = np.arange(12, dtype=np.float32).reshape(6, 2) - 6
    (expected,) = ReferenceEvaluator(made).run(None, {"x": x})
    model = ir.from_proto(made)
    for op, scope in zip(("MatMul", "Add"), scopes, strict=True):
        (node,) = (node for node in model.graph if node.op_type == op)
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scope
    repair(model.graph)
    order = ["MatMul", "Add", "Reshape", "Relu"] if moved else ["MatMul", "Reshape", "Add", "Relu"]
    assert [node.op_type for node in model.graph] == order
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(found, expected)
