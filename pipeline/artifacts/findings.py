"""Findings of `lint`: faults of a graph that are found before a runtime meets them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from intaglio.pipeline.files import read_typed, typed_json, write_typed

Level: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault at one node.

    A graph with an error does not build, computes wrong values, or runs in float where it asks for integers. A graph
    with a warning alone builds and computes what it should.
    """

    rule: str
    level: Level
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}: {self.fix} ({self.rule})"


@dataclass(frozen=True)
class Findings:
    """All findings in one graph, in the order of the rules and of the nodes."""

    findings: tuple[Finding, ...]

    def to_json(self) -> str:
        """Return the text `{"findings": [{"rule": ..., "level": ..., "node": ..., "message": ..., "fix": ...}]}`."""
        return typed_json(self, Findings)

    def at(self, level: Level) -> tuple[Finding, ...]:
        """Return the findings of one level."""
        return tuple(finding for finding in self.findings if finding.level == level)

    def save(self, root: Path) -> None:
        """Write lint.json."""
        write_typed(root / "lint.json", self, Findings)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read lint.json."""
        return read_typed(root / "lint.json", cls)
