"""Load the graph in ONNX Runtime and read back what it executes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.pipeline.artifacts.graph import Engine
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import TargetError

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target

FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "MatMulNBits"})


class BuildOnnxRuntime(Pass):
    """Load the graph and count its products after the runtime's own optimizations, as they will run.

    If the target's execution provider is not on this machine, the graph is loaded on the CPU and nothing is counted.
    """

    name: ClassVar[str] = "onnxruntime"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ENGINE})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime-gpu")

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Return True for targets of ONNX Runtime."""
        return target.runtime == OnnxRuntime.name

    def run(self, state: State, ctx: Context) -> Outputs:
        """Load and count. Raises TargetError for a graph that ONNX Runtime refuses."""
        import onnx
        import onnxruntime

        from intaglio.exporters.runtimes.onnxruntime.codes import INTEGER_PRODUCTS
        from intaglio.exporters.runtimes.onnxruntime.session import open_session

        optimized, provider = ctx.scratch / "optimized.onnx", state[TARGET].provider
        try:
            session = open_session(state[GRAPH].path, providers=[provider], optimized=optimized)
        except Exception as e:  # its errors have no common class
            raise TargetError(f"ONNX Runtime {onnxruntime.__version__} does not load the graph: {e}") from e
        if provider not in session.get_providers():
            ctx.log.info("%s is not here: what it executes is not known", provider)
            return {ENGINE: Engine(OnnxRuntime.name, onnxruntime.__version__, None, None)}
        nodes = onnx.load(optimized, load_external_data=False).graph.node
        integer = sum(node.op_type in INTEGER_PRODUCTS for node in nodes)
        floating = sum(node.op_type in FLOAT_PRODUCTS for node in nodes)
        ctx.log.info("%d matrix products on integers, %d in floating point", integer, floating)
        layers = tuple(f"{node.domain or 'ai.onnx'}.{node.op_type} {node.name}" for node in nodes)
        return {ENGINE: Engine(OnnxRuntime.name, onnxruntime.__version__, integer, floating, layers=layers)}
