"""Recorded calls of the full-precision denoiser, and the input ranges that were seen on the way.

Shapes: T denoising steps, R rows of a call, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from intaglio.pipeline.quant.spec import IntInput, LayerScheme

if TYPE_CHECKING:
    import torch


class Ranges(NamedTuple):
    """What quantized layers need of the trajectory, (T,) by layer name; in the order in which they take it."""

    amax: Mapping[str, torch.Tensor]
    output_amax: Mapping[str, torch.Tensor]
    shift: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trajectory:
    """Every call on the way from noise to sample, by step: inputs (T, R, ...) by name, outputs (T, R, ...).

    `conditions` (R, ...) are inputs that are the same at every step, `shared` those that the rows have in common.
    `amax` is the largest input magnitude of each layer at each step, (T,) by layer name; `output_amax` is the largest
    output magnitude, without the bias, of each convolution; `low` and `high` are the ends of each layer's input.
    """

    timesteps: tuple[float, ...]
    inputs: Mapping[str, torch.Tensor]
    outputs: torch.Tensor
    amax: Mapping[str, torch.Tensor]
    output_amax: Mapping[str, torch.Tensor]
    low: Mapping[str, torch.Tensor]
    high: Mapping[str, torch.Tensor]
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def ranges(self, schemes: Mapping[str, LayerScheme]) -> Ranges:
        """Input ranges as these schemes use them: around their middle where the input is shifted, else around zero."""
        from intaglio.pipeline.quant.affine import half_range

        shifted = [n for n, s in schemes.items() if isinstance(s.input, IntInput) and s.input.shifted]
        halves = {name: half_range(self.low[name], self.high[name]) for name in shifted}
        amax = {**self.amax, **{name: half for name, (half, _) in halves.items()}}
        return Ranges(amax, self.output_amax, {name: middle for name, (_, middle) in halves.items()})

    def call(self, step: int, rows: slice | Sequence[int] = slice(None)) -> dict[str, torch.Tensor]:
        """Inputs of the call at `step`."""
        at_step = {name: value[step][rows] for name, value in self.inputs.items()}
        return at_step | {name: value[rows] for name, value in self.conditions.items()} | dict(self.shared)

    def save(self, root: Path) -> None:
        """Write trajectory.safetensors and trajectory.json."""
        from safetensors.torch import save_file

        parts = {
            "input.": self.inputs,
            "amax.": self.amax,
            "output_amax.": self.output_amax,
            "low.": self.low,
            "high.": self.high,
            "condition.": self.conditions,
            "shared.": self.shared,
        }
        tensors = {f"{part}{k}": v.contiguous() for part, values in parts.items() for k, v in values.items()}
        save_file(tensors | {"outputs": self.outputs.contiguous()}, root / "trajectory.safetensors")
        (root / "trajectory.json").write_text(json.dumps({"timesteps": self.timesteps}) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(root / "trajectory.safetensors")
        names = ("input.", "amax.", "output_amax.", "low.", "high.", "condition.", "shared.")
        part = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in names}
        timesteps = json.loads((root / "trajectory.json").read_text())["timesteps"]
        return cls(
            tuple(timesteps), part["input."], tensors["outputs"], *(part[name] for name in names if name != "input.")
        )
