"""What one call of the denoiser asks of its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed


@dataclass(frozen=True)
class Workload:
    """As recorded, of the call that denoises one sample; with guidance that has two rows.

    `rows` are tokens, or pixels that a convolution gives, in all calls of the layer together, by its name; fractions
    where samples share them. `same_input` has the names of layers that read the same tensor, in the order of calls.
    """

    rows: Mapping[str, float]
    same_input: tuple[tuple[str, ...], ...] = ()

    def save(self, root: Path) -> None:
        """Write workload.json."""
        content = {"rows": self.rows, "same_input": self.same_input}
        (root / "workload.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read workload.json."""
        return read_typed(root / "workload.json", cls)
