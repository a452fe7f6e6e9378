"""How long each layer of a compiled graph took where it ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.files import read_typed


class LayerTime(BaseModel):
    """One layer in the scheme of its plan: the time of all its kernels in one call, and its stored bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: str
    microseconds: float = Field(ge=0)
    bytes: int = Field(ge=0)


class Profile(BaseModel):
    """Medians over `runs` calls with `rows` rows; `rows` is None where who measured, `made_by`, does not say.

    `rest_microseconds` has what belongs to no layer, by operator or by the runtime's own name; `missing` are the
    plan's layers of which no kernel was found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    made_by: str
    runs: int = Field(ge=1)
    rows: int | None = Field(None, ge=1)
    layers: Mapping[str, LayerTime]
    rest_microseconds: Mapping[str, float]
    missing: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As `load` reads it."""
        return self.model_dump_json(indent=1) + "\n"

    def save(self, root: Path) -> None:
        """Write profile.json."""
        (root / "profile.json").write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read profile.json."""
        return read_typed(root / "profile.json", cls)
