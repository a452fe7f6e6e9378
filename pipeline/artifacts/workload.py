"""What one call of the denoiser asks of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from intaglio.pipeline.files import OPTIONAL, read_typed, write_typed
from intaglio.pipeline.formats.layer import Layer


class Unreached(NamedTuple):
    """A layer that has no part in the recorded calls, so that it can only stay in float, and the reason."""

    layer: Layer
    reason: str


@dataclass(frozen=True)
class Workload:
    """As recorded, of the call that denoises one sample; with guidance that has two rows.

    `rows` are tokens, or pixels that a convolution gives, in all calls of the layer together, by its name; fractions
    where samples share them. `same_input` has the names of layers that read the same tensor, in the order of calls.
    `unreached` are the layers that are in neither.
    """

    rows: Mapping[str, float]
    same_input: tuple[tuple[str, ...], ...] = ()
    unreached: tuple[Unreached, ...] = ()

    @property
    def float_reasons(self) -> dict[str, str]:
        """Why each unreached layer stays in float, by its name."""
        return {layer.name: reason for layer, reason in self.unreached}

    def save(self, root: Path) -> None:
        """Write workload.json."""
        unreached = tuple(_Row(**layer.model_dump(), reason=reason) for layer, reason in self.unreached)
        write_typed(root / "workload.json", _Content(self.rows, self.same_input, unreached), _Content)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read workload.json."""
        content = read_typed(root / "workload.json", _Content)
        unreached = ((Layer(**row.model_dump(exclude={"reason"})), row.reason) for row in content.unreached)
        return cls(content.rows, content.same_input, tuple(Unreached(*each) for each in unreached))


class _Row(Layer):
    """One unreached layer in workload.json."""

    reason: str


@dataclass(frozen=True)
class _Content:
    """The fields of workload.json."""

    rows: Mapping[str, float]
    same_input: tuple[tuple[str, ...], ...]
    unreached: Annotated[tuple[_Row, ...], OPTIONAL] = ()
