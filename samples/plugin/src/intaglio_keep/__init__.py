"""Keeps layers in float by a pattern of their names."""

from fnmatch import fnmatchcase
from typing import ClassVar

from pydantic import Field

from intaglio import AnyKey, Context, Outputs, Pass, State
from intaglio.pipeline.artifacts.keys import PLAN
from intaglio.pipeline.formats.schemes import FLOAT


class Keep(Pass):
    """Layers whose name matches one of the patterns stay in float."""

    name = "keep"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    patterns: tuple[str, ...] = Field(min_length=1, description="shell patterns of layer names")

    def run(self, state: State, ctx: Context) -> Outputs:
        names = [layer.name for layer in state[PLAN].layers]
        kept = {name: FLOAT for name in names for pattern in self.patterns if fnmatchcase(name, pattern)}
        ctx.log.info("kept %d of %d layers in float", len(kept), len(names))
        return {PLAN: state[PLAN].replace(kept)}
