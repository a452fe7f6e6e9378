"""ONNX graphs and what was built from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from intaglio.pipeline.files import read_bytes, read_typed
from intaglio.pipeline.formats.layer import AxisSize

if TYPE_CHECKING:
    from intaglio.pipeline.model.types import Inputs

MOST_ENGINE = 1 << 36
"""Bytes of a serialized engine that are read."""
STEP_INPUT = "step"
"""Graph input (int64 scalar): the denoising step, where some layer has a scale for each."""

NOT_IN_GRAPH = "the graph has no product of it"
"""Why a layer stays in float that torch's exporter has dropped, or computed as a constant."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ONNX element type such as `float32`, and its shape, names for dynamic axes."""

    dtype: str
    shape: tuple[AxisSize | str, ...]


@dataclass(frozen=True)
class Interface:
    """How the denoiser of a graph is called: what is needed to stand in its place without its weights.

    `kind` is its class in diffusers, with its `config`; both are empty for any other module. `arguments` are those of
    its forward, in order, `sample` the one with the samples. `constants` are what was recorded beside tensors.
    """

    kind: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    sample: str = "sample"
    constants: Mapping[str, object] = field(default_factory=dict)


class ScaledBy(NamedTuple):
    """A balanced layer, and the first of the channels that are multiplied by its input's channel scales."""

    layer: str
    start: int


@dataclass(frozen=True)
class Graph:
    """An ONNX model in a folder: model.onnx, and model.onnx.data where its tensors are kept outside.

    `nodes` gives, by layer name, the names of the values that enter and leave what the layer became, so that a layer
    can be compared alone. `timesteps` are those of the `step` input's values; empty where there is no such input.
    `timestep` names the input that tells the step, None where the model has no timestep. `sizes` gives the size of each
    dynamic axis but the batch in the recorded call and in the other one.
    `amax` is the largest magnitude of each floating-point value in the recorded calls, by name, where it was recorded.
    `scaled` are those ends of layers, by value name, that the channel scales of a layer behind them are folded into.
    """

    path: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    timesteps: tuple[float, ...] = ()
    nodes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    timestep: str | None = "timestep"
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)
    scaled: Mapping[str, ScaledBy] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Copy the model's files and write graph.json."""
        for name in ("model.onnx", "model.onnx.data"):
            if (self.path.parent / name).exists():
                shutil.copy(self.path.parent / name, root / name)
        facts = asdict(self)
        del facts["path"]
        (root / "graph.json").write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        facts = vars(read_typed(root / "graph.json", _GraphFacts))
        return cls(root / "model.onnx", **facts | {"interface": Interface(**vars(facts["interface"]))})

    def is_folded(self, layer: str) -> bool:
        """Whether the channel scales of a layer's input are in what precedes it."""
        return layer in self.nodes and self.nodes[layer][0] in self.scaled

    @property
    def size_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(f.stat().st_size for f in self.path.parent.glob("model.onnx*"))


@dataclass(frozen=True)
class _GraphFacts:
    """graph.json: what `Graph` has beside its path."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    timesteps: tuple[float, ...]
    nodes: Mapping[str, tuple[str, str]]
    timestep: str | None
    sizes: Mapping[str, tuple[AxisSize, AxisSize]]
    amax: Mapping[str, float]
    interface: _InterfaceFacts
    scaled: Mapping[str, ScaledBy] = field(default_factory=dict)


@dataclass(frozen=True)
class _InterfaceFacts:
    """What `Interface` has, all of which is in graph.json."""

    kind: str
    config: Mapping[str, object]
    arguments: tuple[str, ...]
    sample: str
    constants: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """What a runtime made of a graph: how many of its matrix products and convolutions it executes on integers.

    `plan` is the serialized engine, or None where it is built on the device by `command`. `layers` are those executed.
    """

    runtime: str
    version: str
    int8_gemm: int | None
    fp_gemm: int | None
    plan: bytes | None = None
    command: str | None = None
    layers: tuple[str, ...] = ()

    def save(self, root: Path) -> None:
        """Write engine.json, and engine.plan where there is one."""
        facts = {k: v for k, v in self.__dict__.items() if k != "plan"}
        (root / "engine.json").write_text(json.dumps(facts, indent=1) + "\n")
        if self.plan is not None:
            (root / "engine.plan").write_bytes(self.plan)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        facts, plan = read_typed(root / "engine.json", _EngineFacts), root / "engine.plan"
        return cls(**vars(facts), plan=read_bytes(plan, most=MOST_ENGINE) if plan.exists() else None)


@dataclass(frozen=True)
class _EngineFacts:
    """engine.json: what `Engine` has beside its plan."""

    runtime: str
    version: str
    int8_gemm: int | None
    fp_gemm: int | None
    command: str | None = None
    layers: tuple[str, ...] = ()


def step_index(graph: Graph, inputs: Inputs) -> int:
    """Return the step whose timestep is nearest to the call's; 0 for a graph without timesteps."""
    from intaglio.pipeline.model.step_clock import StepClock

    return 0 if graph.timestep is None else StepClock(graph.timesteps).index(float(inputs[graph.timestep][0]))
