"""A pass that keeps layers in float by a pattern of their names."""

from fnmatch import fnmatchcase
from typing import ClassVar

from pydantic import Field

from intaglio import FLOAT, PLAN, AnyKey, Context, Outputs, Pass, State


class Keep(Pass):
    """Keep every layer in float whose name matches one of the patterns."""

    name = "keep"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    patterns: tuple[str, ...] = Field(min_length=1, description="shell patterns of layer names")

    def run(self, state: State, ctx: Context) -> Outputs:
        names = [layer.name for layer in state[PLAN].layers]
        kept = {name: FLOAT for name in names for pattern in self.patterns if fnmatchcase(name, pattern)}
        ctx.log.info("kept %d of %d layers in float", len(kept), len(names))
        return {PLAN: state[PLAN].replace(kept)}
