"""Define a runtime: the object that opens graphs in one executor, and says how graphs for it are written.

A runtime is an entry point of the group `intaglio.runtimes`. The folder `targets` beside its module holds the YAML
files of its targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from intaglio.pipeline.runs.machine import Ability, Fact, Faults, Found, Machine, Package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.types import Values

    Run = Callable[[Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]


@dataclass(frozen=True)
class Opened:
    """Graph that is ready to be called."""

    run: Run
    """Takes all inputs by name, returns all outputs by name. Raises what the runtime raises."""
    executed_by: str
    """Executor of the graph: an execution provider, or the runtime's own name."""
    half: bool = False
    """True where float16 is computed in float16."""


class Runtime(ABC):
    """Interface of one runtime. An instance is made without arguments and holds no state."""

    name: ClassVar[str]
    """Name of the entry point; targets refer to the runtime by this name."""
    packages: ClassVar[tuple[Package, ...]] = ()
    """The packages that `doctor` looks for."""
    steps: ClassVar[tuple[str, ...]] = ()
    """Steps that `init` adds to a recipe for its targets, such as the step that builds an engine."""
    device: ClassVar[str] = "cpu"
    """Device of the tensors that the function returned by `load` takes and returns, as torch names it."""
    executes: ClassVar[str] = "model.onnx"
    """The file of a compiled folder that `load` executes."""
    platform: ClassVar[str | None] = None
    """Platform in the configuration of Triton Inference Server; None if Triton does not serve this file."""

    @property
    def runs_graph(self) -> bool:
        """True if the runtime executes the graph itself, and no engine that is built of it."""
        return self.executes == Runtime.executes

    @abstractmethod
    def lowerings(self) -> Iterable[object]:
        """Return the rows of the runtime's table: one `Lowering` for each kind of layer and scheme.

        A row names the function that writes the product of this scheme in ONNX.
        """

    @abstractmethod
    def open(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Opened:
        """Open a graph in its folder, on the CPU or one of `providers`; `verify` and `benchmark` call this.

        threads: 0 for one on each core; runtimes without this setting ignore it. Raises RecipeError for damaged files.
        """

    @abstractmethod
    def open_model(self, model: bytes, data: Path | None = None) -> Opened:
        """Open a serialized model; `data` is the folder of its external tensors. `verify` opens single layers with it.

        Raises what the runtime raises.
        """

    def load(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Values | None:
        """Return the function for `intaglio.load` that computes a compiled folder, or None to use `open`.

        Raises RecipeError if the folder holds nothing that the runtime executes, TargetError if it cannot run here.
        """
        return None

    def here(self, target: Target) -> Target:
        """Return a target of the runtime with the facts that depend on the CPU, as they are on this machine."""
        return target

    def prepare(self) -> None:
        """Do the work that is needed once in a process, so that it is not measured when a graph is opened."""
        return

    def usual_targets(self) -> tuple[str, ...]:
        """Return the targets of a first recipe on this machine if the user names none."""
        return ()

    def examine(self, packages: Mapping[str, Found], faults: Faults) -> Mapping[str, Fact]:
        """Return the facts that `doctor` shows besides the versions of `packages`, which are keyed by module."""
        return {}

    @abstractmethod
    def build(self, target: Target, machine: Machine) -> Ability:
        """Return whether this machine can build for the target, and the reason."""

    @abstractmethod
    def run(self, target: Target, machine: Machine) -> Ability:
        """Return whether this machine can run what was built for the target, and the reason."""

    def verify(self, machine: Machine) -> Ability:
        """Return whether `open` works on this machine, if everything that compiling needs is installed."""
        lacks = "; ".join(sorted({found.lack for p in self.packages if not (found := machine.package(p.module)).works}))
        return Ability(not lacks, lacks or "yes, on the CPU")

    def latency_command(self, shapes: str) -> str | None:
        """Return the command, run in the compiled folder, that times a call on a GPU; `shapes` in trtexec's syntax."""
        return None
