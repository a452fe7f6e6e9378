"""Define the tables of one layer, by denoising step, as one value. The module imports nothing heavy.

Shapes: T denoising steps, S wanted timesteps, N output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from intaglio.pipeline.formats.schemes import Float

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.formats.schemes import LayerScheme


@dataclass(frozen=True)
class LayerTables:
    """The tables of one layer, float32, (T,) unless said otherwise: one entry for each denoising step.

    None: the layer has no such table.

    `amax_T`: largest magnitude of the input; half the width of its range where the scheme shifts the input. A single
    number, (), if the scheme has one scale for all calls.
    `shift_T`: middle of the input's range, where the scheme shifts the input.
    `output_amax_T`: largest magnitude of the product without the bias, where the scheme rounds the output. Each channel
    is divided by its share first.
    `factor_T`: factor on each token's magnitude, if the range of tokens is clipped.
    `output_share_N`: largest magnitude of each channel of the product relative to that of all channels, (N,), the same
    at every step. None: all channels have the same range.
    """

    amax_T: torch.Tensor | None = None
    shift_T: torch.Tensor | None = None
    output_amax_T: torch.Tensor | None = None
    factor_T: torch.Tensor | None = None
    output_share_N: torch.Tensor | None = None

    @property
    def stepped(self) -> bool:
        """Return whether a layer with these tables needs to know its denoising step."""
        return (self.amax_T is not None and self.amax_T.ndim > 0) or self.factor_T is not None

    def needed_by(self, scheme: LayerScheme, *, padded: bool = False) -> LayerTables:
        """Return the tables that this scheme needs. Raises ValueError if one of them is missing.

        `padded`: True if the layer pads its input with zeros. Then one code of a shifted range stands for exactly zero.
        If the output is rounded, this holds with or without padding, and the code is the same at every step.
        """
        from intaglio.pipeline.numerics.rounding import TOKEN_EPS, with_one_zero, with_zero

        stepped, rounded = scheme.by_step or scheme.static, not isinstance(scheme.output, Float)
        shifted = stepped and scheme.shifted
        if stepped and self.amax_T is None:
            raise ValueError("a scale that is not measured at run time needs the calibrated input ranges")
        if shifted and self.shift_T is None:
            raise ValueError("a shifted input needs the middle of its range at each step")
        if rounded and self.output_amax_T is None:
            raise ValueError("a rounded output needs the calibrated output ranges")
        amax_T = self.amax_T.clamp_min(TOKEN_EPS) if stepped and self.amax_T is not None else None
        shift_T = self.shift_T if shifted else None
        if (padded or rounded) and amax_T is not None and shift_T is not None:
            amax_T, shift_T = (with_one_zero if rounded else with_zero)(amax_T, shift_T, scheme.input_bits)
        if scheme.static and amax_T is not None:
            amax_T = amax_T.amax()
        return LayerTables(
            amax_T=amax_T,
            shift_T=shift_T,
            output_amax_T=self.output_amax_T if rounded else None,
            factor_T=self.factor_T,
            output_share_N=self.output_share_N if rounded else None,
        )

    def resampled(self, timesteps: tuple[float, ...], wanted: tuple[float, ...]) -> LayerTables:
        """Return the tables at the `wanted` timesteps (S,), interpolated from those at `timesteps` (T,)."""
        from intaglio.pipeline.numerics.step_tables import resample_linear, resample_magnitude

        def magnitude(values_T: torch.Tensor | None) -> torch.Tensor | None:
            if values_T is None or not values_T.ndim:
                return values_T
            return resample_magnitude(values_T, timesteps, wanted)

        shift_S = None if self.shift_T is None else resample_linear(self.shift_T, timesteps, wanted)
        return LayerTables(
            magnitude(self.amax_T),
            shift_S,
            magnitude(self.output_amax_T),
            magnitude(self.factor_T),
            self.output_share_N,
        )

    def replaced_by(self, learnt: LayerTables) -> LayerTables:
        """Return these tables, each replaced by that of `learnt` if `learnt` has it."""
        return LayerTables(**{n: own if (new := getattr(learnt, n)) is None else new for n, own in vars(self).items()})


NO_TABLES = LayerTables()
"""The tables of a layer that has none."""
