"""Find in an ONNX graph what a target refuses, computes wrongly or does not compute on integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from intaglio.exporters.lint.reader import Checked, named, shortened
from intaglio.exporters.lint.rules import RULES as RULES
from intaglio.pipeline.artifacts.findings import Finding, Findings
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import TargetError

if TYPE_CHECKING:
    from intaglio.exporters.lint.rule import Rule
    from intaglio.pipeline.formats.target import Target


class Lint(Pass):
    """Check a graph with all RULES. A graph without errors builds and computes what it should."""

    name: ClassVar[str] = "lint"
    version: ClassVar[int] = 6
    requires: ClassVar[frozenset[AnyKey]] = frozenset({GRAPH, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({LINT})
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir")

    refuse: Literal["errors", "nothing"] = Field("errors", description="which findings end the run")

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        """Return the rules by name."""
        return {rule.name: rule for rule in RULES}

    def run(self, state: State, ctx: Context) -> Outputs:
        """Check the graph. Raises TargetError with every error, RecipeError for a file that cannot be read."""
        found = Findings(tuple(lint(state[GRAPH].path, state[TARGET])))
        errors = found.at("error")
        if errors and self.refuse == "errors":
            raise TargetError(*map(str, errors))
        for rule in RULES:
            if warnings := [f for f in found.at("warning") if f.rule == rule.name]:
                ctx.log.warning("%d findings of the rule %s, the first: %s", len(warnings), rule.name, warnings[0])
        return {LINT: found}


def lint(path: Path, target: Target) -> Iterator[Finding]:
    """Yield all findings of all rules. Raises RecipeError if the file cannot be read or has data outside its folder."""
    graph, errors = Checked.read(path), False
    for rule in RULES:
        if (rule.when != "always" and not graph.standard) or (rule.when == "no errors" and errors):
            continue
        for place, (node, message) in enumerate(rule.check(graph, target)):
            errors |= rule.level == "error"
            if place == MOST_FINDINGS:
                yield Finding(rule.name, rule.level, "graph", f"more than {MOST_FINDINGS} of these", rule.fix)
                break
            yield Finding(rule.name, rule.level, named(node), shortened(message, 600), rule.fix)


MOST_FINDINGS = 100
"""Largest number of findings that one rule reports."""
