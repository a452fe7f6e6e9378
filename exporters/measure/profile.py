"""Time a compiled graph layer by layer: in ONNX Runtime here, or as trtexec timed it on its device."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRT
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, PLAN, PROFILE, TARGET
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.profile import LayerTime, Profile
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.files import DAMAGE, MIB, printable, read_json
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.runs.registry import find_runtime

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Gemm", "Conv")
_NO_NAME = re.compile(r" \+ | \|\| |\.\.\.|[\s()\[\]{},\x1e]+")
"""Text between the names of nodes in the names of TensorRT's kernels."""
MOST_TRTEXEC = 64 * MIB
"""Largest size in bytes of a file of trtexec that is read."""
_RANGE = "..."
_KERNEL = "_kernel_time"


class ProfileLayers(Pass):
    """Measures the median time of each layer with ONNX Runtime's profiler, as the sum of its kernels.

    The time of kernels that belong to no layer, such as attention and normalizations, is given by operator.
    """

    name: ClassVar[str] = "profile"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, PLAN, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PROFILE})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime-gpu")

    rows: int = Field(2, ge=1, description="rows of the call that is timed; one sample with guidance has two")
    runs: int = Field(15, ge=1, description="calls, after one that is not counted")
    threads: int = Field(1, ge=0, description="threads of ONNX Runtime, 0 for all cores")

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Return True for ONNX Runtime, whose kernels are timed here; times of other runtimes are read from a file."""
        return isinstance(find_runtime(target.runtime), OnnxRuntime)

    def run(self, state: State, ctx: Context) -> Outputs:
        """Run the graph with the runtime's profiler and add up the time of each layer."""
        import onnxruntime

        from intaglio.exporters.float_graph.onnx_file import read_proto
        from intaglio.exporters.runtimes.calls import noise_feed, usual_shapes
        from intaglio.exporters.runtimes.onnxruntime.session import graph_session

        graph, plan, target = state[GRAPH], state[PLAN], state[TARGET]
        if not self.applies(target):
            raise TargetError(f"{target.name} is not for ONNX Runtime: time its engine with trtexec on the device")
        optimized = ctx.scratch / "optimized.onnx"
        session = graph_session(
            graph,
            threads=self.threads,
            providers=[target.provider],
            optimized=optimized,
            profile=ctx.scratch / "kernels",
        )
        feed = noise_feed(graph, usual_shapes(graph, self.rows), ctx.rng("input"))
        with ctx.progress("runs", self.runs + 1) as advance:
            for _ in range(self.runs + 1):
                session.run(None, feed)
                advance()
        events = json.loads(Path(session.end_profiling()).read_text())  # ONNX Runtime wrote it just now
        written, executed = read_proto(graph.path), read_proto(optimized)
        owners = _owners_of_kernels(written, executed)
        layers: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.runs)
        rest: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.runs)
        for kernel, operator, times in _kernels(events, self.runs + 1):
            owner = owners.get(kernel)
            part = rest[operator] if owner is None else layers[owner]
            part[:] = map(sum, zip(part, times[1:], strict=True))
        found = _profile(
            OnnxRuntime.name,
            f"onnxruntime {onnxruntime.__version__}, {session.get_providers()[0]}, {self.threads or 'all'} threads",
            self.runs,
            self.rows,
            plan,
            {name: statistics.median(times) for name, times in layers.items()},
            {operator: statistics.median(times) for operator, times in rest.items()},
        )
        ctx.log.info(
            "%.0f µs in %d layers, %.0f µs in kernels of no layer, %d layers without a kernel",
            sum(time.microseconds for time in found.layers.values()),
            len(found.layers),
            sum(found.rest_microseconds.values()),
            len(found.missing),
        )
        return {PROFILE: found}


def read_trtexec(graph: Graph, plan: QuantPlan, times: Path, layers: Path | None = None) -> Profile:
    """Read the profile that `trtexec --exportProfile` wrote as `times`.

    `layers` is the file of `--exportLayerInfo`. It names the nodes of kernels whose names in `times` do not tell the
    nodes. The time of a kernel that computes several layers is divided among them by their numbers of weights. Raises
    RecipeError for other files, and where no kernel belongs to a layer.
    """
    from intaglio.exporters.float_graph.onnx_file import read_proto

    runs, took = _kernels_of_trtexec(times)
    nodes_of = {} if layers is None else _nodes_of_trtexec(layers)
    model = read_proto(graph.path)
    nodes = {node.name: node for node in model.graph.node}
    weights = {layer.name: layer.n * layer.k for layer in plan.layers}
    found: dict[str, float] = defaultdict(float)
    rest: dict[str, float] = defaultdict(float)
    for name, milliseconds in took:
        text = name if _RANGE not in name else ""  # a range names its first and last node only
        executed = [nodes[token] for token in _NO_NAME.split(f"{text} {nodes_of.get(name, '')}") if token in nodes]
        owners = _owners(node for node in executed if node.op_type in PRODUCTS) or _owners(executed)
        shares = {owner: weights[owner] for owner in owners if owner in weights}
        if not shares:
            rest[name] += 1e3 * milliseconds
        for owner, share in shares.items():
            found[owner] += 1e3 * milliseconds * share / sum(shares.values())
    if not found:
        raise RecipeError(
            f"{times}: none of its {len(took)} kernels names a node of {graph.path}: run trtexec with"
            " --profilingVerbosity=detailed and --exportLayerInfo, and give that file as --layers"
        )
    return _profile(TensorRT.name, "trtexec", runs, None, plan, found, rest)


def _profile(
    runtime: str,
    made_by: str,
    runs: int,
    rows: int | None,
    plan: QuantPlan,
    layers: Mapping[str, float],
    rest: Mapping[str, float],
) -> Profile:
    """Return the profile. Times are in microseconds; those that belong to no layer are sorted, the longest first."""
    measured = {
        layer.name: LayerTime(
            scheme=plan.schemes[layer.name].name,
            microseconds=layers[layer.name],
            bytes=plan.layer_bytes(layer),
        )
        for layer in plan.layers
        if layer.name in layers
    }
    missing = tuple(layer.name for layer in plan.layers if layer.name not in layers)
    by_time = dict(sorted(rest.items(), key=lambda item: (-item[1], item[0])))
    return Profile(
        runtime=runtime,
        made_by=made_by,
        runs=runs,
        rows=rows,
        layers=measured,
        rest_microseconds=by_time,
        missing=missing,
    )


def _kernels(events: Iterable[Mapping[str, Any]], calls: int) -> Iterator[tuple[str, str, Sequence[float]]]:
    """Yield each kernel's name, its operator, and its time in each call in microseconds."""
    took: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        name, about = str(event["name"]), event.get("args", {})
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            took[name.removesuffix(_KERNEL), str(about["op_name"]), str(about["node_index"])].append(event["dur"])
    for (name, operator, _), times in took.items():
        each = len(times) // calls  # a kernel in a loop runs several times in each call
        yield name, operator, [sum(times[i * each : (i + 1) * each]) for i in range(calls)]


def _owners_of_kernels(written: onnx.ModelProto, executed: onnx.ModelProto) -> dict[str, str]:
    """Return the layer of each executed node, by the node's name.

    A node belongs to the layer of the values that it computes, or else of the constants that it reads: optimizations
    drop the metadata of nodes, but keep the names of values. A convolution in another layout is named after its output.
    """
    nodes = [(node, owner) for node in written.graph.node if (owner := _owner(node)) is not None]
    constants = {tensor.name for tensor in written.graph.initializer}
    known = {value: owner for node, owner in nodes for value in node.input if value in constants}
    known |= {value: owner for node, owner in nodes for value in node.output}
    found = {}
    for node in executed.graph.node:
        reads = (value for value in node.input if value in constants)
        names = (*node.output, node.name.removesuffix("_nchwc"), *reads)
        if owner := next((known[name] for name in names if name in known), None):
            found[node.name] = owner
    return found


def _owner(node: onnx.NodeProto) -> str | None:
    from intaglio.exporters.float_graph.sites import LAYER_KEY

    return next((entry.value for entry in node.metadata_props if entry.key == LAYER_KEY), None)


def _owners(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    """Return the layers of these nodes, each once."""
    return list(dict.fromkeys(owner for node in nodes if (owner := _owner(node)) is not None))


def _kernels_of_trtexec(times: Path) -> tuple[int, list[tuple[str, float]]]:
    """Return the number of runs, and the name and the milliseconds of every kernel."""
    kernels: Any = read_json(times, most=MOST_TRTEXEC)
    with _as_written_by(times, "--exportProfile"):
        counts = [int(kernel["count"]) for kernel in kernels if "count" in kernel]
        if not counts or counts[0] < 1:
            raise ValueError("it has no count of runs")
        took = [
            (str(k["name"]), float(k["medianMs"] if "medianMs" in k else k["averageMs"]))
            for k in kernels
            if "name" in k
        ]
        if not all(math.isfinite(milliseconds) and milliseconds >= 0 for _, milliseconds in took):
            raise ValueError("a time is negative or not finite")
        return counts[0], took


def _nodes_of_trtexec(layers: Path) -> dict[str, str]:
    """Return the text that names the nodes of each kernel, by the kernel's name."""
    information: Any = read_json(layers, most=MOST_TRTEXEC)
    with _as_written_by(layers, "--exportLayerInfo"):
        return {str(k["Name"]): str(k.get("Metadata", "")) for k in information.get("Layers", []) if "Name" in k}


@contextmanager
def _as_written_by(file: Path, option: str) -> Iterator[None]:
    """Raise RecipeError if the block cannot read the file as the output of this option of trtexec."""
    try:
        yield
    except DAMAGE as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else printable(error)
        raise RecipeError(f"{printable(file)}: is not what trtexec {option} writes: {said}") from error
