"""Find the nodes of each layer of the model in an ONNX graph, by the layer's name in their metadata.

Shapes: N out features, K in features, C input channels, kh kw kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

LAYER_KEY = "intaglio.layer"
"""Key of a node's metadata that names its layer."""
BASIS = "balance"
"""Part of node names for what brings the input of a layer into its basis."""
BRANCH = "branch"
"""Part of the names of the nodes that compute a layer's branch in float."""
INPUT_CODES = ("/input/QuantizeLinear", "/input/TRT_FP4DynamicQuantize")
"""Ends of the names of nodes that make the codes of a layer's input."""


@dataclass(frozen=True)
class Site:
    """Call of a layer in a float graph: a product with a constant weight, and a separate bias addition if any."""

    layer: str
    product: ir.Node
    add: ir.Node | None

    @property
    def x(self) -> ir.Value:
        """Input of the layer."""
        return _given(self.product.inputs[0])

    @property
    def y(self) -> ir.Value:
        """Output of the layer."""
        return (self.add or self.product).outputs[0]

    @property
    def bias(self) -> ir.Value | None:
        """Constant bias (N,), if any."""
        if self.add is not None:
            return next(_given(v) for v in self.add.inputs if v is not self.product.outputs[0])
        return self.product.inputs[2] if len(self.product.inputs) > 2 else None

    def weight(self) -> NDArray[np.float32]:
        """Return the weight in torch's layout: (N, K), or (N, C, kh, kw)."""
        w: NDArray[np.float32] = self._constant.numpy()
        return w.T if self._transposed else w

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`, which is not read for it."""
        shape: tuple[int, ...] = tuple(self._constant.shape.numpy())
        return shape[::-1] if self._transposed else shape

    @property
    def _constant(self) -> ir.TensorProtocol:
        constant = _given(self.product.inputs[1]).const_value
        assert constant is not None  # `find_sites` checked it
        return constant

    @property
    def _transposed(self) -> bool:
        """True if the graph has the weight as (K, N)."""
        return self.product.op_type == "MatMul" or (
            self.product.op_type == "Gemm" and not self.product.attributes.get_int("transB", 0)
        )


def find_sites(nodes: Iterable[ir.Node]) -> dict[str, list[Site]]:
    """Return every call of every layer, in the order of the nodes, by the names in their metadata."""
    sites: dict[str, list[Site]] = {}
    for node in nodes:
        layer = node.metadata_props.get(LAYER_KEY)
        if layer is None or node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        adds = [user for user in users if user.op_type == "Add" and user.metadata_props.get(LAYER_KEY) == layer]
        sites.setdefault(layer, []).append(Site(layer, node, adds[0] if len(users) == len(adds) == 1 else None))
    return sites


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None  # ONNX requires this input of a MatMul, Gemm, Conv or Add
    return value
