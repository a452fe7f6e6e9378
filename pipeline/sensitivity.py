"""What each layer costs the output when it alone is quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from intaglio.pipeline.plan import Layer
from intaglio.pipeline.quant.spec import LayerScheme


@dataclass(frozen=True)
class Sensitivity:
    """Relative squared error of the denoiser's output, one layer quantized: error[layer][scheme][bucket].

    `buckets` are (first step, step past the last) ranges of the trajectory. Float has error zero and is listed too.
    `weights` is, for each bucket, the mean squared error of the final samples that a relative squared error of one in
    the bucket's outputs would make: an error early on is partly corrected by the steps that follow, a late one is not.
    `drift[layer][scheme]` is that error measured, on whole trajectories, where it was: a rounded weight pushes every
    step the same way, which no sum over steps predicts.
    """

    layers: tuple[Layer, ...]
    buckets: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    schemes: Mapping[str, Mapping[str, LayerScheme]]
    """Measured schemes by layer name and scheme name."""
    error: Mapping[str, Mapping[str, tuple[float, ...]]]
    drift: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def total(self, layer: str, scheme: str) -> float:
        """Mean squared error of the final samples: measured, or else predicted."""
        measured = self.drift.get(layer, {}).get(scheme)
        return self.predicted(layer, scheme) if measured is None else measured

    def predicted(self, layer: str, scheme: str) -> float:
        """Mean squared error of the final samples, as the errors of the buckets' outputs predict it."""
        return sum(w * e for w, e in zip(self.weights, self.error[layer][scheme], strict=True))

    def save(self, root: Path) -> None:
        """Write sensitivity.json."""
        content = {
            "buckets": self.buckets,
            "weights": self.weights,
            "layers": [layer.model_dump(mode="json") for layer in self.layers],
            "schemes": {n: {s: v.model_dump(mode="json") for s, v in by.items()} for n, by in self.schemes.items()},
            "error": self.error,
            "drift": self.drift,
        }
        (root / "sensitivity.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read sensitivity.json."""
        content = json.loads((root / "sensitivity.json").read_text())
        return cls(
            tuple(Layer(**layer) for layer in content["layers"]),
            tuple((first, last) for first, last in content["buckets"]),
            tuple(content["weights"]),
            {n: {s: LayerScheme(**v) for s, v in by.items()} for n, by in content["schemes"].items()},
            {n: {s: tuple(e) for s, e in by.items()} for n, by in content["error"].items()},
            content["drift"],
        )
