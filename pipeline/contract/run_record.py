"""The record of one step that succeeded."""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

DIGEST = "[0-9a-f]{64}"


Digest: TypeAlias = Annotated[str, StringConstraints(pattern=f"^{DIGEST}$")]
"""A sha256 in hexadecimal digits. Anything else could lead out of the store, as digests become paths."""


MOST_SECONDS = 1e9
"""A step that took longer, 30 years, is none that was measured."""


class RunRecord(BaseModel):
    """One step that succeeded: what it was made from, what came out, and how long it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    origin: str
    key: Digest
    ingredients: str
    """The JSON text that `key` is the sha256 of."""
    outputs: Mapping[str, Digest]
    """Key name -> digest."""
    seconds: float = Field(ge=0, le=MOST_SECONDS)
    peak_bytes: int | None = Field(None, ge=0, lt=1 << 63)
    """The most memory that the process held at once, what it held before among it; None where that is not known."""
