"""Measured time of each layer of a compiled graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.files import read_typed


class LayerTime(BaseModel):
    """One layer with its planned scheme: the time of all its kernels in one call, and its stored bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: str
    microseconds: float = Field(ge=0)
    bytes: int = Field(ge=0)


class Profile(BaseModel):
    """Medians over `runs` calls with `rows` rows, measured by `made_by`.

    `rows` is None if the tool `made_by` does not report the number of rows.

    `rest_microseconds` is the time of kernels that belong to no layer, by operator or by the runtime's name for them.
    `missing` names the plan's layers for which no kernel was found.
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
        """Return the text of profile.json, which `load` reads."""
        return self.model_dump_json(indent=1) + "\n"

    def save(self, root: Path) -> None:
        """Write profile.json."""
        (root / "profile.json").write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read profile.json."""
        return read_typed(root / "profile.json", cls)
