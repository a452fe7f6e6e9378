"""Build an engine of every graph around the denoiser, as `tensorrt` does for the denoiser."""

import shutil
from typing import ClassVar

from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.pipeline.artifacts.components import ComponentEngines
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import COMPONENT_ENGINES, COMPONENTS, TARGET
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.formats.target import load_target


class BuildComponents(BuildTensorRT):
    """Build an engine for each component, with the options of `tensorrt`. Components for ONNX Runtime need none."""

    name: ClassVar[str] = "components-tensorrt"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({COMPONENTS, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({COMPONENT_ENGINES})

    def run(self, state: State, ctx: Context) -> Outputs:
        """Build the engines. Raises TargetError for every node that the runtime refuses or would compute wrongly."""
        components, written = state[COMPONENTS], ctx.scratch / "engines"
        shutil.rmtree(written, ignore_errors=True)
        compiled, problems = components.compiled, list[str]()
        targets = {name: load_target(one.target) for name, one in compiled.items()}
        methods = [(name, m) for name, one in compiled.items() if self.applies(targets[name]) for m in one.returns]
        with ctx.progress("engines", len(methods)) as advance:
            for name, method in methods:
                place = written / name / method
                place.mkdir(parents=True)
                try:
                    self.engine(Graph.load(components.root / name / method), targets[name], ctx).save(place)
                except TargetError as error:
                    problems += [f"{name}.{method}: {problem}" for problem in error.problems]
                advance()
        if problems:
            raise TargetError(*problems)
        return {COMPONENT_ENGINES: ComponentEngines(written)}
