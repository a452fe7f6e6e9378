"""Define the runtime ONNX Runtime: what is installed, how it opens a graph, and the rows of its table."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import read_bytes
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.runs.machine import Ability, Fact, Faults, Found, Machine, Package
from intaglio.pipeline.runs.runtime import Opened, Runtime

if TYPE_CHECKING:
    import onnxruntime

    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.formats.target import Target

CPU = "CPUExecutionProvider"
CPU_TARGET = "onnxruntime-cpu"
PACKAGE = Package(
    ("onnxruntime-gpu", "onnxruntime"),
    "onnxruntime",
    "running and verifying graphs",
    "pip install intaglio",
    compiles=True,
    light=True,
)
_NOTHING = '<ir_version: 10, opset_import: ["": 21]> graph (float[1] x) => (float[1] y) { y = Identity (x) }'


@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime with settings under which it computes exactly what was simulated.

    Without `optimize` it executes graphs as they are written: so the graphs of other runtimes are checked here.
    """

    optimize: bool = True

    name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[Package, ...]] = (PACKAGE,)
    steps: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    platform: ClassVar[str | None] = "onnxruntime_onnx"

    def lowerings(self) -> Iterable[object]:
        """Return the rows of its table."""
        from intaglio.exporters.runtimes.onnxruntime.lowerings import LOWERINGS

        return LOWERINGS

    def open(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Opened:
        """Open a graph in a session. Raises RecipeError for a file that ONNX Runtime does not load."""
        model = with_kernels(graph.path) if self.optimize else None
        return self.open_as(graph, model, threads=threads, providers=providers)

    def open_as(self, graph: Graph, model: bytes | None, *, threads: int, providers: Sequence[str]) -> Opened:
        """Open a graph as `open` does; `model` is the same graph in other operators, serialized, or None."""
        from intaglio.exporters.runtimes.onnxruntime.session import graph_session

        made = graph_session(graph, optimize=self.optimize, threads=threads, providers=providers, model=model)
        return _opened(made)

    def open_model(self, model: bytes, data: Path | None = None) -> Opened:
        """Open a serialized model in a session on the CPU. Raises what ONNX Runtime raises."""
        from intaglio.exporters.runtimes.onnxruntime.session import open_session

        return _opened(open_session(model, optimize=self.optimize, data=data))

    def here(self, target: Target) -> Target:
        """Return the CPU's target with the largest code that its own kernels multiply exactly."""
        from intaglio.exporters.runtimes.onnxruntime.session import SMALL_CODE, exact_kernels

        if target.fast_code is not None:
            return target
        fast = exact_kernels() == exact_kernels(SMALL_CODE)
        return target.model_copy(update={"fast_code": 127 if fast else SMALL_CODE})

    def prepare(self) -> None:
        """Find the kernels that are exact on this CPU, in sessions of its own."""
        from intaglio.exporters.runtimes.onnxruntime.session import SMALL_CODE, exact_kernels

        exact_kernels(), exact_kernels(SMALL_CODE)

    def usual_targets(self) -> tuple[str, ...]:
        """Return the CPU's target: it runs on every machine."""
        return (CPU_TARGET,)

    def examine(self, packages: Mapping[str, Found], faults: Faults) -> Mapping[str, Fact]:
        """Return which execution providers run here, and the first kernels that are exact on this CPU."""
        works = packages[PACKAGE.module].works and packages["onnx"].works
        providers = (faults.ask("providers", _providers) if works else None) or {}
        kernels = faults.ask("kernels", _kernels) if works else None
        said = ", ".join(name + " does not run" * (not runs) for name, runs in providers.items())
        return {"providers": Fact(providers, said or "-"), "kernels": Fact(kernels, kernels or "-")}

    def build(self, target: Target, machine: Machine) -> Ability:
        """Say whether the target's execution provider loads a graph here."""
        providers = machine.facts["providers"].value
        runs = isinstance(providers, Mapping) and bool(providers.get(target.provider))
        return Ability(runs, target.provider if runs else f"{target.provider} does not run here")

    def run(self, target: Target, machine: Machine) -> Ability:
        """Return what `build` returns: a graph that can be loaded can be run."""
        return self.build(target, machine)

    def verify(self, machine: Machine) -> Ability:
        """Say whether some kernels are exact on this CPU."""
        fault = machine.faults.get("kernels", "")
        return Ability(not fault, fault or "yes, on the CPU")

    def latency_command(self, shapes: str) -> str:
        """Return where the command that times a call on a GPU is found, in words."""
        return "trtexec, in the folder of a target of TensorRT: `intaglio bench` there gives the whole command"


def with_kernels(path: Path) -> bytes | None:
    """Return a graph in operators that have kernels; None if it is in such operators, or cannot be read.

    The export in float serves all runtimes, so it has operators that this one executes as many small ones.
    """
    import onnx_ir as ir

    from intaglio.exporters.float_graph.onnx_file import MOST_BYTES, read_model
    from intaglio.exporters.qdq.group_norm import spell_out_group_norm

    try:
        if b"GroupNormalization" not in read_bytes(path, most=MOST_BYTES):
            return None
        model = read_model(path)
    except RecipeError:  # opening the file says what is wrong with the folder
        return None
    spell_out_group_norm(model.graph, load_target(CPU_TARGET))
    found: bytes = ir.to_proto(model).SerializeToString()
    return found


def _opened(session: onnxruntime.InferenceSession) -> Opened:
    names = [output.name for output in session.get_outputs()]
    provider = session.get_providers()[0]
    return Opened(
        lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True)), provider, half=provider != CPU
    )


def _providers() -> dict[str, bool]:
    """Return whether each provider of a target runs here.

    This is tried with a session, which silently uses the CPU's provider if another one cannot start.
    """
    import onnx
    import onnxruntime

    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    targets = [load_target(name) for name in target_names()]
    names = {target.provider for target in targets if target.runtime == OnnxRuntime.name}
    model = onnx.parser.parse_model(_NOTHING).SerializeToString()
    onnxruntime.set_default_logger_severity(4)
    try:
        with redirect_stdout(io.StringIO()):
            return {name: name in open_session(model, providers=[name]).get_providers() for name in sorted(names)}
    finally:
        onnxruntime.set_default_logger_severity(2)


def _kernels() -> str:
    from intaglio.exporters.runtimes.onnxruntime.session import exact_kernels

    settings = exact_kernels()
    return next(k.name for k in load_target(CPU_TARGET).kernels if k.settings == settings)
