"""ONNX's reference evaluator as a runtime: graphs are executed by NumPy, operator by operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from intaglio import (
    ENGINE,
    GRAPH,
    TARGET,
    Ability,
    AnyKey,
    Context,
    Engine,
    Fact,
    Machine,
    Opened,
    Outputs,
    Pass,
    Runtime,
    State,
    TargetError,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from intaglio import Faults, Found, Graph, Lowering, Target


class Reference(Runtime):
    """The evaluator needs no build step and no device; what it computes is what the ONNX standard says."""

    name: ClassVar[str] = "reference"
    steps: ClassVar[tuple[str, ...]] = ("reference",)

    def lowerings(self) -> Iterable[Lowering]:
        """Return rows that dequantize weights in front of a product: nothing here multiplies integers."""
        from intaglio import Lowering
        from intaglio.exporters.qdq.lowering import blocks, per_channel, with_shifts
        from intaglio.pipeline.formats.schemes import W8A8_STEP, W8A8_TOKEN, W8A16, w4a16

        why = "exact, in float on rounded values"
        return with_shifts(
            (
                Lowering("linear", W8A8_TOKEN, per_channel, False, why),
                Lowering("linear", W8A8_STEP, per_channel, False, why),
                Lowering("linear", W8A16, per_channel, False, why),
                Lowering("linear", w4a16(64), blocks, False, why),
                Lowering("conv", W8A8_STEP, per_channel, False, why),
                Lowering("conv", W8A16, per_channel, False, why),
                Lowering("conv", w4a16(64), blocks, False, why),
            )
        )

    def open(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Opened:
        """Open a graph in its folder. The evaluator has neither threads nor providers to choose."""
        import onnx

        return _opened(onnx.load(graph.path))

    def open_model(self, model: bytes, data: Path | None = None) -> Opened:
        """Open a serialized model, with its tensors in `data` read into memory."""
        import onnx

        proto = onnx.load_from_string(model)
        if data is not None:
            onnx.load_external_data_for_model(proto, str(data))
        return _opened(proto)

    def examine(self, packages: Mapping[str, Found], faults: Faults) -> Mapping[str, Fact]:
        """Return the version of onnx, whose part the evaluator is."""
        version = packages["onnx"].version
        return {"reference": Fact(version, f"ONNX's reference evaluator of onnx {version}")}

    def build(self, target: Target, machine: Machine) -> Ability:
        """Say that nothing is to be built."""
        return self.run(target, machine)

    def run(self, target: Target, machine: Machine) -> Ability:
        """Say whether onnx works here."""
        onnx = machine.package("onnx")
        return Ability(onnx.works, "onnx.reference" if onnx.works else onnx.lack)


class CheckReference(Pass):
    """Load the graph in the evaluator. It has no products on integers; the counts are those of the graph as written."""

    name: ClassVar[str] = "reference"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ENGINE})
    needs: ClassVar[tuple[str, ...]] = ("onnx",)

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Run for the runtime of the same name only."""
        return target.runtime == cls.name

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises TargetError for a graph that the evaluator does not load."""
        import onnx

        try:
            Reference().open(state[GRAPH])
        except (RuntimeError, NotImplementedError) as error:
            raise TargetError(f"onnx.reference {onnx.__version__} does not load the graph: {error}") from error
        nodes = onnx.load(state[GRAPH].path, load_external_data=False).graph.node
        products = sum(node.op_type in ("MatMul", "Gemm", "Conv") for node in nodes)
        return {ENGINE: Engine(self.name, onnx.__version__, 0, products)}


def _opened(model: onnx.ModelProto) -> Opened:
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)

    def run(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        outputs = evaluator.run(None, dict(inputs))
        return {name: np.asarray(y) for name, y in zip(evaluator.output_names, outputs, strict=True)}

    return Opened(run, executed_by="onnx.reference", half=True)
