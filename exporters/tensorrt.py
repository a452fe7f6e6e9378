"""Builds a TensorRT or TensorRT-RTX engine from the ONNX graph, and reads back what the engine executes."""

import shlex
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal, Protocol, TypeAlias

from pydantic import AfterValidator, Field, PositiveInt

from intaglio.exporters._trt_plan import LAYER_LIST, count_products, find_hazards, read_layers
from intaglio.pipeline.artifact import Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import MissingExtra, StepFailed, TargetError
from intaglio.pipeline.graph import Engine, Graph
from intaglio.pipeline.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.target import Target

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"})

_MODULES: Mapping[str, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
"""By runtime: the module, and the extra that installs it."""


def _ordered(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    smallest, usual, largest = sizes
    if not smallest <= usual <= largest:
        raise ValueError(f"sizes {list(sizes)} are not in the order smallest, usual, largest")
    return sizes


Sizes: TypeAlias = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], AfterValidator(_ordered)]
"""Smallest, usual and largest size of an axis."""

Profile: TypeAlias = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""By graph input: its smallest, usual and largest shape."""


class BuildTensorRT(Pass):
    """An engine it returns executes what the graph says: strongly typed, and free of the known silent faults.

    TensorRT-RTX builds ahead of time, without a GPU. A TensorRT engine runs only on the GPU and with the version that
    built it, so by default the artifact holds no plan but the command that builds it beside model.onnx on the device.
    """

    name: ClassVar[str] = "tensorrt"
    requires = frozenset({GRAPH, TARGET})
    provides = frozenset({ENGINE})
    needs: ClassVar[tuple[str, ...]] = ("tensorrt-rtx-cu12", "tensorrt-cu12")

    build_on: Literal["device", "host"] = Field(
        "device", description="where a TensorRT engine is built (TensorRT-RTX: always on the host)"
    )
    workspace_mib: int = Field(1024, ge=1, description="memory a layer may use while it runs, MiB")
    dynamic: Mapping[str, Sizes] = Field(
        {"batch": (1, 2, 8)},
        description="smallest, usual and largest size of a dynamic axis, by its name;"
        " of one that is not named here, the sizes it was exported at",
    )
    compute_capabilities: tuple[Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"], ...] = Field(
        (), description="GPUs the engine runs on (TensorRT-RTX); none listed: those of its default, SM80 and newer"
    )

    @classmethod
    def applies(cls, target: Target) -> bool:
        """For both runtimes of the TensorRT family."""
        return target.runtime in _MODULES

    def check(self, target: Target) -> None:
        """Raises MissingExtra where the engine is to be built here and the builder is not installed."""
        module, extra = _MODULES[target.runtime]
        if self._builds_here(target) and find_spec(module) is None:
            raise MissingExtra(extra, f"building for {target.name}")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises TargetError, with every node the runtime refuses or would compute wrongly."""
        graph, target = state[GRAPH], state[TARGET]
        profile = self._profile(graph)
        products = _read_products(graph.path)
        if not self._builds_here(target):
            return {ENGINE: Engine(target.runtime, "on device", None, None, command=self._command(profile))}
        trt = _load(target)
        plan, log = self._build(trt, graph.path, profile, target)
        layers = read_layers(log)
        if not layers:
            raise StepFailed(f"{target.runtime} {trt.__version__} lists no layers: no telling what the engine executes")
        if hazards := find_hazards(layers):
            raise TargetError(*hazards)
        integer, floating = count_products(layers, products)
        ctx.log.info("%d matrix products on integers, %d in floating point", integer, floating)
        return {
            ENGINE: Engine(target.runtime, trt.__version__, integer, floating, plan, layers=tuple(map(str, layers)))
        }

    def _builds_here(self, target: Target) -> bool:
        return target.runtime == "tensorrt-rtx" or self.build_on == "host"

    def _profile(self, graph: Graph) -> Profile:
        sizes = {axis: (min(ends), ends[0], max(ends)) for axis, ends in graph.sizes.items()} | dict(self.dynamic)
        owners = {axis: name for name, spec in graph.inputs.items() for axis in spec.shape if isinstance(axis, str)}
        if unknown := sorted(owners.keys() - sizes.keys()):
            raise TargetError(*(f"{owners[a]}: axis {a!r} is dynamic: give its sizes in dynamic" for a in unknown))

        def shape(axes: tuple[int | str, ...], size: int) -> tuple[int, ...]:
            return tuple(sizes[axis][size] if isinstance(axis, str) else axis for axis in axes)

        return {
            name: (shape(spec.shape, 0), shape(spec.shape, 1), shape(spec.shape, 2))
            for name, spec in graph.inputs.items()
            if any(isinstance(axis, str) for axis in spec.shape)
        }

    def _command(self, profile: Profile) -> str:
        """For trtexec 10 and 11 (which types strongly in any case), in the folder of model.onnx."""
        options = [
            "--onnx=model.onnx",
            "--saveEngine=engine.plan",
            "--stronglyTyped",
            f"--memPoolSize=workspace:{self.workspace_mib}M",
            "--profilingVerbosity=detailed",
            "--exportLayerInfo=engine.layers.json",
            "--skipInference",
        ]
        if profile:
            for place, end in enumerate(("min", "opt", "max")):
                shapes = (f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in profile.items())
                options.append(f"--{end}Shapes={','.join(shapes)}")
        return shlex.join(["trtexec", *options])

    def _build(self, trt: ModuleType, path: Path, profile: Profile, target: Target) -> tuple[bytes, str]:
        """The serialized engine, and the layer list of the builder's log."""
        errors: list[str] = []
        lists: list[str] = []
        log = _listen(trt, errors.append, lists.append)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(path)):
            raise TargetError(*(_parser_problem(parser.get_error(i)) for i in range(parser.num_errors)))
        errors.clear()  # the parser may complain about the missing GPU and go on

        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_mib << 20)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if target.runtime == "tensorrt-rtx" and self.compute_capabilities:
            config.num_compute_capabilities = len(self.compute_capabilities)
            for place, capability in enumerate(self.compute_capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, capability), place)
        if profile:
            shapes = builder.create_optimization_profile()
            for name, (smallest, usual, largest) in profile.items():
                shapes.set_shape(name, smallest, usual, largest)
            config.add_optimization_profile(shapes)

        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise TargetError(*(errors or [f"{target.runtime} {trt.__version__} builds no engine and gives no reason"]))
        return bytes(engine), "\n".join(lists)


def _load(target: Target) -> ModuleType:
    module, extra = _MODULES[target.runtime]
    try:
        return import_module(module)
    except ImportError as e:
        raise MissingExtra(extra, f"building for {target.name}") from e


def _listen(trt: ModuleType, on_error: Callable[[str], None], on_layers: Callable[[str], None]) -> object:
    """A log that keeps the errors and the layer list, out of tens of thousands of lines."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]  # the module is chosen by the target
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                on_error(message)
            elif message.startswith(LAYER_LIST):
                on_layers(message)

    return Log()


def _read_products(path: Path) -> frozenset[str]:
    """Names, as the parser gives them, of the nodes that multiply. Raises TargetError for groups that do not fit."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
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


class _ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


def _parser_problem(error: _ParserError) -> str:
    """The parser's description is `false` where it does not know the operator; other lines repeat the node's name."""
    said = [line for line in error.desc().splitlines() if not line.startswith(("Invalid Node", "[checkMacros"))]
    reason = "the runtime has no such operator" if said == ["false"] else " ".join(said)
    return f"{error.node_name() or 'graph'} ({error.node_operator() or 'model'}): {reason}"
