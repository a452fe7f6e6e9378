"""Define FP8: weights and inputs as 8-bit floating-point numbers E4M3, which GPUs from Ada on multiply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from intaglio.pipeline.formats.inputs import Float, Multiplied, PerStep, PerToken, RoundedInput, Static
from intaglio.pipeline.formats.schemes import LayerScheme
from intaglio.pipeline.formats.weights import RoundedWeight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from intaglio.pipeline.numerics.rounding import Grid


class Fp8Weight(RoundedWeight):
    """Weight as E4M3 numbers up to 448 with one scale for each output channel."""

    compute_capability: ClassVar[str | None] = "8.9"

    kind: Literal["fp8"] = "fp8"
    bits: Literal[8] = 8

    @property
    def low(self) -> int:
        """Smallest code."""
        return -126

    @property
    def high(self) -> int:
        """Largest code: 126 numbers are positive."""
        return 126

    @property
    def label(self) -> str:
        """The weight's part of a scheme's name."""
        return "fp8"

    @property
    def grid(self) -> Grid:
        """The codes, and the numbers that they stand for."""
        from intaglio.pipeline.numerics.minifloat import E4M3
        from intaglio.pipeline.numerics.rounding import Grid

        return Grid(self.low, self.high, floats=E4M3)

    def problem_with(self, form: Float | RoundedInput) -> str | None:
        """Return why this weight cannot be multiplied with such an input, or None."""
        return None if isinstance(form, Fp8Input) else "FP8 weights multiply FP8 inputs only"

    def fit(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales (N, 1) with which the largest magnitude of each channel becomes 448, and None."""
        from intaglio.pipeline.numerics import rounding

        return rounding.fit_largest(w_NK, self.grid), None

    def elements(self, q_NK: torch.Tensor) -> NDArray[np.generic]:
        """Return the numbers, float8_e4m3fn of ml_dtypes (N, K)."""
        import ml_dtypes

        numbers: NDArray[np.generic] = self.grid.decode(q_NK).numpy().astype(ml_dtypes.float8_e4m3fn)
        return numbers

    def pack(self, q_NK: torch.Tensor) -> torch.Tensor:
        """Return the numbers in torch.float8_e4m3fn, one byte each."""
        import torch

        return self.grid.decode(q_NK).to(torch.float8_e4m3fn).contiguous()

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes, int8 of this shape. Raises ValueError if the sizes differ, or for NaN."""
        numbers = super().unpack(stored, shape).float()
        if not numbers.isfinite().all():
            raise ValueError("an FP8 weight has NaN")
        return self.grid.encode(numbers)


class Fp8Input(RoundedInput):
    """Input as E4M3 numbers, x ~= scale * number with numbers up to 448; larger ones become 448."""

    multiplied: ClassVar[Multiplied] = "fp8"

    kind: Literal["fp8"] = "fp8"
    bits: Literal[8] = 8
    granularity: Annotated[PerToken | PerStep | Static, Field(discriminator="kind")]
    shifted: Literal[False] = False

    @property
    def label(self) -> str:
        """Empty: FP8 weights have no other inputs."""
        return ""

    def round(self, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the numbers and their scale, 1/448."""
        from intaglio.pipeline.numerics.minifloat import E4M3

        return E4M3.nearest(unit / E4M3.unit), E4M3.unit

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes of these numbers, int8."""
        from intaglio.pipeline.numerics.minifloat import E4M3

        return E4M3.encode(numbers)


FP8_TOKEN = LayerScheme(weight=Fp8Weight(), input=Fp8Input(granularity=PerToken()))
FP8_STEP = LayerScheme(weight=Fp8Weight(), input=Fp8Input(granularity=PerStep()))
FP8_STATIC = LayerScheme(weight=Fp8Weight(), input=Fp8Input(granularity=Static()))


def fp8_schemes(group: int) -> Iterator[LayerScheme]:
    """Yield the schemes of FP8 weights, which have no groups."""
    yield from (FP8_TOKEN, FP8_STEP, FP8_STATIC)
