"""Define the branch: the low-rank part of a weight that stays in float, beside a product on integers.

Shapes: N out features, K in features (of a convolution: input channels times kernel), R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from intaglio.pipeline.files import damage_of, load_tensors


@dataclass(frozen=True)
class Branch:
    """Branch of a weight w = (w - up down) + up down, whose first term is rounded: y = x_hat w_hat^T + (x down^T) up^T.

    Both factors are in the basis of the layer's balance; `down` (R, K) and `up` (N, R) are float32 numbers that float16
    holds exactly. (SVDQuant, Li et al. 2025, section 4.2.)
    """

    down_RK: torch.Tensor
    up_NR: torch.Tensor

    @classmethod
    def of(cls, w_NK: torch.Tensor, rank: int) -> Branch:
        """Return the nearest branch of this rank, its factors rounded. Raises ValueError for factors beyond float16."""
        w = w_NK.detach().double()
        # singular vectors as eigenvectors of the smaller of w^T w and w w^T, which need no random start
        tall = w.shape[0] >= w.shape[1]
        vectors = torch.linalg.eigh(w.T @ w if tall else w @ w.T).eigenvectors[:, -rank:]
        down, up = (vectors.T, w @ vectors) if tall else (vectors.T @ w, vectors)
        size = (down.norm() / up.norm().clamp_min(1e-30)).sqrt()  # both factors get the same norm
        down, up = (down / size).half().float(), (up * size).half().float()
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError("the low-rank part of the weight is beyond the range of float16")
        return cls(down.contiguous(), up.contiguous())

    @property
    def rank(self) -> int:
        """Return the number of rows of the branch's first factor."""
        return len(self.down_RK)

    @property
    def size_bytes(self) -> int:
        """Return the size of both factors in bytes, stored in float16."""
        return 2 * (self.down_RK.numel() + self.up_NR.numel())

    def rest(self, w_NK: torch.Tensor) -> torch.Tensor:
        """Return the part of the weight that is rounded, (N, K)."""
        return w_NK - self.up_NR.to(w_NK) @ self.down_RK.to(w_NK)


def branch_tensors(branches: Mapping[str, Branch]) -> dict[str, torch.Tensor]:
    """Return the factors for a safetensors file, in float16."""
    parts = {n: (("down", b.down_RK), ("up", b.up_NR)) for n, b in branches.items()}
    return {f"{n}:branch-{part}": value.half() for n, both in parts.items() for part, value in both}


def branches_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Branch]:
    """Read the branches that `branch_tensors` wrote, among other tensors."""
    names = sorted(name.removesuffix(":branch-down") for name in tensors if name.endswith(":branch-down"))
    return {n: Branch(*(tensors[f"{n}:branch-{part}"].float() for part in ("down", "up"))) for n in names}


def save_branches(branches: Mapping[str, Branch], path: Path) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    save_file(branch_tensors(branches), path)


def load_branches(path: Path) -> dict[str, Branch]:
    """Read what `save_branches` wrote."""
    with damage_of(path):
        return branches_of(load_tensors(path))
