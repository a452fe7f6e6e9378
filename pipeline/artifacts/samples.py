"""Samples that full precision drew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from intaglio.pipeline.files import damage_of, load_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Samples:
    """Samples (B, ...) of the full-precision model, as its scheduler returns them."""

    drawn: torch.Tensor

    def save(self, root: Path) -> None:
        """Write samples.safetensors."""
        from safetensors.torch import save_file

        save_file({"drawn": self.drawn.contiguous()}, root / "samples.safetensors")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        file = root / "samples.safetensors"
        with damage_of(file):
            return cls(load_tensors(file)["drawn"])
