"""Plan the same format for every layer, without any measurement."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan, in_float_lines
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.formats.known import SchemeName
from intaglio.pipeline.formats.layer import GROUPS, Layer, admitted_schemes, unfit
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme
from intaglio.pipeline.formats.target import Target


class UniformPlan(Pass):
    """Give every layer the first of the wanted schemes that its shape and the target allow, or else float.

    EfficientDM (section 4.1) leaves the first and the last layer at 8 bits: `ends` names the schemes wanted for those
    two. After `calibrate`, layers that the recorded calls do not reach stay in float, and count as neither first nor
    last.
    """

    name: ClassVar[str] = "uniform"
    version: ClassVar[int] = 3
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TARGET})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({WORKLOAD})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    schemes: tuple[SchemeName, ...] = Field(min_length=1, description="names of schemes, the most wanted first")
    ends: tuple[SchemeName, ...] = Field(
        (), description="schemes of the first and the last layer, the most wanted first; empty: those of other layers"
    )
    groups: tuple[int, ...] = Field(GROUPS, description="group sizes of 4-bit weights, the preferred first")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Give every layer the first scheme that it admits and the target executes."""
        layers, target = state[MODEL].layers(), state[TARGET]
        unreached = state[WORKLOAD].float_reasons if WORKLOAD in state else {}
        reached = [layer for layer in layers if layer.name not in unreached]
        chosen, reasons = dict.fromkeys(unreached, FLOAT), dict(unreached)
        for layer in reached:
            wanted = self.ends if self.ends and layer in (reached[0], reached[-1]) else self.schemes
            chosen[layer.name], reason = self._choose(layer, wanted, target)
            if reason is not None:
                reasons[layer.name] = reason
        plan = QuantPlan(layers, chosen, reasons=unreached)
        ctx.log.info(
            "%d of %d layers quantized, %.2f bits per weight", plan.quantized, len(layers), plan.weight_bits_mean
        )
        for line in in_float_lines(reasons):
            ctx.log.info("%s", line)
        return {PLAN: plan}

    def _choose(self, layer: Layer, wanted: tuple[SchemeName, ...], target: Target) -> tuple[LayerScheme, str | None]:
        """Return the layer's scheme, and the reason if it is float because no wanted scheme is possible."""
        admitted = {scheme.name: scheme for scheme in admitted_schemes(layer, self.groups)}
        problems = [unfit(layer, admitted[name], target) for name in wanted if name in admitted]
        for name in wanted:
            if name in admitted and unfit(layer, admitted[name], target) is None:
                return admitted[name], None
        why = next((problem.removeprefix(f"{layer.name}: ") for problem in problems if problem), None)
        return FLOAT, why or f"a {layer.op} of shape {list(layer.shape)} admits none of {', '.join(wanted)}"
