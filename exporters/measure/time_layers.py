"""Time each distinct layer of a model alone, in each scheme, so that `assign` knows which scheme is fast here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.exporters.measure.turns import spent
from intaglio.pipeline.artifacts.keys import LAYER_TIMES, MODEL, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.layer_times import LayerTimes
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.formats.known import USUAL_SCHEMES, SchemeName
from intaglio.pipeline.formats.layer import Layer, structural_schemes, unfit
from intaglio.pipeline.formats.schemes import LayerScheme
from intaglio.pipeline.formats.target import OpKind, Target, schemes_of_kind
from intaglio.pipeline.runs.registry import find_runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from intaglio.pipeline.artifacts.graph import Graph
    from intaglio.pipeline.runs.runtime import Runtime


MOST_PRODUCTS = 300_000_000
"""Multiplications of a timed call, about 20 ms; larger calls are timed on fewer rows, and their times scaled up."""


class TimeLayers(Pass):
    """Time every distinct layer alone: one call with the rows of one sample, in float and in each scheme.

    Layers of equal shape and rows are timed once, large ones on a part of their rows. The time includes rounding the
    input, and multiplying by the scale and adding the bias after the product. Fusions with other layers are not
    included, and a convolution is timed with a stride of 1. One thread is used, and its processor time is taken, so
    that other jobs of the machine do not count.
    """

    name: ClassVar[str] = "time-layers"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TARGET, WORKLOAD})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LAYER_TIMES})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    schemes: tuple[SchemeName, ...] | Mapping[OpKind, tuple[SchemeName, ...]] = Field(
        USUAL_SCHEMES,
        description="schemes to time, one list or one for each kind of layer; schemes that a layer's shape does not"
        " admit are skipped",
    )
    rounds: int = Field(5, ge=1, description="calls of each graph, after one that is not counted")

    @classmethod
    def applies(cls, target: Target) -> bool:
        """Return True for targets that list kernels, and whose `fast_code`, if any, is that of this machine's CPU.

        Their runtime computes on a CPU, and the times are those of this machine's CPU.
        """
        if not target.kernels or target.fast_code is None:
            return bool(target.kernels)
        unknown = target.model_copy(update={"fast_code": None})
        return find_runtime(target.runtime).here(unknown).fast_code == target.fast_code

    def run(self, state: State, ctx: Context) -> Outputs:
        """Time the layers that the recorded calls reach."""
        from intaglio.pipeline.model.layers import layer_table

        target, workload = state[TARGET], state[WORKLOAD]
        runtime = find_runtime(target.runtime)
        reached = [layer for layer in layer_table(state[MODEL].empty()) if workload.rows.get(layer.name)]
        alike: dict[tuple[Layer, int], list[str]] = {}
        for layer in reached:
            key = layer.model_copy(update={"name": "layer"}), max(1, round(workload.rows[layer.name]))
            alike.setdefault(key, []).append(layer.name)
        seconds: dict[str, Mapping[str, float]] = {}
        with ctx.progress("layer times", len(alike)) as advance:
            for (layer, rows), names in alike.items():
                timed = max(1, min(rows, MOST_PRODUCTS // (layer.n * layer.k)))
                times = {n: s * rows / timed for n, s in self._times(layer, timed, target, runtime).items()}
                seconds |= dict.fromkeys(names, times)
                advance()
        ctx.log.info("timed %d distinct layers of %d", len(alike), len(reached))
        return {LAYER_TIMES: LayerTimes(seconds, element_time(runtime))}

    def _times(self, layer: Layer, rows: int, target: Target, runtime: Runtime) -> dict[str, float]:
        """Return the seconds of a layer by the name of the scheme. All schemes take turns."""
        from intaglio.exporters.measure.single_layer import single_layer

        with TemporaryDirectory() as place:
            calls = {}
            for scheme in self._schemes(layer, target):
                folder = Path(place) / scheme.name
                folder.mkdir()
                calls[scheme.name] = _call(runtime, single_layer(folder, layer, rows, scheme, target))
            return spent(calls, self.rounds, clock=time.process_time)

    def _schemes(self, layer: Layer, target: Target) -> Iterable[LayerScheme]:
        admitted = structural_schemes(layer, target.group_sizes, schemes_of_kind(self.schemes, layer.op))
        return [scheme for scheme in admitted if unfit(layer, scheme, target) is None]


def element_time(runtime: Runtime) -> float:
    """Return the seconds in which one number is multiplied by the scale of its channel."""
    import numpy as np
    import onnx

    tokens, channels = 1024, 256
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        graph (float[{tokens},{channels}] x, float[{channels}] d) => (float[{tokens},{channels}] y) {{ y = Mul (x, d) }}
    """)
    opened = runtime.open_model(model.SerializeToString())
    feed = {"x": np.ones((tokens, channels), np.float32), "d": np.ones(channels, np.float32)}
    return spent({"scale": lambda: opened.run(feed)}, 21, clock=time.process_time)["scale"] / (tokens * channels)


def _call(runtime: Runtime, graph: Graph) -> Callable[[], object]:
    """Return a call of a graph with noise, on one thread."""
    import numpy as np

    from intaglio.exporters.runtimes.calls import noise_feed, usual_shapes

    opened, feed = runtime.open(graph, threads=1), noise_feed(graph, usual_shapes(graph, 1), np.random.default_rng(0))
    return lambda: opened.run(feed)
