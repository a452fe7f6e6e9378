"""A weight format in one file: 6-bit codes, four of them in three bytes, in front of inputs with a scale a token."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from intaglio.pipeline.formats.schemes import IntInput, LayerScheme, PerToken, RoundedWeight
from intaglio.pipeline.numerics import rounding


class SixBitWeight(RoundedWeight):
    """w: (N, K) -> scale: (N, 1)"""

    kind: Literal["six"] = "six"
    bits: Literal[6] = 6

    @property
    def low(self) -> int:
        return -31

    @property
    def high(self) -> int:
        return 31

    def fit(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return rounding.fit_clipped(w_NK, self.grid), None

    def pack(self, q_NK: torch.Tensor) -> torch.Tensor:
        above_low = q_NK.numpy().reshape(-1, 1).astype(np.int16) - self.low
        return torch.from_numpy(np.packbits((above_low >> np.arange(6)) & 1))

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        bits = np.unpackbits(stored.numpy(), count=6 * int(np.prod(shape))).reshape(-1, 6)
        return torch.from_numpy((bits @ (1 << np.arange(6)) + self.low).astype(np.int8).reshape(shape))


W6A8_TOKEN = LayerScheme(weight=SixBitWeight(), input=IntInput(granularity=PerToken()))


def six_bit_schemes(group: int) -> Iterator[LayerScheme]:
    yield W6A8_TOKEN
