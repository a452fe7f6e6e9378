"""A runtime: the one object that knows what executes a graph, found through the group `intaglio.runtimes`.

Its entry point is in a package with a folder `targets` beside it, which holds the YAML files of its targets.
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
    """A graph that is ready to be called."""

    run: Run
    """Takes all inputs by name, returns all outputs by name. Raises what the runtime raises."""
    executed_by: str
    """Executor of the graph: an execution provider, or the runtime's own name."""
    half: bool = False
    """True where float16 is computed in float16."""


class Runtime(ABC):
    """Everything that intaglio asks about one runtime. An instance is made without arguments and holds no state."""

    name: ClassVar[str]
    """The name of its entry point, by which targets name it."""
    packages: ClassVar[tuple[Package, ...]] = ()
    """The packages that `doctor` looks for."""
    steps: ClassVar[tuple[str, ...]] = ()
    """Steps that the first recipe has for its targets, such as the one that builds an engine."""
    device: ClassVar[str] = "cpu"
    """Device of the tensors that the function returned by `load` takes and returns, as torch names it."""
    executes: ClassVar[str] = "model.onnx"
    """The file of a compiled folder that `load` executes."""
    platform: ClassVar[str | None] = None
    """The platform by which Triton Inference Server serves that file; None: it does not."""

    @abstractmethod
    def lowerings(self) -> Iterable[object]:
        """Return the rows of its table, each a `Lowering`: how schemes are written in ONNX for it."""

    @abstractmethod
    def open(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Opened:
        """Open a graph in its folder here, on the CPU or one of `providers`; `verify` and `benchmark` call it.

        threads: 0 for one for each core; what has no threads to set ignores it. Raises RecipeError for damaged files.
        """

    @abstractmethod
    def open_model(self, model: bytes, data: Path | None = None) -> Opened:
        """Open a serialized model whose tensors outside, if any, are in the folder `data`; `verify` calls parts of it.

        Raises what the runtime raises.
        """

    def load(self, graph: Graph, *, threads: int = 0, providers: Sequence[str] = ()) -> Values | None:
        """Return what computes a compiled folder for a user, if that is not what `open` opens.

        Raises RecipeError where the folder holds nothing that it executes, TargetError where that does not run here.
        """
        return None

    def prepare(self) -> None:
        """Do what has to be done once in a process, so that measuring an open graph does not count it."""
        return

    def usual_targets(self) -> tuple[str, ...]:
        """Return the targets that a first recipe has on this machine where the user names none."""
        return ()

    def examine(self, packages: Mapping[str, Found], faults: Faults) -> Mapping[str, Fact]:
        """Return what `doctor` says of it beside its packages, which are given by module."""
        return {}

    @abstractmethod
    def build(self, target: Target, machine: Machine) -> Ability:
        """Say whether what runs is built here."""

    @abstractmethod
    def run(self, target: Target, machine: Machine) -> Ability:
        """Say whether what was built runs here."""

    def verify(self, machine: Machine) -> Ability:
        """Say whether `open` opens graphs here, where all that compiles is there."""
        lacks = "; ".join(sorted({found.lack for p in self.packages if not (found := machine.package(p.module)).works}))
        return Ability(not lacks, lacks or "yes, on the CPU")

    def latency_command(self, shapes: str) -> str | None:
        """Return the command that times a call on a GPU, in the compiled folder; `shapes` as trtexec has them."""
        return None
