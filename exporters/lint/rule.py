"""Define a rule of `lint` as one object, and the decorator that makes it from a checking function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from intaglio.exporters.lint.reader import Checked
from intaglio.pipeline.artifacts.findings import Level
from intaglio.pipeline.formats.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

Problems: TypeAlias = Iterator[tuple["ir.Node | None", str]]
"""Pairs of a node that is wrong (None: the whole graph) and a message with the numbers."""
Check: TypeAlias = Callable[[Checked, Target], Problems]
When: TypeAlias = Literal["always", "standard", "no errors"]
"""Graphs that a rule checks: all, those that the ONNX standard allows, or those without errors."""


@dataclass(frozen=True)
class Rule:
    """Rule of `lint`: its name, level and check, what it finds, why that matters, and the fix."""

    name: str
    level: Level
    check: Check
    finds: str
    """Findings of the rule in one line: the docstring of the check."""
    why: str
    """Effect on the target, and the version or the source that shows it."""
    fix: str
    when: When


def rule(name: str, level: Level, *, why: str, fix: str, when: When = "standard") -> Callable[[Check], Rule]:
    """Make a rule from the check below; the check's docstring, one line, says what the rule finds."""
    return lambda check: Rule(name, level, check, finds=check.__doc__ or "", why=why, fix=fix, when=when)


def rules_in(module: object) -> tuple[Rule, ...]:
    """Return the rules that a module defines, in the order of its text."""
    return tuple(value for value in vars(module).values() if isinstance(value, Rule))
