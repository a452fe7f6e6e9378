"""Define the basis of a layer's input: the output without rounding stays the same, and rounding can cost less.

Shapes: C input channels (the K in features of a linear layer), N out features, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.files import damage_of, load_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Balance:
    """Basis of an input: x -> (x * d) H and w -> (w / d) H / block along the channels; x w^T stays as it is.

    H is block diagonal; its blocks are Sylvester's matrix of 1 and -1, so that H H = block. Blocks of 1 rotate nothing.
    d also contains the random signs of the rotation and its factor 1 / sqrt(block), so using the basis draws no random
    numbers. (Channel scale: SmoothQuant, Xiao et al. 2023, Eq. 3. Rotation: QuaRot, Ashkboos et al. 2024, section 3.)
    """

    scale_C: torch.Tensor
    block: int = 1

    def __post_init__(self) -> None:
        channels = len(self.scale_C)
        if self.block < 1 or self.block & (self.block - 1) or channels % self.block:
            raise ValueError(f"blocks of {self.block} channels: only a power of two that divides {channels}")
        if not (self.scale_C.isfinite() & (self.scale_C != 0)).all():
            raise ValueError("a channel's scale is zero or not finite")

    @classmethod
    def rotated(cls, scale_C: torch.Tensor, block: int, generator: torch.Generator) -> Balance:
        """Return the basis of scaled channels with random signs, then rotated: (x * scale * sign) H / sqrt(block)."""
        signs_C = torch.randint(2, scale_C.shape, generator=generator) * 2 - 1
        return cls(scale_C * signs_C / block**0.5, block)

    @property
    def key(self) -> bytes:
        """Bytes that are equal for equal bases, even if these were stored and read separately."""
        return self.block.to_bytes(4, "little") + self.scale_C.numpy().tobytes()

    def input(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Return (x * d) H, the channels along `axis`, which is negative."""
        return self._rotate(x * self.scale_C.to(x).reshape(-1, *[1] * (-1 - axis)), axis)

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """Return (w / d) H / block: w (N, C), (N, C, kh, kw), or (N, C / groups, kh, kw) of a grouped convolution.

        No block may contain channels of two groups.
        """
        scaled = in_groups(w, len(self.scale_C)) / self._scale_of(w)
        return self._rotate(scaled, 1 - w.dim()).reshape(w.shape) / self.block

    def by_input(self, gradient: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the gradient with respect to `input(x)`, given that with respect to x; `axis` of channels < 0."""
        scaled = gradient / self.scale_C.to(gradient).reshape(-1, *[1] * (-1 - axis))
        return self._rotate(scaled, axis) / self.block

    def by_weight(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to `weight(w)`, given that with respect to w; both have the shape of w."""
        scaled = in_groups(gradient, len(self.scale_C)) * self._scale_of(gradient)
        return self._rotate(scaled, 1 - gradient.dim()).reshape(gradient.shape)

    def _scale_of(self, w: torch.Tensor) -> torch.Tensor:
        """Return d in the shape that broadcasts over a weight in groups: (groups, 1, C / groups, 1, ...)."""
        return self.scale_C.to(w).reshape(-1, 1, w.shape[1], *[1] * (w.dim() - 2))

    def _rotate(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        if self.block == 1:
            return x
        last = x.movedim(axis, -1)
        rotated = last.reshape(*last.shape[:-1], -1, self.block) @ hadamard(self.block).to(x)
        return rotated.reshape(last.shape).movedim(-1, axis)


def in_groups(w: torch.Tensor, channels: int) -> torch.Tensor:
    """Return a weight (N, C / groups, ...) as (groups, N / groups, C / groups, ...), for C input channels."""
    return w.reshape(channels // w.shape[1], -1, *w.shape[1:])


def hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's matrix H of 1 and -1, float32 (size, size): symmetric, H H = size, a power of two."""
    from scipy.linalg import hadamard as sylvester

    return torch.from_numpy(sylvester(size)).float()


@dataclass(frozen=True)
class LayerBalance:
    """The basis chosen for one layer, and the ends of its input's range in this basis at each step, (T,).

    `gain_db` is the gain in SQNR of the outputs of all layers that read this input; None if the basis was imported.
    """

    balance: Balance
    low_T: torch.Tensor
    high_T: torch.Tensor
    gain_db: float | None = None


def bases_of(balances: Mapping[str, LayerBalance]) -> dict[str, Balance]:
    """Return the bases alone, by layer name."""
    return {name: layer.balance for name, layer in balances.items()}


def save_balances(balances: Mapping[str, LayerBalance], path: Path) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    # copies: siblings may share one balance
    save_file({f"{n}:{part}": v.clone() for n, b in balances.items() for part, v in _tensors(b)}, path)


def load_balances(path: Path) -> dict[str, LayerBalance]:
    """Read what `save_balances` wrote."""
    tensors = load_tensors(path)
    names = sorted(key.removesuffix(":block") for key in tensors if key.endswith(":block"))
    with damage_of(path):
        return {
            n: LayerBalance(
                Balance(tensors[f"{n}:scale"], int(tensors[f"{n}:block"])),
                tensors[f"{n}:low"],
                tensors[f"{n}:high"],
                float(tensors[f"{n}:gain"]) if f"{n}:gain" in tensors else None,
            )
            for n in names
        }


def _tensors(layer: LayerBalance) -> Iterator[tuple[str, torch.Tensor]]:
    yield "scale", layer.balance.scale_C
    yield "block", torch.tensor(layer.balance.block)
    yield "low", layer.low_T
    yield "high", layer.high_T
    if layer.gain_db is not None:
        yield "gain", torch.tensor(layer.gain_db, dtype=torch.float64)
