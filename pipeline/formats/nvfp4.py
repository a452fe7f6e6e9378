"""Define NVFP4: E2M1 numbers in blocks of 16, each block with an E4M3 scale; GPUs from Blackwell on multiply them.

Shapes: N output features, K input features, G = K // 16 blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from intaglio.pipeline.formats.inputs import Float, Multiplied, PerStep, RoundedInput, Static
from intaglio.pipeline.formats.schemes import LayerScheme
from intaglio.pipeline.formats.weights import RoundedWeight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from intaglio.pipeline.numerics.rounding import Grid


class Nvfp4Weight(RoundedWeight):
    """Weight as E2M1 numbers up to 6, w: (N, K) -> block scales in E4M3: (N, K // 16), and one scale: (1, 1)."""

    compute_capability: ClassVar[str | None] = "10.0"
    fixed_group: ClassVar[bool] = True
    linear_only: ClassVar[bool] = True

    kind: Literal["nvfp4"] = "nvfp4"
    bits: Literal[4] = 4

    @property
    def low(self) -> int:
        """Smallest code."""
        return -7

    @property
    def high(self) -> int:
        """Largest code: 7 numbers are positive."""
        return 7

    @property
    def group_size(self) -> int:
        """Number of neighbouring input features that share a block scale."""
        return 16

    @property
    def label(self) -> str:
        """The weight's part of a scheme's name."""
        return "nvfp4"

    @property
    def bits_per_weight(self) -> float:
        """Bits of each weight, with its share of the block scale."""
        return self.bits + 8 / self.group_size

    @property
    def scales(self) -> str:
        """Shapes of the weight and its scales, in one line."""
        return "One scale for each block of 16, w: (N, K) -> scale: (N, K // 16), and one for the tensor: (1, 1)."

    def scale_bytes(self, n: int) -> int:
        """Return the bytes of the tensor's scale."""
        return 4

    @property
    def grid(self) -> Grid:
        """The codes, the numbers that they stand for, and the blocks."""
        from intaglio.pipeline.numerics.minifloat import E2M1
        from intaglio.pipeline.numerics.rounding import Grid

        return Grid(self.low, self.high, self.group_size, E2M1)

    def problem_with(self, form: Float | RoundedInput) -> str | None:
        """Return why this weight cannot be multiplied with such an input, or None."""
        return None if isinstance(form, Float | Nvfp4Input) else "NVFP4 weights multiply float or NVFP4 inputs only"

    def fit(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tensor's scale (1, 1), and block scales (N, G) that were chosen by the least squared error."""
        from intaglio.pipeline.numerics import rounding
        from intaglio.pipeline.numerics.minifloat import E4M3

        alone_NG = rounding.fit_clipped(w_NK, self.grid)
        scale = (alone_NG.amax() / E4M3.largest).reshape(1, 1)
        return scale, self._block_scales(alone_NG / scale)

    def code_scale(self, scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> torch.Tensor:
        """Return the scale of the numbers, (N, G): the tensor's scale times the block scales rounded to E4M3."""
        assert group_NG is not None  # `fit` returns them
        return scale_NG * self._block_scales(group_NG)

    def stored_groups(self, group_NG: torch.Tensor) -> torch.Tensor:
        """Return the block scales, torch.float8_e4m3fn (N, G)."""
        import torch

        return self._block_scales(group_NG.detach()).to(torch.float8_e4m3fn)

    def _block_scales(self, group_NG: torch.Tensor) -> torch.Tensor:
        """Round block scales to E4M3, but never to zero, so that a block of zeros can be divided by its scale."""
        from intaglio.pipeline.numerics.minifloat import E4M3

        return E4M3.nearest(group_NG.clamp_min(E4M3.smallest))

    def elements(self, q_NK: torch.Tensor) -> NDArray[np.generic]:
        """Return the numbers, float4_e2m1fn of ml_dtypes (N, K)."""
        import ml_dtypes

        numbers: NDArray[np.generic] = self.grid.decode(q_NK).numpy().astype(ml_dtypes.float4_e2m1fn)
        return numbers

    def pack(self, q_NK: torch.Tensor) -> torch.Tensor:
        """Return two numbers in each byte, the first in the low bits: each is a sign bit and its magnitude's code."""
        import torch

        from intaglio.pipeline.numerics.packing import pack_int4

        return torch.from_numpy(pack_int4(torch.where(q_NK < 0, -8 - q_NK, q_NK).numpy()))

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes, int8 of this shape. Raises ValueError if the bytes hold another number of codes."""
        import torch

        from intaglio.pipeline.numerics.packing import unpack_int4

        bits = torch.from_numpy(unpack_int4(stored.numpy(), shape))
        return torch.where(bits < 0, -8 - bits, bits)


class Nvfp4Input(RoundedInput):
    """Input as E2M1 numbers in blocks of 16 features.

    The scale of each block, in E4M3, is measured at run time; the scale of the tensor is calibrated. Block scales have
    the same relative accuracy over a range of 28,000, so the scale of the tensor leaves room for inputs that are larger
    than the calibrated ones: otherwise whole blocks of them would be clipped.
    """

    multiplied: ClassVar[Multiplied] = "fp4"
    headroom: ClassVar[float] = 4.0

    kind: Literal["nvfp4"] = "nvfp4"
    bits: Literal[4] = 4
    granularity: Annotated[PerStep | Static, Field(discriminator="kind")]
    shifted: Literal[False] = False

    @property
    def label(self) -> str:
        """Empty: NVFP4 weights have no other quantized inputs."""
        return ""

    @property
    def bits_stored(self) -> float:
        """Bits of a number in memory, with its share of the block scale."""
        return 4.5

    def round(self, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the numbers, and the scale of each, in the shape of the input (..., K)."""
        from intaglio.pipeline.numerics import minifloat

        return minifloat.round_blocks(unit)

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes of these numbers, int8."""
        from intaglio.pipeline.numerics.minifloat import E2M1

        return E2M1.encode(numbers)


NVFP4_STEP = LayerScheme(weight=Nvfp4Weight(), input=Nvfp4Input(granularity=PerStep()))
NVFP4_STATIC = LayerScheme(weight=Nvfp4Weight(), input=Nvfp4Input(granularity=Static()))
NVFP4A16 = LayerScheme(weight=Nvfp4Weight(), input=Float())


def nvfp4_schemes(group: int) -> Iterator[LayerScheme]:
    """Yield the schemes of NVFP4 weights, whose blocks have 16 input features."""
    yield from (NVFP4_STEP, NVFP4_STATIC, NVFP4A16)
