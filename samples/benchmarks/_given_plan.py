"""A plan that comes from elsewhere, as a pass."""

from typing import ClassVar

from pydantic import Field

from intaglio import Context, Outputs, Pass, State
from intaglio.pipeline.artifacts.keys import PLAN
from intaglio.pipeline.contract.artifact import AnyKey
from intaglio.pipeline.formats.layer import structural_schemes


class GivenPlan(Pass):
    """The layers that are named have 4-bit weights and 8-bit inputs, all others what they had."""

    name: ClassVar[str] = "given-plan"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})

    narrow: tuple[str, ...] = Field(description="names of layers")

    def run(self, state: State, ctx: Context) -> Outputs:
        plan, names = state[PLAN], ("w4a8_token", "w4a8_step")
        layers = [layer for layer in plan.layers if layer.name in self.narrow]
        return {PLAN: plan.replace({n.name: structural_schemes(n, names=names)[1] for n in layers})}
