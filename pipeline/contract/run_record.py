"""Define the record of one step that succeeded."""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

DIGEST = "[0-9a-f]{64}"


Digest: TypeAlias = Annotated[str, StringConstraints(pattern=f"^{DIGEST}$")]
"""Sha256 in 64 hexadecimal digits. Other text is refused, because digests become paths in the store."""


MOST_SECONDS = 1e9
"""Longest plausible duration of a step: 30 years."""


class RunRecord(BaseModel):
    """Record of one step that succeeded: its inputs, its outputs, and its duration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    origin: str
    key: Digest
    ingredients: str
    """JSON text whose sha256 is `key`."""
    outputs: Mapping[str, Digest]
    """Digest of each output, by key name."""
    seconds: float = Field(ge=0, le=MOST_SECONDS)
    peak_bytes: int | None = Field(None, ge=0, lt=1 << 63)
    """Peak memory of the process in bytes, including memory held before the step; None if unknown."""
