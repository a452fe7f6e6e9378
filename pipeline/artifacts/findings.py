"""What `lint` finds in a graph before a runtime does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from intaglio.pipeline.files import read_typed

Level: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """An error does not build, computes something else, or stays off the integers it asks for; a warning computes."""

    rule: str
    level: Level
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}: {self.fix} ({self.rule})"


@dataclass(frozen=True)
class Findings:
    """All that was found, in the order of the rules and of the graph."""

    findings: tuple[Finding, ...]

    def to_json(self) -> str:
        """Write `{"findings": [{"rule": ..., "level": ..., "node": ..., "message": ..., "fix": ...}]}`."""
        return json.dumps({"findings": [asdict(finding) for finding in self.findings]}, indent=1)

    def at(self, level: Level) -> tuple[Finding, ...]:
        """Those of one level."""
        return tuple(finding for finding in self.findings if finding.level == level)

    def save(self, root: Path) -> None:
        """Write lint.json."""
        (root / "lint.json").write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read lint.json."""
        return read_typed(root / "lint.json", cls)
