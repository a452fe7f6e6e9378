"""Define the runtimes TensorRT and TensorRT-RTX. Their graphs are checked here in ONNX Runtime, as they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.pipeline.runs.machine import Ability, Fact, Faults, Found, Machine, Package
from intaglio.pipeline.runs.runtime import Opened, Runtime

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.types import Values

AS_WRITTEN = OnnxRuntime(optimize=False)


class TensorRT(Runtime):
    """TensorRT builds an engine on the GPU that is to run it."""

    name: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt"
    """The extra of intaglio that installs it."""
    packages: ClassVar[tuple[Package, ...]] = (
        Package(
            ("tensorrt-cu12", "tensorrt"),
            "tensorrt",
            "engines of TensorRT",
            "pip install 'intaglio[tensorrt]'",
            light=True,
        ),
    )
    steps: ClassVar[tuple[str, ...]] = ("tensorrt",)
    device: ClassVar[str] = "cuda"
    executes: ClassVar[str] = "engine.plan"
    platform: ClassVar[str | None] = "tensorrt_plan"
    ahead: ClassVar[bool] = False
    """True where engines are built ahead of time, without a GPU."""

    def lowerings(self) -> Iterable[object]:
        """Return the rows that both runtimes share."""
        from intaglio.exporters.runtimes.tensorrt.lowerings import LOWERINGS

        return LOWERINGS

    def open(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Opened:
        """Open a graph in ONNX Runtime, which executes it as it is written, except that NVFP4 is spelled out."""
        from intaglio.exporters.float_graph.onnx_file import read_proto
        from intaglio.exporters.runtimes.tensorrt.reference import spell_out

        model = read_proto(graph.path)
        spelled = model.SerializeToString() if spell_out(model, graph.path.parent) else None
        return AS_WRITTEN.open_as(graph, spelled, threads=threads, providers=providers)

    def open_model(self, model: bytes, data: Path | None = None) -> Opened:
        """Open a serialized model in ONNX Runtime, as `open` does with a graph."""
        import onnx

        from intaglio.exporters.runtimes.tensorrt.reference import spell_out

        read = onnx.load_from_string(model)
        return AS_WRITTEN.open_model(read.SerializeToString() if spell_out(read, data) else model, data)

    def prepare(self) -> None:
        """Prepare ONNX Runtime."""
        AS_WRITTEN.prepare()

    def load(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Values:
        """Return the function that runs engine.plan on torch's current GPU. Raises as `Runtime.load` does."""
        from intaglio.exporters.runtimes.tensorrt.engine import engine_call

        return engine_call(graph, self.name, self.packages[0].module, self.extra)

    def examine(self, packages: Mapping[str, Found], faults: Faults) -> Mapping[str, Fact]:
        """Return where trtexec is."""
        path = shutil.which("trtexec")
        return {"trtexec": Fact(path, path or "not on PATH")}

    def build(self, target: Target, machine: Machine) -> Ability:
        """Return whether the builder is installed, and whether this machine has a GPU of the target if it needs one."""
        found = machine.package(self.packages[0].module)
        if not self._fitting(target, machine):
            return (
                self._builder(found)
                if self.ahead
                else Ability(False, "build it on the device: `intaglio kit` packs what it needs")
            )
        if self._by_trtexec(found, machine):
            return Ability(True, "trtexec, by intaglio kit")
        return self._builder(found)

    def run(self, target: Target, machine: Machine) -> Ability:
        """Say whether an engine runs on a GPU that is here."""
        found, fitting = machine.package(self.packages[0].module), self._fitting(target, machine)
        if not fitting:
            return Ability(False, "needs a GPU" if self.ahead else "on the device")
        return Ability(True, fitting[0]) if found.works else self._builder(found)

    def verify(self, machine: Machine) -> Ability:
        """Say whether ONNX Runtime checks graphs here."""
        return AS_WRITTEN.verify(machine)

    def latency_command(self, shapes: str) -> str:
        """Return the command of trtexec."""
        return f"trtexec --onnx=model.onnx --stronglyTyped --shapes={shapes} --exportProfile=times.json"

    def _builder(self, found: Found) -> Ability:
        return Ability(found.works, f"{found.module} {found.version}" if found.works else found.lack)

    def _by_trtexec(self, found: Found, machine: Machine) -> bool:
        return not found.works and machine.facts["trtexec"].value is not None and not self.ahead

    def _fitting(self, target: Target, machine: Machine) -> list[str]:
        """Return the names of GPUs that run engines of the target."""
        listed = {device.compute_capability for device in target.devices}
        return [gpu.name for gpu in machine.gpus if self.ahead or gpu.compute_capability in listed]


class TensorRTRTX(TensorRT):
    """TensorRT-RTX builds an engine without a GPU, for several kinds of GPUs."""

    name: ClassVar[str] = "tensorrt-rtx"
    extra: ClassVar[str] = "rtx"
    packages: ClassVar[tuple[Package, ...]] = (
        Package(
            ("tensorrt-rtx-cu12",),
            "tensorrt_rtx",
            "engines of TensorRT-RTX",
            "pip install 'intaglio[rtx]'",
            light=True,
        ),
    )
    platform: ClassVar[str | None] = None
    ahead: ClassVar[bool] = True

    def usual_targets(self) -> tuple[str, ...]:
        """Return its target where it is installed."""
        return ("tensorrt-rtx",) if find_spec("tensorrt_rtx") else ()

    def latency_command(self, shapes: str) -> str:
        """Return the command of its own tool."""
        return f"tensorrt_rtx --loadEngine=engine.plan --shapes={shapes}"


MODULES: Mapping[str, tuple[str, str]] = {
    each.name: (each.packages[0].module, each.extra) for each in (TensorRT, TensorRTRTX)
}
"""Module and installing extra of each runtime."""
