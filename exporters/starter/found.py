"""Hold the facts about a model from which its first recipe is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.runs.memory import least_bytes

if TYPE_CHECKING:
    from intaglio.pipeline.model.cost import ModelCost


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of the model, and their origin."""

    steps: int = 20
    guidance: float = 1.0
    said_by: str | None = None
    unknown: str | None = None
    """Reason why the settings of the pipeline are unknown; None without a pipeline."""


@dataclass(frozen=True)
class Found:
    """Facts about a model, and suggestions for it. Bytes are those of float32."""

    path: str
    """Path of the model in the recipe."""
    kind: str
    parameters: int
    layers: tuple[Layer, ...]
    blocks: int
    sampling: Sampling
    takes: str
    """Names of further inputs that are given or recorded."""
    conditions: str | None
    """Path of a recording that exists or is needed."""
    lacks: str | None
    """Reason why the model cannot be called without a recording; None if it can."""
    targets: tuple[str, ...]
    size: float
    """Size relative to fp16 with 8 bits wherever the targets allow."""
    least: float
    """Size relative to fp16 with 4-bit weights wherever the targets allow."""
    components: Mapping[str, str]
    """Other models of the pipeline around the model, and their classes."""
    cost: ModelCost | None
    """Cost of a call; None if it cannot be counted without weights."""
    minutes: float | None = None
    """Time in which a run of the recipe should end; if it is set, the time of a call is known or assumed."""
    assumed_threads: int | None = None
    """Threads for which the time of a call was assumed; None if it was measured."""
    has_weights: bool = True
    """False if the model can be inspected but, without weights, not compiled."""
    partners: tuple[str, ...] = ()
    """Other denoisers that share the steps of a sample with this one."""

    @property
    def counts(self) -> str:
        """Return the number of layers of each kind, such as `46 linear, 2 conv`."""
        return ", ".join(f"{count} {op}" for op, count in Counter(layer.op for layer in self.layers).items())

    @property
    def summary(self) -> str:
        """Return the facts in one line."""
        return f"{self.kind}, {self.parameters / 1e6:.1f} M parameters, {self.counts} layers"

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON, without the table of layers."""
        return {
            "class": self.kind,
            "parameters": self.parameters,
            "float_bytes": 4 * self.parameters,
            "least_memory_bytes": least_bytes(self.parameters),
            "layers": dict(Counter(layer.op for layer in self.layers)),
            "blocks": self.blocks,
            "sampling": asdict(self.sampling),
            "takes": self.takes,
            "conditions": self.conditions,
            "lacks": self.lacks,
            "targets": list(self.targets),
            "size": self.size,
            "least_size": self.least,
            "components": dict(self.components),
            "operations_per_row": None if self.cost is None else self.cost.operations_per_row,
        }
