"""The same format for every layer: a plan without any measurement."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.keys import MODEL, PLAN, TARGET
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.plan import SCHEME_NAMES, QuantPlan, SchemeName, illegal, structural_schemes


class UniformPlan(Pass):
    """Every layer has the first of the wanted schemes that its shape and the target allow; float where none is.

    EfficientDM (section 4.1) leaves the first and the last layer at 8 bits: `ends` names what those two want.
    """

    name: ClassVar[str] = "uniform"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    schemes: tuple[SchemeName, ...] = Field(min_length=1, description="names of schemes, the most wanted first")
    ends: tuple[SchemeName, ...] = Field(
        (), description="the same for the first and the last layer; none listed: as others"
    )
    groups: tuple[int, ...] = Field((64, 32, 128), description="group sizes of 4-bit weights, the preferred first")

    def run(self, state: State, ctx: Context) -> Outputs:
        layers, target = state[MODEL].layers(), state[TARGET]
        chosen = {}
        for layer in layers:
            admitted = structural_schemes(layer, self.groups, SCHEME_NAMES)
            legal = {scheme.name: scheme for scheme in admitted if illegal(layer, scheme, target) is None}
            wanted = self.ends if self.ends and layer in (layers[0], layers[-1]) else self.schemes
            chosen[layer.name] = legal[next((name for name in wanted if name in legal), "float")]
        plan = QuantPlan(layers, chosen)
        ctx.log.info("%.2f bits a weight", plan.weight_bits_mean)
        return {PLAN: plan}
