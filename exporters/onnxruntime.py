"""Load the graph in ONNX Runtime and read back what it executes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.graph import Engine
from intaglio.pipeline.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.pass_base import Pass

if TYPE_CHECKING:
    from intaglio.pipeline.target import Target

INTEGER_PRODUCTS = frozenset(
    {
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "QGemm",
        "QLinearMatMul",
        "QLinearConv",
        "ConvInteger",
    }
)
FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "MatMulNBits"})


class BuildOnnxRuntime(Pass):
    """The counts are those of the graph after the runtime's own optimizations: what runs, not what was asked for."""

    name: ClassVar[str] = "onnxruntime"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ENGINE})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime-gpu")

    @classmethod
    def applies(cls, target: Target) -> bool:
        """For ONNX Runtime alone."""
        return target.runtime == "onnxruntime"

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises TargetError for a graph that ONNX Runtime refuses."""
        import onnx
        import onnxruntime

        from intaglio.exporters._session import open_session

        optimized = ctx.scratch / "optimized.onnx"
        try:
            open_session(state[GRAPH].path, optimized=optimized)
        except Exception as e:  # its errors have no common class
            raise TargetError(f"ONNX Runtime {onnxruntime.__version__} does not load the graph: {e}") from e
        nodes = onnx.load(optimized, load_external_data=False).graph.node
        integer = sum(node.op_type in INTEGER_PRODUCTS for node in nodes)
        floating = sum(node.op_type in FLOAT_PRODUCTS for node in nodes)
        ctx.log.info("%d matrix products on integers, %d in floating point", integer, floating)
        layers = tuple(f"{node.domain or 'ai.onnx'}.{node.op_type} {node.name}" for node in nodes)
        return {ENGINE: Engine("onnxruntime", onnxruntime.__version__, integer, floating, layers=layers)}
