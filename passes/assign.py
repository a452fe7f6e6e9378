"""Decide the scheme of every layer: the least summed sensitivity that fits the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.keys import PLAN, SENSITIVITY, TARGET
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.plan import USUAL_SCHEMES, Layer, QuantPlan, illegal, known_schemes
from intaglio.pipeline.quant.spec import FLOAT, IntInput, LayerScheme, with_output
from intaglio.pipeline.sensitivity import Sensitivity
from intaglio.pipeline.target import OpKind, Target

Choices = Mapping[str, Mapping[str, LayerScheme]]


class Budget(BaseModel):
    """What a plan may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: float = Field(0.52, gt=0, le=1, description="bytes of the quantizable layers, relative to fp16")


class AssignPrecision(Pass):
    """A multiple-choice knapsack, solved by HiGHS: one legal scheme a layer, least summed error, size within budget."""

    name: ClassVar[str] = "assign"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    needs: ClassVar[tuple[str, ...]] = ("scipy",)

    budget: Budget = Budget()
    schemes: Mapping[OpKind, tuple[str, ...]] = Field(
        {"linear": ("w8a8_token", "w4a16"), "conv": ("w8a8_step", "w4a16")},
        description="schemes to choose from, for each kind of layer",
    )
    conv_output: Literal["float", "target"] = Field(
        "float", description="target: round outputs of convolutions where the target runs them on integers only then"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay in float, by name")

    @field_validator("schemes")
    @classmethod
    def _known(cls, schemes: Mapping[OpKind, tuple[str, ...]]) -> Mapping[OpKind, tuple[str, ...]]:
        known_schemes(name for names in schemes.values() for name in names)
        return schemes

    def check(self, target: Target) -> None:
        """Raises TargetError when the target runs none of the schemes for a kind of layer, or not one that is named."""
        problems = [
            f"assign.schemes.{op}: {target.name} runs {', '.join(target.formats[op])} for a {op}, not {name}"
            for op, names in self.schemes.items()
            for name in names
            if name not in target.formats[op]
        ]
        if problems:
            raise TargetError(*problems)

    def run(self, state: State, ctx: Context) -> Outputs:
        table, target = state[SENSITIVITY], state[TARGET]
        measured = {name for schemes in table.schemes.values() for name in schemes}
        if absent := sorted({n for names in self.schemes.values() for n in names} - measured - set(USUAL_SCHEMES)):
            raise RecipeError(
                *(f"assign.schemes: no layer was measured with {n}: list it in sensitivity.schemes" for n in absent)
            )
        unknown = sorted(set(self.keep) - {layer.name for layer in table.layers})
        if unknown:
            raise RecipeError(*(f"assign.keep: the model has no quantizable layer {name!r}" for name in unknown))
        choices = {layer.name: self._choices(layer, table, target) for layer in table.layers}
        limit = self.budget.size * sum(layer.size_bytes(FLOAT) for layer in table.layers)
        plan = QuantPlan(table.layers, solve(table, choices, limit))
        ctx.log.info(
            "%d of %d layers quantized, %.2f bits a weight, %.3f of fp16 bytes",
            sum(s != FLOAT for s in plan.schemes.values()),
            len(plan.layers),
            plan.weight_bits_mean,
            plan.size_bytes / limit * self.budget.size,
        )
        return {PLAN: plan}

    def _choices(self, layer: Layer, table: Sensitivity, target: Target) -> dict[str, LayerScheme]:
        """The layer's measured, allowed and legal schemes, as the target executes them; float if there is none.

        By the name they were measured under: without its rounded output where it was not measured with it.
        """
        measured = table.schemes[layer.name]
        allowed = () if layer.name in self.keep else self.schemes.get(layer.op, ())
        executed = [(n, self._executed(layer, measured[n], target)) for n in allowed if n in measured]
        legal = {s.name if s.name in measured else n: s for n, s in executed if illegal(layer, s, target) is None}
        return legal or {"float": FLOAT}

    def _executed(self, layer: Layer, scheme: LayerScheme, target: Target) -> LayerScheme:
        rounds = self.conv_output == "target" and target.conv_output == "int8" and layer.op == "conv"
        return with_output(scheme) if rounds and isinstance(scheme.input, IntInput) else scheme


def solve(table: Sensitivity, choices: Choices, limit_bytes: float) -> dict[str, LayerScheme]:
    """The choice for each layer with the least summed error within the limit. Raises RecipeError when nothing fits."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    options = [(layer, name) for layer in table.layers for name in choices[layer.name]]
    bytes_of = np.array([layer.size_bytes(choices[layer.name][name]) for layer, name in options], float)
    error = np.array([table.total(layer.name, name) for layer, name in options])
    row = {layer.name: i for i, layer in enumerate(table.layers)}
    rows = [row[layer.name] for layer, _ in options]
    one_each = coo_array((np.ones(len(options)), (rows, range(len(options)))), shape=(len(row), len(options)))
    smallest = sum(min(layer.size_bytes(s) for s in choices[layer.name].values()) for layer in table.layers)
    if smallest > limit_bytes:
        whole = sum(layer.size_bytes(FLOAT) for layer in table.layers)
        raise RecipeError(
            f"assign.budget.size: {limit_bytes / whole:.3f} of fp16 is {limit_bytes:.0f} bytes, but the smallest"
            f" legal plan takes {smallest} bytes: allow at least {smallest / whole:.3f}, or schemes with fewer bits"
        )
    largest = max(float(error.max()), 1e-30)  # HiGHS stops at absolute tolerances: bring the objective near 1
    result = milp(
        error / largest,
        integrality=np.ones(len(options), np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each.tocsc(), 1, 1), LinearConstraint(bytes_of / limit_bytes, -np.inf, 1)],
        options={"mip_rel_gap": 1e-4},
    )
    if result.x is None:
        raise RecipeError(f"assign: no plan found: {result.message}")
    chosen = [option for option, x in zip(options, result.x, strict=True) if x > 0.5]
    return {layer.name: choices[layer.name][name] for layer, name in chosen}
