"""Build a TensorRT or TensorRT-RTX engine from the ONNX graph, and read back what the engine executes."""

import shlex
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, PositiveInt

from intaglio.exporters.runtimes.tensorrt.build_log import count_products, find_hazards, read_layers
from intaglio.exporters.runtimes.tensorrt.kit_scripts.build import BuildError, build_engine
from intaglio.exporters.runtimes.tensorrt.runtime import MODULES
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import MissingExtra, StepFailed, TargetError
from intaglio.pipeline.formats.target import Generation, Target

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"})


def _ordered(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    smallest, usual, largest = sizes
    if not smallest <= usual <= largest:
        raise ValueError(f"sizes {list(sizes)} are not in the order smallest, usual, largest")
    return sizes


Sizes: TypeAlias = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], AfterValidator(_ordered)]
"""Smallest, usual and largest size of an axis."""

Profile: TypeAlias = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of each graph input."""


class BuildTensorRT(Pass):
    """Build an engine that executes the graph as written: strongly typed, and free of known silent faults.

    TensorRT-RTX builds ahead of time, without a GPU. A TensorRT engine runs only on the GPU and with the version that
    built it, so by default the artifact holds no plan but the command that builds it beside model.onnx on the device.
    """

    name: ClassVar[str] = "tensorrt"
    version: ClassVar[int] = 2
    requires = frozenset({GRAPH, TARGET})
    provides = frozenset({ENGINE})
    needs: ClassVar[tuple[str, ...]] = ("tensorrt-rtx-cu12", "tensorrt-cu12")

    build_on: Literal["device", "host"] = Field(
        "device", description="where a TensorRT engine is built (TensorRT-RTX: always on the host)"
    )
    workspace_mib: int = Field(1024, ge=1, description="memory a layer may use while it runs, MiB")
    dynamic: Mapping[str, Sizes] = Field(
        {"batch": (1, 2, 8)},
        description="smallest, usual and largest size of each dynamic axis, by its name;"
        " an axis that is not listed gets the sizes of the export",
    )
    compute_capabilities: tuple[Generation, ...] = Field(
        (),
        description="GPU generations for which TensorRT-RTX builds kernels; empty: those of the target, or, if it has"
        " none, TensorRT-RTX's default, SM80 and newer",
    )

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Return True for targets of the TensorRT family."""
        return target.runtime in MODULES

    def check(self, target: Target) -> None:
        """Raise MissingExtra if the engine is to be built here and the builder is not installed."""
        module, extra = MODULES[target.runtime]
        if self._builds_here(target) and find_spec(module) is None:
            raise MissingExtra(extra, f"building for {target.name}")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Build the engine. Raises TargetError with every node that the runtime refuses or computes wrongly."""
        return {ENGINE: self.engine(state[GRAPH], state[TARGET], ctx)}

    def engine(self, graph: Graph, target: Target, ctx: Context) -> Engine:
        """Build the engine of one graph. Raises TargetError as `run` does."""
        profile = self.profile(graph)
        products = _read_products(graph.path)
        if not self._builds_here(target):
            return Engine(target.runtime, "on device", None, None, command=self._command(profile))
        trt = _load(target)
        plan, log = self._build(trt, graph.path, profile, target)
        layers = read_layers(log)
        if not layers:
            raise StepFailed(
                f"{target.runtime} {trt.__version__} lists no layers, so it is not known what the engine executes"
            )
        if hazards := find_hazards(layers):
            raise TargetError(*hazards)
        integer, floating = count_products(layers, products)
        ctx.log.info("%d matrix products in INT8, FP8 or FP4, %d in floating point", integer, floating)
        return Engine(target.runtime, trt.__version__, integer, floating, layers=tuple(map(str, layers)), plan=plan)

    def _builds_here(self, target: Target) -> bool:
        return target.runtime == "tensorrt-rtx" or self.build_on == "host"

    def profile(self, graph: Graph) -> Profile:
        """Return the shapes of inputs with dynamic axes. Raises TargetError for an axis without known sizes."""
        sizes = {axis: (min(ends), ends[0], max(ends)) for axis, ends in graph.sizes.items()} | dict(self.dynamic)
        owners = {axis: name for name, spec in graph.inputs.items() for axis in spec.shape if isinstance(axis, str)}
        if unknown := sorted(owners.keys() - sizes.keys()):
            advice = "give its sizes in the option `dynamic` of the step that builds the engine"
            raise TargetError(*(f"{owners[a]}: axis {a!r} is dynamic: {advice}" for a in unknown))

        def shape(axes: tuple[int | str, ...], size: int) -> tuple[int, ...]:
            return tuple(sizes[axis][size] if isinstance(axis, str) else axis for axis in axes)

        return {
            name: (shape(spec.shape, 0), shape(spec.shape, 1), shape(spec.shape, 2))
            for name, spec in graph.inputs.items()
            if any(isinstance(axis, str) for axis in spec.shape)
        }

    def _command(self, profile: Profile) -> str:
        """Return the command for trtexec 10 and 11 in the folder of model.onnx; 11 always types strongly."""
        options = [
            "--onnx=model.onnx",
            "--saveEngine=engine.plan",
            "--stronglyTyped",
            f"--memPoolSize=workspace:{self.workspace_mib}M",
            "--profilingVerbosity=detailed",
            "--exportLayerInfo=engine.layers.json",
            "--skipInference",
        ]
        return shlex.join(["trtexec", *options, *shape_flags(profile)])

    def _build(self, trt: ModuleType, path: Path, profile: Profile, target: Target) -> tuple[bytes, str]:
        """Return the serialized engine and the layer list of the builder's log."""

        def set_gpus(config: "IBuilderConfig") -> None:
            generations = self.compute_capabilities or target.generations
            if target.runtime == "tensorrt-rtx" and generations:
                config.num_compute_capabilities = len(generations)
                for place, capability in enumerate(generations):
                    config.set_compute_capability(getattr(trt.ComputeCapability, capability), place)

        try:
            return build_engine(trt, path, profile, self.workspace_mib, set_gpus)
        except BuildError as error:
            raise TargetError(*error.problems) from error


def shape_flags(profile: Profile) -> list[str]:
    """Return the profile as flags of trtexec."""
    return [
        f"--{end}Shapes={','.join(f'{name}:{_x(shapes[place])}' for name, shapes in profile.items())}"
        for place, end in enumerate(("min", "opt", "max"))
        if profile
    ]


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _load(target: Target) -> ModuleType:
    module, extra = MODULES[target.runtime]
    try:
        return import_module(module)
    except ImportError as e:
        raise MissingExtra(extra, f"building for {target.name}") from e


def _read_products(path: Path) -> frozenset[str]:
    """Return the parser's names of the nodes that multiply. Raises TargetError for groups that do not fit."""
    from intaglio.exporters.float_graph.onnx_file import read_proto

    graph = read_proto(path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    problems = []
    for node in graph.node:
        options = {option.name: option.i for option in node.attribute}
        group = options.get("block_size", 0)
        if node.op_type != "DequantizeLinear" or not group or node.input[0] not in shapes:
            continue
        features = shapes[node.input[0]][options.get("axis", 1)]
        # the parser takes the group from the shape of the scales: a shorter last group gives wrong groups, not an error
        if features % group:
            problems.append(
                f"{node.name or node.output[0]}: {features} input features are not a multiple of the group size {group}"
            )
    if problems:
        raise TargetError(*problems)
    return frozenset(node.name or f"node_of_{node.output[0]}" for node in graph.node if node.op_type in _PRODUCTS)
