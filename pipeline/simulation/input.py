"""Round the input of a layer, with a scale for each token or for each denoising step.

Shapes: T denoising steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, assert_never

import torch
from torch import nn

from intaglio.pipeline.formats.schemes import PerStep, PerToken, RoundedInput, Static
from intaglio.pipeline.numerics import rounding

if TYPE_CHECKING:
    from intaglio.pipeline.formats.layer_tables import LayerTables
    from intaglio.pipeline.model.step_clock import StepClock


Zero: TypeAlias = Literal["exact", "one"] | None


class InputCodes(NamedTuple):
    """A rounded input: x ~= codes * scale * amax + shift.

    `codes` are integers, or the numbers of a format of floats, as float32. `scale` is one number, or has the shape of
    the input. `amax` is the number that the input was divided by, (..., 1) or (). `shift` is the middle of the range,
    in the shape of `amax`; None where the range is symmetric.
    """

    codes: torch.Tensor
    scale: torch.Tensor | float
    amax: torch.Tensor
    shift: torch.Tensor | None


class TrainedRange(Protocol):
    """Trained change of the input's range, for each denoising step."""

    def factor(self, step: int) -> torch.Tensor:
        """Return the factor on the magnitude, ()."""

    def offset(self, step: int) -> torch.Tensor:
        """Return the shift of the middle, in units of the magnitude, ()."""


class InputRounding(nn.Module):
    """Rounds an input that is in the basis of the layer's balance. `trained`, where it is set, changes its range.

    `zero` says which code means zero if the range is shifted. "exact": each step has its own such code. "one": all
    steps have the same code, a zero point, which training does not change. None: no code has to mean zero.
    """

    def __init__(self, form: RoundedInput, tables: LayerTables, clock: StepClock, *, zero: Zero = None) -> None:
        super().__init__()
        self.form, self.clock, self.zero = form, clock, zero
        self.trained: TrainedRange | None = None
        self.amax_T: torch.Tensor | None
        self.shift_T: torch.Tensor | None
        self.factor_T: torch.Tensor | None
        for name in ("amax_T", "shift_T", "factor_T"):
            table = getattr(tables, name)
            self.register_buffer(name, None if table is None else table.clone())

    def forward(self, x: torch.Tensor) -> InputCodes:
        """Round x, (..., K) with a scale for each token; (..., K) or (B, C, H, W) with a scale for each step."""
        match self.form.granularity:
            case PerToken():
                amax, shift = rounding.token_range(x) if self.form.shifted else (rounding.token_amax(x), None)
                if (factor := self._token_factor()) is not None:
                    amax = amax * factor
                unit = (x if shift is None else x - shift) / amax
            case PerStep() | Static():
                amax, shift = self.step_range(0 if self._for_all_steps else self.clock.step)
                if self.zero == "one" and shift is not None:
                    code = rounding.shift_codes(amax, shift, self.form.bits)
                    codes = rounding.input_codes_around(x * (1 / amax), code, self.form.bits)
                    return InputCodes(codes, rounding.input_scale(self.form.bits), amax, shift)
                unit = (x if shift is None else x - shift) * (1 / amax)
            case other:
                assert_never(other)
        return InputCodes(*self.form.round(unit), amax, shift)

    @property
    def _for_all_steps(self) -> bool:
        """True where one calibrated magnitude serves all steps, so that no step has to be set."""
        return self.amax_T is not None and not self.amax_T.ndim

    def _token_factor(self) -> torch.Tensor | None:
        """Return the factor on the magnitude of every token, (), at the clock's step; None if there is none."""
        if self.trained is not None:
            return self.trained.factor(self.clock.step)
        return None if self.factor_T is None else self.factor_T[self.clock.step]

    def step_range(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return magnitude and middle of the input's range, both (), at a denoising step; no middle if symmetric."""
        assert self.amax_T is not None  # `LayerTables.needed_by` ensures it
        amax = self.amax_T if self._for_all_steps else self.amax_T[step]
        shift = None if self.shift_T is None else self.shift_T[step]
        if self.trained is None:
            return amax, shift
        if shift is None or self.zero == "one":
            factor = self.trained.factor(step)
            return amax * factor, None if shift is None else shift * factor
        amax, shift = amax * self.trained.factor(step), shift + self.trained.offset(step) * amax
        return rounding.with_zero(amax, shift, self.form.bits) if self.zero == "exact" else (amax, shift)
