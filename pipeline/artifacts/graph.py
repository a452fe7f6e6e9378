"""ONNX graphs, and the engines that runtimes build from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import OPTIONAL, read_bytes, read_typed, write_typed
from intaglio.pipeline.formats.layer import AxisSize
from intaglio.pipeline.handed_over import place_file
from intaglio.pipeline.model.call_form import CallForm

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from intaglio.pipeline.model.types import Inputs

MOST_ENGINE = 1 << 36
"""Largest size in bytes of a serialized engine that is read."""
STEP_INPUT = "step"
"""Graph input (int64 scalar): the index of the denoising step, if a layer of the graph has one scale for each step."""

NOT_IN_GRAPH = "the exported graph does not compute it"
"""Reason to stay in float for a layer that torch's exporter dropped or replaced by a constant."""
MAY_LACK = ("scaled", "constants", "form", "variance", "row_axes", "row_lists", "component", "multiples", "weights")
"""Fields of graph.json that are left out, or were not there in folders of earlier releases."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: its ONNX element type, such as `float32`, and its shape, with names for dynamic axes."""

    dtype: str
    shape: tuple[AxisSize | str, ...]


@dataclass(frozen=True)
class Interface:
    """Description of how the original denoiser is called, so that `load` can replace it without its weights.

    `kind` is its class in diffusers, with its `config`; both are empty for any other module. `arguments` are the names
    of the arguments of `forward`, in order; `sample` is the one with the samples. `constants` are the recorded
    arguments that are no tensors, and the tensors whose values are constants of the graph (`fixed_constant`). `form` is
    the form of its calls, None for the plain form. `component` is the pipeline's component that it is, where the recipe
    names it.
    """

    kind: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    sample: str = "sample"
    constants: Mapping[str, object] = field(default_factory=dict)
    form: Annotated[CallForm | None, OPTIONAL] = None
    component: Annotated[str | None, OPTIONAL] = None


FIXED = frozenset({"values", "shape"})
"""Keys of a constant of the interface that is a tensor: its numbers in order, or one for all, and its shape."""


def fixed_constant(value: torch.Tensor) -> dict[str, object]:
    """Return a tensor as a constant of the interface; one row stands for all rows."""
    flat = value.reshape(-1)
    return {"values": flat[:1].tolist() if bool((flat == flat[:1]).all()) else flat.tolist(), "shape": [*value.shape]}


def fixed_tensor(constant: object) -> torch.Tensor | None:
    """Return the tensor that a constant of the interface stands for, if it is one. Raises RecipeError if damaged."""
    import torch

    if not isinstance(constant, dict) or constant.keys() != FIXED:
        return None
    try:
        values = torch.tensor(constant["values"])
        return (values if len(values) > 1 else values.expand(constant["shape"])).reshape(constant["shape"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise RecipeError(f"graph.json: is damaged: a constant of its interface is no tensor: {e}") from e


class ScaledBy(NamedTuple):
    """A balanced layer whose channel scales multiply a value, from the channel `start` of the value on."""

    layer: str
    start: int


class OwnWeight(NamedTuple):
    """A constant of a graph that is a weight of the model: the parameter's name in its module, and where it belongs.

    `axes` is the order in which the constant has the parameter's axes, and `place` its place among all constants.
    """

    parameter: str
    axes: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class _File:
    """The place of a graph's file. A base class, so that `path` stands first among the fields of `Graph`."""

    path: Path


@dataclass(frozen=True)
class _GraphFacts:
    """The content of graph.json: everything in `Graph` except its path."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    timesteps: tuple[float, ...] = ()
    nodes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    timestep: str | None = "timestep"
    sizes: Mapping[str, tuple[AxisSize, AxisSize]] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)
    scaled: Mapping[str, ScaledBy] = field(default_factory=dict)
    multiples: Annotated[Mapping[str, int], OPTIONAL] = field(default_factory=dict)
    weights: Annotated[Mapping[str, OwnWeight], OPTIONAL] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph(_GraphFacts, _File):
    """An ONNX model in a folder: model.onnx, and model.onnx.data where its tensors are kept outside.

    `nodes` gives, by layer name, the names of the input and the output of the nodes that compute the layer, so that it
    can be compared alone. `timesteps[i]` is the timestep that the value i of the input `step` stands for; `timesteps`
    is empty where there is no such input. `timestep` is the name of the timestep input; None if the model has none.
    `sizes` gives, for each dynamic axis except the batch, its size in the recorded call and at the model's other size.
    `amax` is the largest magnitude of each floating-point value in the recorded calls, by name, where it was recorded.
    `scaled` are inputs and outputs of layers, by value name, into which channel scales of a later layer are folded.
    `multiples` gives, for dynamic axes of the sample, the number above 1 that the network divides their size by.
    `weights` gives, by name, the constants that the files leave out because they are the model's own weights; the file
    has inputs in their place, so only a reader that has the model can run the graph.
    """

    def save(self, root: Path) -> None:
        """Copy the model's files, or move them where the step hands them over, and write graph.json."""
        for name in ("model.onnx", "model.onnx.data"):
            if (self.path.parent / name).exists():
                place_file(self.path.parent / name, root / name)
        write_typed(root / "graph.json", self, _GraphFacts)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        facts = read_typed(root / "graph.json", _GraphFacts, may_lack=MAY_LACK)
        return cls(root / "model.onnx", **vars(facts))

    def is_folded(self, layer: str) -> bool:
        """Return whether the channel scales of a layer's input are folded into the operators before the layer."""
        return layer in self.nodes and self.nodes[layer][0] in self.scaled

    @property
    def size_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(f.stat().st_size for f in self.path.parent.glob("model.onnx*"))


@dataclass(frozen=True)
class _EngineFacts:
    """The content of engine.json: everything in `Engine` except its plan."""

    runtime: str
    version: str
    low_precision_products: int | None
    float_products: int | None
    command: str | None = None
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine(_EngineFacts):
    """A graph as a runtime built it, with the numbers of its matrix products and convolutions.

    `low_precision_products` counts those of codes, in INT8, FP8 or FP4, and `float_products` counts those in float.
    Both are None where they are not known.
    `plan` is the serialized engine, or None where it is built on the device by `command`. `layers` names the layers
    that the runtime executes.
    """

    plan: bytes | None = field(default=None, kw_only=True)

    def save(self, root: Path) -> None:
        """Write engine.json, and engine.plan where there is one."""
        write_typed(root / "engine.json", self, _EngineFacts)
        if self.plan is not None:
            (root / "engine.plan").write_bytes(self.plan)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        facts, plan = read_typed(root / "engine.json", _EngineFacts), root / "engine.plan"
        return cls(**vars(facts), plan=read_bytes(plan, most=MOST_ENGINE) if plan.exists() else None)


def step_index(graph: Graph, inputs: Inputs) -> int:
    """Return the step whose timestep is nearest to the call's; 0 for a graph without timesteps."""
    from intaglio.pipeline.model.step_clock import StepClock, number

    return 0 if graph.timestep is None else StepClock(graph.timesteps).index(number(inputs[graph.timestep]))


def as_array(value: torch.Tensor) -> NDArray[np.generic]:
    """Return a tensor as a graph takes it: with complex numbers as pairs of real numbers."""
    import torch

    array: NDArray[np.generic] = (torch.view_as_real(value) if value.is_complex() else value).numpy()
    return array
