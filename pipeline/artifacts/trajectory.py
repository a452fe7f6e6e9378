"""Recorded calls of the full-precision denoiser, and the ranges of layer inputs in them.

Shapes: T denoising steps, R rows of a call, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Self

from intaglio.pipeline.files import OPTIONAL, damage_of, load_tensors, read_typed, write_typed
from intaglio.pipeline.formats.schemes import LayerScheme, RoundedInput
from intaglio.pipeline.numerics.quality import SampleRange

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.formats.layer_tables import LayerTables
    from intaglio.pipeline.numerics.basis import LayerBalance


@dataclass(frozen=True)
class Trajectory:
    """Every call from noise to sample, by step: inputs (T, R, ...) by name, outputs (T, R, ...).

    `conditions` (R, ...) are inputs that are the same at every step, `shared` those that the rows have in common.
    `amax` is the largest input magnitude of each layer at each step, (T,) by layer name; `output_amax` is the
    largest magnitude, (T, N), of each channel of a convolution's output without the bias; `low` and `high` are the
    smallest and the largest value of each layer's input. If a layer is called several times in one step, its range
    covers all these calls. Layers that these calls do not use are in none of these mappings.
    `samples` is the range of the final samples; every later pass uses it as the peak of PSNR.
    `half`: files store inputs and outputs in float16, but only tensors that float16 holds exactly.
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
    samples: SampleRange = field(kw_only=True)
    half: bool = field(default=False, kw_only=True)

    def called(self, schemes: Mapping[str, LayerScheme]) -> dict[str, LayerScheme]:
        """Return the schemes of the layers that the calls reach. All other layers stay in float."""
        return {name: scheme for name, scheme in schemes.items() if name in self.low}

    def tables(
        self,
        schemes: Mapping[str, LayerScheme],
        balances: Mapping[str, LayerBalance] = MappingProxyType({}),
        timesteps: tuple[float, ...] | None = None,
    ) -> dict[str, LayerTables]:
        """Return the calibrated tables of these layers, at `timesteps` or at those of the trajectory, by layer name.

        Ranges are around their middle where the scheme shifts the input, else around zero, and in the basis of the
        layer's balance. All calls at one timestep share a range. Layers that the calls do not reach are left out.
        """
        return {
            name: self._tables_of(name, scheme, balances.get(name)).resampled(
                self.timesteps, timesteps or self.timesteps
            )
            for name, scheme in schemes.items()
            if name in self.low
        }

    def _tables_of(self, name: str, scheme: LayerScheme, balance: LayerBalance | None) -> LayerTables:
        """Return the tables of one layer at the timesteps of the calls."""
        import torch

        from intaglio.pipeline.formats.layer_tables import LayerTables
        from intaglio.pipeline.numerics.rounding import half_range, output_ranges
        from intaglio.pipeline.numerics.step_tables import largest_of_repeated

        low, high = (self.low[name], self.high[name]) if balance is None else (balance.low_T, balance.high_T)
        low, high = -largest_of_repeated(-low, self.timesteps), largest_of_repeated(high, self.timesteps)
        shift_T = None
        if scheme.shifted:
            amax_T, shift_T = half_range(low, high)
        else:
            amax_T = torch.maximum(-low, high)
        if isinstance(scheme.input, RoundedInput):
            amax_T = amax_T * scheme.input.headroom
        output_amax_T, share_N = None, None
        if name in self.output_amax:
            output_amax_T, share_N = output_ranges(largest_of_repeated(self.output_amax[name], self.timesteps))
        return LayerTables(amax_T, shift_T, output_amax_T, output_share_N=share_N)

    def some_rows(self, least: int) -> slice:
        """Return evenly spread rows of a call: at least `least` of them, or all rows where there are fewer."""
        return slice(None, None, max(1, self.outputs.shape[1] // least))

    def call(self, step: int, rows: slice | Sequence[int] = slice(None)) -> dict[str, torch.Tensor]:
        """Return the inputs of these rows of the call at `step`, contiguous as in the pipeline's own calls."""
        own = {name: value[step][rows] for name, value in self.inputs.items()}
        own |= {name: value[rows] for name, value in self.conditions.items()}
        return {name: value.contiguous() for name, value in own.items()} | dict(self.shared)

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
        write_typed(
            root / "trajectory.json", _Settings(self.timesteps, self.samples, self.half), _Settings, indent=None
        )

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
            return cls(
                settings.timesteps,
                part["input."],
                tensors["outputs"],
                *others,
                samples=settings.samples,
                half=settings.half,
            )


@dataclass(frozen=True)
class _Settings:
    """The content of trajectory.json."""

    timesteps: tuple[float, ...]
    samples: SampleRange
    half: Annotated[bool, OPTIONAL] = False


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 tensor in float16 where that is exact, and any other tensor as it is."""
    import torch

    exact = tensor.dtype == torch.float32 and tensor.half().float().equal(tensor)
    return tensor.half() if exact else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float16 tensor in float32, and any other tensor as it is."""
    import torch

    return tensor.float() if tensor.dtype == torch.float16 else tensor
