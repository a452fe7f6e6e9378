"""Measured agreement: the deployed graph against its simulation, and both against full precision."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from intaglio.pipeline.files import MIB, load_tensors, read_bytes, read_json_object, read_text, read_typed

if TYPE_CHECKING:
    import torch

MOST_PAGE, MOST_PICTURE = 64 * MIB, 64 * MIB
"""Bytes of report.html and of samples.png that are read."""


@dataclass(frozen=True)
class LayerParity:
    """One layer on the same input in both: relative L2 error, and how many of its input codes differ, by how much."""

    rel_l2: float
    codes: int
    codes_differing: int
    code_distance_max: int


@dataclass(frozen=True)
class Departure:
    """One layer inside the whole graph, as relative L2 errors.

    `input_rel_l2` of what enters it, from a simulation that goes on with the graph's own values of all layers before;
    `own_rel_l2` of what leaves it, from the simulated layer on what entered it in the graph.
    """

    input_rel_l2: float
    own_rel_l2: float


@dataclass(frozen=True)
class Verification:
    """What `verify` measured. `samples`: (B, ...) of full precision, the simulation and the deployed graph.

    `departures` has the layers in the order in which they run; empty where the whole graph was not looked into.
    """

    figures: Mapping[str, float]
    layers: Mapping[str, LayerParity]
    samples: Mapping[str, torch.Tensor]
    departures: Mapping[str, Departure] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Write verification.json and samples.safetensors."""
        from safetensors.torch import save_file

        content = {
            "figures": self.figures,
            "layers": {n: p.__dict__ for n, p in self.layers.items()},
            "departures": {n: d.__dict__ for n, d in self.departures.items()},
        }
        (root / "verification.json").write_text(json.dumps(content, indent=1) + "\n")
        save_file({k: v.contiguous() for k, v in self.samples.items()}, root / "samples.safetensors")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        content = read_typed(root / "verification.json", _Content)
        samples = load_tensors(root / "samples.safetensors")
        return cls(content.figures, content.layers, samples, content.departures)


@dataclass(frozen=True)
class _Content:
    """Content of verification.json."""

    figures: Mapping[str, float]
    layers: Mapping[str, LayerParity]
    departures: Mapping[str, Departure]


@dataclass(frozen=True)
class Latency:
    """Median time of one call in ONNX Runtime, of full precision and of the compiled graph."""

    rows: int
    float32_ms: float
    compiled_ms: float

    def save(self, root: Path) -> None:
        """Write latency.json."""
        (root / "latency.json").write_text(json.dumps(self.__dict__) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read latency.json."""
        return read_typed(root / "latency.json", cls)


def dotted(metrics: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every figure of metrics.json by its name.

    >>> dict(dotted({"psnr_db": 44.1, "engine": {"int8_gemm": 47}}))
    {'psnr_db': 44.1, 'engine.int8_gemm': 47}
    """
    for name, entry in metrics.items():
        if isinstance(entry, dict):
            yield from dotted(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


@dataclass(frozen=True)
class Report:
    """The page that people read, the figures that machines read, and a picture of samples (PNG)."""

    html: str
    metrics: Mapping[str, object]
    picture: bytes | None = None

    def save(self, root: Path) -> None:
        """Write report.html, metrics.json and, if there is a picture, samples.png."""
        if self.picture is not None:
            (root / "samples.png").write_bytes(self.picture)
        (root / "report.html").write_text(self.html, encoding="utf-8")
        (root / "metrics.json").write_text(json.dumps(self.metrics, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        picture = root / "samples.png"
        return cls(
            read_text(root / "report.html", most=MOST_PAGE),
            read_json_object(root / "metrics.json"),
            read_bytes(picture, most=MOST_PICTURE) if picture.exists() else None,
        )
