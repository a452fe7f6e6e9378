"""Choose the scheme of every layer with the least summed sensitivity within the budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.keys import FRONT, PLAN, SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan, in_float_lines
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError, TargetError, did_you_mean
from intaglio.pipeline.files import read_typed
from intaglio.pipeline.formats.cost import bit_operations
from intaglio.pipeline.formats.known import USUAL_SCHEMES, SchemeName
from intaglio.pipeline.formats.layer import Layer, illegal
from intaglio.pipeline.formats.schemes import FLOAT, Float, LayerScheme, with_output
from intaglio.pipeline.formats.target import OpKind, Target

if TYPE_CHECKING:
    from intaglio.passes.assign.budgets import Problem
    from intaglio.passes.assign.latency import Latencies

DEFAULT_SIZE = 0.52
"""Default budget for the size relative to fp16."""


class Budget(BaseModel):
    """Limits of a plan's cost relative to all quantizable layers in float. Without any limit, size is 0.52.

    `activation` limits the largest layer, the others limit the sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: float | None = Field(None, gt=0, le=1, description="bytes, relative to fp16")
    latency: float | None = Field(None, gt=0, description="time, by assign.profile or else the device's roofline")
    bops: float | None = Field(
        None, gt=0, le=1, description="multiplications, each counted as weight bits x input bits; 16 x 16 in float"
    )
    activation: float | None = Field(
        None,
        gt=0,
        le=1,
        description="bytes that a layer reads and writes, the largest, relative to the largest in float",
    )

    @model_validator(mode="before")
    @classmethod
    def _never_empty(cls, written: object) -> object:
        empty = isinstance(written, dict) and all(limit is None for limit in written.values())
        return {"size": DEFAULT_SIZE} if empty else written

    @property
    def limits(self) -> dict[str, float]:
        """Limits that are given, except `activation`."""
        return {n: limit for n, limit in self.model_dump(exclude={"activation"}).items() if limit is not None}


class AssignPrecision(Pass):
    """Choose one legal scheme for each layer, with the least summed error within all budgets, by HiGHS.

    The choice is a multiple-choice knapsack. Besides the plan, the pass returns the front: plans from the smallest to
    the one with the least error, within the other budgets. `point` selects one of them in place of the plan for
    `budget.size`.
    """

    name: ClassVar[str] = "assign"
    version: ClassVar[int] = 5
    requires: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY, TARGET})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({WORKLOAD})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN, FRONT})
    needs: ClassVar[tuple[str, ...]] = ("scipy",)

    budget: Budget = Field(
        Budget(), description="what the layers may cost relative to float: size (fp16 bytes), latency, bops, activation"
    )
    schemes: Mapping[OpKind, tuple[SchemeName, ...]] = Field(
        {"linear": ("w8a8_token", "w4a16"), "conv": ("w8a8_step", "w4a16")},
        description="schemes to choose from, for each kind of layer",
    )
    conv_output: Literal["float", "target"] = Field(
        "float", description="target: round outputs of convolutions where the target runs them on integers only then"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay in float, by name")
    same_input: bool = Field(False, description="layers that read the same tensor, such as q, k and v, round it alike")
    profile: tuple[Profile, ...] = Field(
        (),
        description="files of `intaglio profile`, of plans of this model: measured times replace the roofline",
    )
    device: str | None = Field(None, description="device whose roofline is used; None: the first that the target lists")
    samples: int = Field(1, ge=1, description="samples that are denoised at once, for the roofline")
    front: int = Field(16, ge=0, description="number of further sizes to plan for; plans that gain nothing are dropped")
    point: int | None = Field(None, ge=0, description="take this plan of the front, from 0, in place of budget.size")
    mip_rel_gap: float = Field(
        1e-4, ge=0, lt=1, description="largest relative excess of the summed error over the optimum"
    )

    @field_validator("profile", mode="before", json_schema_input_type=str | tuple[str | Profile, ...])
    @classmethod
    def _read(cls, written: object, info: ValidationInfo) -> object:
        """Replace files by their content, so that the step runs again when they change."""
        base = (info.context or {}).get("base", Path())
        each = written if isinstance(written, list | tuple) else [written]
        return [_profile(base / one) if isinstance(one, str) else one for one in each]

    @field_validator("profile")
    @classmethod
    def _comparable(cls, profiles: tuple[Profile, ...]) -> tuple[Profile, ...]:
        for what, found in (("rows", {p.rows for p in profiles}), ("tools", {p.made_by for p in profiles})):
            if len(found) > 1:
                raise ValueError(f"measured with different {what}, {' and '.join(sorted(map(str, found)))}")
        return profiles

    def check(self, target: Target) -> None:
        """Check the options. Raises TargetError if the target does not execute a scheme of the options.

        Also raises TargetError for an unknown or missing device, and for a profile of another runtime.
        """
        problems = [
            f"assign.schemes.{op}: {target.name} runs {', '.join(target.formats[op])} for a {op}, not {name}"
            for op, names in self.schemes.items()
            for name in names
            if name not in target.formats[op]
        ]
        devices = [device.name for device in target.devices]
        if self.device is not None and self.device not in devices:
            problems.append(f"assign.device: {target.name} has no {self.device!r}{did_you_mean(self.device, devices)}")
        problems += [
            f"assign.profile: measured by {made_by}, but {target.name} is for {target.runtime}"
            for made_by in sorted({p.made_by for p in self.profile if not target.runtime.startswith(p.runtime)})
        ]
        if self.budget.latency is not None and not devices and not self.profile:
            problems.append(
                f"assign.budget.latency: {target.name} lists no device to estimate times for: name files of"
                " `intaglio profile` in assign.profile, or leave this budget out"
            )
        if problems:
            raise TargetError(*problems)

    def run(self, state: State, ctx: Context) -> Outputs:
        """Choose the plan with the least predicted error within the budget."""
        table, target = state[SENSITIVITY], state[TARGET]
        workload = state[WORKLOAD] if WORKLOAD in state else None  # noqa: SIM401 - a state knows no default
        problem = self._problem(table, workload, target, ctx)
        others = {name: limit for name, limit in self.budget.limits.items() if name != "size"}
        limits = self.budget.limits if self.point is None else others
        chosen = problem.best(limits)
        plans = problem.front(others, self.front)
        if self.point is not None:
            if self.point >= len(plans):
                raise RecipeError(f"assign.point: no {self.point}: the front has {len(plans)} points, counted from 0")
            chosen = plans[self.point]
        front = Front(tuple(map(problem.point, plans)), problem.point(chosen))
        unreached = _unreached(table, workload)
        reasons = {layer.name: reason for layer, reason in unreached.items()}
        left = dict.fromkeys(reasons, FLOAT)
        plan = QuantPlan((*table.layers, *unreached), {**problem.schemes(chosen), **left}, reasons=reasons)
        costs = (
            f"{n} {cost:.3f}{f' of {limits[n]:g}' if n in limits else ''}" for n, cost in front.chosen.costs.items()
        )
        ctx.log.info(
            "%d of %d layers quantized, %.2f bits a weight; relative to float: %s; predicted %.1f dB",
            plan.quantized,
            len(plan.layers),
            plan.weight_bits_mean,
            ", ".join(costs),
            front.chosen.psnr_db,
        )
        for line in in_float_lines(reasons | self._float_reasons(plan, table, target)):
            ctx.log.info("%s", line)
        return {PLAN: plan, FRONT: front}

    def _problem(self, table: Sensitivity, workload: Workload | None, target: Target, ctx: Context) -> Problem:
        """Return the options with their costs as far as known. Raises RecipeError for unknown costs that are needed."""
        from intaglio.passes.assign.budgets import Option, build_problem, within_activation

        self._check_inputs(table, workload)
        options = [
            Option(layer, name, scheme)
            for layer in table.layers
            for name, scheme in self._choices(layer, table, target).items()
        ]
        if self.budget.activation is not None and workload is not None:
            options = within_activation(options, workload.rows, self.budget.activation)
        amounts: dict[str, Callable[[Layer, LayerScheme], float]] = {"size": lambda layer, s: layer.size_bytes(s)}
        if (latencies := self._latencies(table.layers, workload, target)) is not None:
            amounts["latency"] = lambda layer, scheme: 1e6 * latencies.seconds(layer, scheme)
            if self.profile:
                measured = sum(latencies.is_measured(option.layer, option.scheme) for option in options)
                ctx.log.info("%d of %d pairs of layer and scheme were measured", measured, len(options))
        if workload is not None:
            amounts["bops"] = lambda layer, scheme: bit_operations(layer, scheme, workload.rows[layer.name])
        names = {layer.name for layer in table.layers}
        groups = workload.same_input if workload is not None and self.same_input else ()
        together = [[name for name in group if name in names] for group in groups]
        return build_problem(
            options,
            [table.total(option.layer.name, option.measured) for option in options],
            {name: [amount(option.layer, option.scheme) for option in options] for name, amount in amounts.items()},
            {name: sum(amount(layer, FLOAT) for layer in table.layers) for name, amount in amounts.items()},
            [group for group in together if len(group) > 1],
            self.mip_rel_gap,
        )

    def _check_inputs(self, table: Sensitivity, workload: Workload | None) -> None:
        problems = []
        measured = {name for schemes in table.schemes.values() for name in schemes}
        absent = sorted({n for names in self.schemes.values() for n in names} - measured - set(USUAL_SCHEMES))
        problems += [f"assign.schemes: no layer was measured with {n}: list it in sensitivity.schemes" for n in absent]
        layers = {layer.name for layer in table.layers} | {layer.name for layer in _unreached(table, workload)}
        problems += [
            f"assign.keep: the model has no quantizable layer {name!r}{did_you_mean(name, layers)}"
            for name in sorted(set(self.keep) - layers)
        ]
        if self.profile and not any(profile.layers.keys() & layers for profile in self.profile):
            problems.append(f"assign.profile: has none of the model's {len(layers)} layers: it is of another model")
        if workload is None:
            estimated = self.budget.latency is not None and not self.profile
            wanted = {"budget.latency": estimated, "budget.bops": self.budget.bops}
            wanted |= {"budget.activation": self.budget.activation, "same_input": self.same_input}
            problems += [
                f"assign.{option}: nothing before it records what the layers are called with, as calibrate does"
                for option, given in wanted.items()
                if given
            ]
        if problems:
            raise RecipeError(*problems)

    def _latencies(self, layers: Sequence[Layer], workload: Workload | None, target: Target) -> Latencies | None:
        """Return the times of layers; None if nothing is known of them."""
        from intaglio.passes.assign.latency import Latencies, roofline

        devices = [device for device in target.devices if self.device in (None, device.name)]
        bound = roofline(workload, self.samples, devices[0]) if devices and workload is not None else None
        return None if bound is None and not self.profile else Latencies.of(self.profile, layers, bound)

    def _choices(self, layer: Layer, table: Sensitivity, target: Target) -> dict[str, LayerScheme]:
        """Return the layer's measured, allowed and legal schemes as the target executes them; float if there is none.

        Keys are the names under which they were measured, without a rounded output if that was not measured.
        """
        measured = table.schemes[layer.name]
        allowed = () if layer.name in self.keep else self.schemes.get(layer.op, ())
        executed = [(n, self._executed(layer, measured[n], target)) for n in allowed if n in measured]
        legal = {s.name if s.name in measured else n: s for n, s in executed if illegal(layer, s, target) is None}
        return legal or {FLOAT.name: FLOAT}

    def _float_reasons(self, plan: QuantPlan, table: Sensitivity, target: Target) -> dict[str, str]:
        """Return the reason why each measured layer in float is in float, by name."""
        found = {}
        for layer in table.layers:
            if plan.schemes[layer.name] != FLOAT:
                continue
            measured = table.schemes[layer.name]
            allowed = [
                self._executed(layer, measured[n], target) for n in self.schemes.get(layer.op, ()) if n in measured
            ]
            problems = [problem for scheme in allowed if (problem := illegal(layer, scheme, target))]
            if layer.name in self.keep:
                found[layer.name] = "assign.keep names it"
            elif not allowed:
                found[layer.name] = "its shape admits none of the schemes"
            elif len(problems) == len(allowed):
                found[layer.name] = problems[0].removeprefix(f"{layer.name}: ")
            else:
                found[layer.name] = "the least error within the budgets has it in float"
        return found

    def _executed(self, layer: Layer, scheme: LayerScheme, target: Target) -> LayerScheme:
        rounds = self.conv_output == "target" and target.conv_output == "int8" and layer.op == "conv"
        return with_output(scheme) if rounds and not isinstance(scheme.input, Float) else scheme


def _unreached(table: Sensitivity, workload: Workload | None) -> dict[Layer, str]:
    """Return the layers that were not measured because no recorded call needs them, with the reasons."""
    measured = {layer.name for layer in table.layers}
    return {} if workload is None else {n: why for n, why in workload.unreached if n.name not in measured}


def _profile(path: Path) -> Profile:
    """Read a profile. Raises ValueError if the file is not from `intaglio profile`."""
    try:
        return read_typed(path, Profile)
    except RecipeError as error:
        raise ValueError(f"{error}: not what `intaglio profile` writes") from error
