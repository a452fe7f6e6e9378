"""Workload: the rows that each layer computes in one call of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from intaglio.pipeline.files import OPTIONAL, read_typed, write_typed
from intaglio.pipeline.formats.layer import Layer


class Unreached(NamedTuple):
    """A layer that the recorded calls do not reach, so that it stays in float, and the reason."""

    layer: Layer
    reason: str


@dataclass(frozen=True)
class Workload:
    """The recorded work of the call that denoises one sample; with guidance, such a call has two rows.

    `rows` are tokens of a linear layer or output pixels of a convolution, by layer name, in all calls of the layer
    together; a fraction if several samples share rows. `same_input` lists the layers that read the same tensor, in the
    order of calls. `unreached` are the layers that the call does not reach.
    """

    rows: Mapping[str, float]
    same_input: tuple[tuple[str, ...], ...] = ()
    unreached: tuple[Unreached, ...] = ()

    @property
    def float_reasons(self) -> dict[str, str]:
        """Layer name -> reason, for each unreached layer."""
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
    """The content of workload.json."""

    rows: Mapping[str, float]
    same_input: tuple[tuple[str, ...], ...]
    unreached: Annotated[tuple[_Row, ...], OPTIONAL] = ()
