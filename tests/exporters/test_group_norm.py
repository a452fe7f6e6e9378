import numpy as np
import onnx
import onnx_ir as ir
import pytest

from intaglio.exporters._group_norm import spell_out_group_norm
from intaglio.exporters._session import open_session


@pytest.mark.parametrize("shape", ["2,8,4,4", "2,8,5"])
def test_older_operators_compute_the_same(shape):
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[{shape}] x, float[8] s, float[8] b) => (float[{shape}] y) {{
      [norm] h = GroupNormalization <num_groups = 4, epsilon = 0.01> (x, s, b)
      y = Abs (h)
    }}"""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    feed = {v.name: rng.standard_normal([int(d) for d in v.shape]).astype(np.float32) * 3 for v in model.graph.inputs}
    before = open_session(ir.to_proto(model).SerializeToString()).run(None, feed)[0]
    spell_out_group_norm(model.graph)
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    after = open_session(proto.SerializeToString()).run(None, feed)[0]
    assert np.allclose(before, after, atol=1e-5)  # float32 moments of some ten values
