"""Recorded calls of the full-precision denoiser, and the input ranges that were seen on the way.

Shapes: T denoising steps, R rows of a call, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Self

from intaglio.pipeline.files import damage_of, load_tensors, read_typed
from intaglio.pipeline.formats.schemes import IntInput, LayerScheme

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.numerics.basis import Balance, LayerBalance


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

    `conditions` (R, ...) are inputs that are the same at every step, `shared` those that the rows have in common.
    `amax` is the largest input magnitude of each layer at each step, (T,) by layer name; `output_amax` is the largest
    output magnitude, without the bias, of each convolution; `low` and `high` are the ends of each layer's input. All
    calls of a layer at one step count together. A layer that has no part in these calls is in none of them.
    `half`: files have those inputs and outputs in float16 that it holds exactly.
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
    half: bool = field(default=False, kw_only=True)

    def called(self, schemes: Mapping[str, LayerScheme]) -> dict[str, LayerScheme]:
        """Schemes of those layers that have a part in the calls: all others stay in float."""
        return {name: scheme for name, scheme in schemes.items() if name in self.low}

    def ranges(
        self,
        schemes: Mapping[str, LayerScheme],
        balances: Mapping[str, LayerBalance] = MappingProxyType({}),
        timesteps: tuple[float, ...] | None = None,
    ) -> Ranges:
        """What these layers need, in ranges around their middle where the scheme shifts the input, else around zero.

        At `timesteps`, or at those of the trajectory. All calls at one timestep share a range.
        """
        import torch

        from intaglio.pipeline.numerics.rounding import half_range
        from intaglio.pipeline.numerics.step_tables import largest_of_repeated, resample_linear, resample_magnitude

        known, wanted = self.timesteps, timesteps or self.timesteps
        amax, output_amax, shift = {}, {}, {}
        for name, scheme in schemes.items():
            if name not in self.low:  # never called
                continue
            ends = balances.get(name)
            low, high = (self.low[name], self.high[name]) if ends is None else (ends.low_T, ends.high_T)
            low, high = -largest_of_repeated(-low, known), largest_of_repeated(high, known)
            if isinstance(scheme.input, IntInput) and scheme.input.shifted:
                half, middle = half_range(low, high)
                shift[name] = resample_linear(middle, known, wanted)
            else:
                half = torch.maximum(-low, high)
            amax[name] = resample_magnitude(half, known, wanted)
            if name in self.output_amax:
                largest = largest_of_repeated(self.output_amax[name], known)
                output_amax[name] = resample_magnitude(largest, known, wanted)
        balance = {name: layer.balance for name, layer in balances.items()}
        return Ranges(amax, output_amax, shift, balance)

    def some_rows(self, least: int) -> slice:
        """Rows of a call, evenly spread: as many as `least`, or more, or all there are."""
        return slice(None, None, max(1, self.outputs.shape[1] // least))

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
        tensors["outputs"] = self.outputs.contiguous()
        if self.half:
            tensors |= {n: _halved(tensors[n]) for n in ("outputs", *(f"input.{name}" for name in self.inputs))}
        save_file(tensors, root / "trajectory.safetensors")
        settings = {"timesteps": self.timesteps} | ({"half": True} if self.half else {})
        (root / "trajectory.json").write_text(json.dumps(settings) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        settings = read_typed(root / "trajectory.json", _Settings)
        file = root / "trajectory.safetensors"
        tensors = load_tensors(file)
        if settings.half:
            tensors |= {n: _whole(tensor) for n, tensor in tensors.items() if n == "outputs" or n.startswith("input.")}
        names = ("input.", "amax.", "output_amax.", "low.", "high.", "condition.", "shared.")
        part = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in names}
        others = (part[name] for name in names if name != "input.")
        with damage_of(file):
            return cls(settings.timesteps, part["input."], tensors["outputs"], *others, half=settings.half)


@dataclass(frozen=True)
class _Settings:
    """Content of trajectory.json."""

    timesteps: tuple[float, ...]
    half: bool = False


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """In float16, if nothing of its float32 is lost."""
    import torch

    exact = tensor.dtype == torch.float32 and tensor.half().float().equal(tensor)
    return tensor.half() if exact else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 again."""
    import torch

    return tensor.float() if tensor.dtype == torch.float16 else tensor
