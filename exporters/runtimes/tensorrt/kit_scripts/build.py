"""Build engine.plan from the ONNX file beside it with TensorRT's Python API, on the device that runs it.

This script needs Python 3.10 and TensorRT, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig, ILogger

LAYER_LIST = "Layers:"
"""Start of the message in the builder's log that lists the engine's layers."""

LOW_MEMORY_MIB = 256


class BuildError(Exception):
    """TensorRT cannot build the engine; the message has all problems."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def build_engine(
    module: ModuleType,
    model: Path,
    profile: Mapping[str, Sequence[Sequence[int]]],
    workspace_mib: int,
    configure: Callable[[IBuilderConfig], None] = lambda config: None,
) -> tuple[bytes, str]:
    """Return the strongly typed serialized engine and the layer list of the builder's log. Raises BuildError.

    `module`: tensorrt or tensorrt_rtx; `profile`: smallest, usual and largest shape of each input with a dynamic axis.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module
    errors: list[str] = []
    lists: list[str] = []
    log = _listen(module, errors.append, lists.append)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise BuildError(*(_parser_problem(parser.get_error(i)) for i in range(parser.num_errors)))
    errors.clear()  # the parser may complain about a missing GPU and go on

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    configure(config)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, *(trt.Dims(list(shape)) for shape in (smallest, usual, largest)))
        config.add_optimization_profile(shapes)

    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(*(errors or [f"{module.__name__} {trt.__version__} builds no engine and gives no reason"]))
    return bytes(engine), "\n".join(lists)


def _listen(module: ModuleType, on_error: Callable[[str], None], on_layers: Callable[[str], None]) -> ILogger:
    """Return a logger that keeps the errors and the layer list, out of tens of thousands of lines."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = module

    class Log(trt.ILogger):  # type: ignore[misc]  # Any where tensorrt is not installed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                on_error(msg)
            elif msg.startswith(LAYER_LIST):
                on_layers(msg)

    return Log()


class _ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


def _parser_problem(error: _ParserError) -> str:
    """Describe a parser error: `false` stands for an unknown operator, and other lines repeat the node's name."""
    said = [line for line in error.desc().splitlines() if not line.startswith(("Invalid Node", "[checkMacros"))]
    reason = "the runtime has no such operator" if said == ["false"] else " ".join(said)
    return f"{error.node_name() or 'graph'} ({error.node_operator() or 'model'}): {reason}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the engine. Returns 1 if TensorRT builds none, 2 if TensorRT is missing or too old."""
    parser = argparse.ArgumentParser(description="Build engine.plan from model.onnx.")
    parser.add_argument("--low-memory", action="store_true", help="a small workspace, one stream, fewer tactics tried")
    given = parser.parse_args(arguments)
    here = Path(__file__).resolve().parent
    kit = json.loads((here / "kit.json").read_text(encoding="utf-8"))
    try:
        module = import_module(kit["module"])
    except ImportError as error:
        print(f"build.py: no Python module {kit['module']}: {error}", file=sys.stderr)
        return 2
    there = [int(part) for part in module.__version__.split(".")[:2]]
    if kit["version"] is not None and there < kit["version"]:
        wanted = ".".join(map(str, kit["version"]))
        print(f"build.py: {kit['target']} needs TensorRT {wanted} or newer, not {module.__version__}", file=sys.stderr)
        return 2

    def save_memory(config: IBuilderConfig) -> None:
        if given.low_memory:
            config.max_aux_streams = 0
            config.builder_optimization_level = 2

    workspace_mib = min(LOW_MEMORY_MIB, kit["workspace_mib"]) if given.low_memory else kit["workspace_mib"]
    try:
        plan, layers = build_engine(module, here / "model.onnx", kit["profile"], workspace_mib, save_memory)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    (here / "engine.plan.new").write_bytes(plan)
    (here / "engine.plan.new").replace(here / "engine.plan")
    (here / "engine.layers.txt").write_text(layers, encoding="utf-8")
    print(f"engine.plan: {len(plan) / 1e6:.1f} MB, built by {module.__name__} {module.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
