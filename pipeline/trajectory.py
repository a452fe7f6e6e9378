"""Recorded calls of the full-precision denoiser, and the input ranges that were seen on the way.

Shapes: T denoising steps, R rows of a call, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Self

from intaglio.pipeline.quant.spec import IntInput, LayerScheme

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.quant.balance import Balance, LayerBalance


class Ranges(NamedTuple):
    """What quantized layers need beside their schemes, by layer name; in the order in which they take it.

    The tables have one entry a step.
    """

    amax: Mapping[str, torch.Tensor]
    output_amax: Mapping[str, torch.Tensor]
    shift: Mapping[str, torch.Tensor]
    balance: Mapping[str, Balance]


@dataclass(frozen=True)
class Trajectory:
    """Every call on the way from noise to sample, by step: inputs (T, R, ...) by name, outputs (T, R, ...).

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

    def ranges(
        self,
        schemes: Mapping[str, LayerScheme],
        balances: Mapping[str, LayerBalance] = MappingProxyType({}),
        timesteps: tuple[float, ...] | None = None,
    ) -> Ranges:
        """Input ranges as these schemes use them: around their middle where the input is shifted, else around zero.

        At `timesteps`, or at those of the trajectory. All calls at one timestep share a range.
        """
        import torch

        from intaglio.pipeline.quant.affine import half_range
        from intaglio.pipeline.quant.step_table import largest_of_repeated, resample_linear, resample_magnitude

        known, wanted = self.timesteps, timesteps or self.timesteps
        low = {**self.low, **{name: layer.low_T for name, layer in balances.items()}}
        high = {**self.high, **{name: layer.high_T for name, layer in balances.items()}}
        low = {name: -largest_of_repeated(-end, known) for name, end in low.items()}
        high = {name: largest_of_repeated(end, known) for name, end in high.items()}
        output_amax = {name: largest_of_repeated(amax, known) for name, amax in self.output_amax.items()}
        amax = {name: torch.maximum(-low[name], high[name]) for name in low}
        shift = {}
        for name, scheme in schemes.items():
            if isinstance(scheme.input, IntInput) and scheme.input.shifted:
                amax[name], shift[name] = half_range(low[name], high[name])
        return Ranges(
            {name: resample_magnitude(table, known, wanted) for name, table in amax.items()},
            {name: resample_magnitude(table, known, wanted) for name, table in output_amax.items()},
            {name: resample_linear(table, known, wanted) for name, table in shift.items()},
            {name: layer.balance for name, layer in balances.items()},
        )

    def call(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Inputs of the call at `step`."""
        return {name: value[step, rows] for name, value in self.inputs.items()}

    def save(self, root: Path) -> None:
        """Write trajectory.safetensors and trajectory.json."""
        from safetensors.torch import save_file

        parts = {
            "input.": self.inputs,
            "amax.": self.amax,
            "output_amax.": self.output_amax,
            "low.": self.low,
            "high.": self.high,
        }
        tensors = {f"{part}{k}": v.contiguous() for part, values in parts.items() for k, v in values.items()}
        save_file(tensors | {"outputs": self.outputs.contiguous()}, root / "trajectory.safetensors")
        (root / "trajectory.json").write_text(json.dumps({"timesteps": self.timesteps}) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(root / "trajectory.safetensors")
        names = ("input.", "amax.", "output_amax.", "low.", "high.")
        part = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in names}
        timesteps = json.loads((root / "trajectory.json").read_text())["timesteps"]
        return cls(
            tuple(timesteps), part["input."], tensors["outputs"], *(part[name] for name in names if name != "input.")
        )
