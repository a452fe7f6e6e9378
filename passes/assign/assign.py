"""Choose the scheme of every layer with the least summed sensitivity within the budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from intaglio.passes.assign.budget import Budget
from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.keys import FRONT, LAYER_TIMES, MODEL, PLAN, SENSITIVITY, TARGET, TRAJECTORY, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan, in_float_lines
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError, TargetError, did_you_mean
from intaglio.pipeline.files import read_typed
from intaglio.pipeline.formats.cost import bit_operations, work
from intaglio.pipeline.formats.known import USUAL_SCHEMES, SchemeName
from intaglio.pipeline.formats.layer import Layer, unfit
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme, with_output
from intaglio.pipeline.formats.target import OpKind, Target

if TYPE_CHECKING:
    from intaglio.passes.assign.budgets import Problem
    from intaglio.passes.assign.latency import Latencies
    from intaglio.pipeline.artifacts.layer_times import LayerTimes
    from intaglio.pipeline.model.cost import ModelCost


SLOWER = 1.05
"""Time of the layers, relative to float, above which a plan is called slower."""
SLOWER_ADVICE = (
    "the layers of the plan take %.2f times as long as in float on this CPU: add `float` to assign.schemes if speed"
    " matters more than size"
)


class AssignPrecision(Pass):
    """Choose one legal scheme, and its basis, for each layer, with the least summed error within all budgets.

    The choice is a multiple-choice knapsack, which HiGHS solves. With `budget.psnr`, the pass searches for the
    fastest plan whose samples keep this PSNR, and among about equally fast plans for the smallest. The prediction adds
    up the errors of single layers; samples are drawn with the plan to correct it. Besides the plan, the pass returns
    the front: plans from the smallest to the one with the least error, within the other budgets. `point` selects one of
    them in place of the plan that the budget asks for; `budget.size` then has no effect.
    """

    name: ClassVar[str] = "assign"
    version: ClassVar[int] = 26
    requires: ClassVar[frozenset[AnyKey]] = frozenset({SENSITIVITY, TARGET})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({WORKLOAD, MODEL, TRAJECTORY, LAYER_TIMES})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN, FRONT})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("scipy",)
    efforts = ({"drawn": 16}, {"drawn": 16}, {"drawn": 16}, {"drawn": 8})

    budget: Budget = Field(
        Budget(),
        description="limits of the cost, relative to float: size (relative to fp16 bytes), latency, bops (bit"
        " operations), activation (memory); or psnr, a quality",
    )
    schemes: Mapping[OpKind, tuple[SchemeName, ...]] = Field(
        {"linear": ("w8a8_token", "w4a16"), "conv": ("w8a8_step", "w4a16")},
        description="schemes to choose from, for each kind of layer",
    )
    conv_output: Literal["float", "target"] = Field(
        "float",
        description="target: also round the output of a convolution, if the target needs that to multiply integers",
    )
    keep: tuple[str, ...] = Field((), description="layers that stay in float, by name")
    same_input: bool = Field(
        False, description="layers that read the same tensor, such as q, k and v, get the same input format"
    )
    profile: tuple[Profile, ...] = Field(
        (),
        description="files of `intaglio profile`, of plans of this model: measured times replace the roofline",
    )
    device: str | None = Field(None, description="device whose roofline is used; None: the first that the target lists")
    samples: int = Field(1, ge=1, description="samples that are denoised at once, for the roofline")
    drawn: int = Field(
        16,
        ge=0,
        description="samples that are drawn with a plan for budget.psnr, to correct the prediction; 0: none. With the"
        " chosen plan, twice as many are drawn if its PSNR is not known well from them",
    )
    front: int = Field(16, ge=0, description="number of further sizes to plan for; plans that gain nothing are dropped")
    point: int | None = Field(
        None, ge=0, description="index of a plan of the front, counted from 0, to take in place of the best plan"
    )
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
        if len(tools := {p.made_by for p in profiles}) > 1:
            raise ValueError(
                f"the profiles were made by different tools, {' and '.join(sorted(tools))}: measure them again with one"
            )
        if len(rows := {p.rows for p in profiles}) > 1:
            numbers = " and ".join(str(n or "unknown") for n in sorted(rows, key=lambda n: n or 0))
            raise ValueError(
                f"the profiles have different numbers of rows, {numbers}: measure them again with equal rows"
            )
        return profiles

    def check(self, target: Target) -> None:
        """Check the options. Raises TargetError if the target does not execute a scheme of the options.

        Also raises TargetError for an unknown or missing device, and for a profile of another runtime.
        """
        problems = [
            f"assign.schemes.{op}: {target.name} runs {', '.join(target.formats[op])} for {op} layers, not {name}"
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
        if self.budget.latency is not None and not (devices or self.profile or target.kernels):
            problems.append(
                f"assign.budget.latency: {target.name} lists no device to estimate times for: name files of"
                " `intaglio profile` in assign.profile, or leave this budget out"
            )
        if problems:
            raise TargetError(*problems)

    def forward_rows(self, model: ModelCost) -> int | None:
        """Return the largest number of rows that drawing samples for `budget.psnr` can take; None if none are drawn."""
        from intaglio.passes.assign.quality import drawn_samples

        if self.budget.psnr is None or not self.drawn:
            return None
        return drawn_samples(self.drawn) * model.steps * model.rows_per_sample

    def holds_weights(self) -> bool:
        """Return True if samples are drawn with rounded layers."""
        return self.budget.psnr is not None and self.drawn > 0

    def run(self, state: State, ctx: Context) -> Outputs:
        """Choose the fastest plan that keeps `budget.psnr`; without it, the one with the least predicted error."""
        table, target = state[SENSITIVITY], state[TARGET]
        workload = state.find(WORKLOAD)
        times = state.find(LAYER_TIMES)
        problem = self._problem(table, workload, times, target, ctx)
        limits = dict(self.budget.limits)
        others = {name: limit for name, limit in limits.items() if name != "size"}
        factor, error_db = 1.0, None
        if self.budget.psnr is not None:
            from intaglio.passes.assign.quality import Aim, choose

            aim = Aim(self.budget.psnr, limits, self.drawn)
            chosen, problem, factor, error_db = choose(problem, table, aim, state, ctx)
        elif self.point is None:
            chosen = problem.best(limits)
        plans = problem.front(others, self.front)
        if self.point is not None:
            limits = others
            if self.point >= len(plans):
                has = f"{len(plans)} plans, numbered 0 to {len(plans) - 1}" if plans else "no plans: set assign.front"
                raise RecipeError(f"assign.point: {self.point} is too large: the front has {has}")
            chosen = plans[self.point]
        points = tuple(problem.point(plan, factor) for plan in plans)
        front = Front(points, problem.point(chosen, factor), table.samples, error_db)
        unreached = _unreached(table, workload)
        reasons = {layer.name: reason for layer, reason in unreached.items()}
        left = dict.fromkeys(reasons, FLOAT)
        plan = QuantPlan((*table.layers, *unreached), {**problem.schemes(chosen), **left}, reasons=reasons)
        plan = plan.balanced(problem.balances(chosen))
        _log(plan, front, limits, ctx)
        if (slower := front.chosen.costs.get("latency", 0.0)) > SLOWER and times is not None:
            ctx.log.warning(SLOWER_ADVICE, slower)
        if workload is not None:
            share = share_in_codes(plan, workload, target)
            ctx.log.info("%.0f %% of the multiplications are in INT8, FP8 or FP4", 100 * share)
        for line in in_float_lines(reasons | self._float_reasons(plan, table, target)):
            ctx.log.info("%s", line)
        return {PLAN: plan, FRONT: front}

    def _problem(
        self,
        table: Sensitivity,
        workload: Workload | None,
        times: LayerTimes | None,
        target: Target,
        ctx: Context,
    ) -> Problem:
        """Return the options with their costs as far as known. Raises RecipeError for unknown costs that are needed."""
        from intaglio.passes.assign.budgets import Alike, Option, build_problem, within_activation
        from intaglio.passes.assign.latency import timed_s

        self._check_inputs(table, workload)
        options = [
            Option(layer, label, scheme, table.balance_of(layer.name, label), table.basis_of(layer.name, label))
            for layer in table.layers
            for label, scheme in self._choices(layer, table, target).items()
        ]
        if self.budget.activation is not None and workload is not None:
            options = within_activation(options, workload.rows, self.budget.activation)
        amounts: dict[str, Callable[[Option], float]] = {"size": lambda o: o.layer.size_bytes(o.scheme)}
        if (latencies := self._latencies(table.layers, workload, target)) is not None:
            amounts["latency"] = lambda o: 1e6 * latencies.seconds(o.layer, o.scheme, o.block)
            if self.profile:
                measured = sum(latencies.is_measured(option.layer, option.scheme) for option in options)
                ctx.log.info("%d of %d pairs of layer and scheme were measured", measured, len(options))
        elif workload is not None and times is not None:
            amounts["latency"] = lambda o: 1e6 * timed_s(times, workload.rows[o.layer.name], o.layer, o.scheme, o.block)
        if workload is not None:
            rows = workload.rows
            amounts["bops"] = lambda o: bit_operations(o.layer, o.scheme, rows[o.layer.name])
            if self.budget.psnr is not None and "latency" not in amounts:
                amounts["work"] = lambda o: work(
                    o.layer,
                    o.scheme,
                    rows[o.layer.name],
                    o.block,
                    in_codes=target.multiplies_codes(o.layer.op, o.scheme),
                )
        if self.budget.latency is not None and "latency" not in amounts:
            raise RecipeError(
                f"assign.budget.latency: no times of layers are known for {target.name}: put the step `time-layers`"
                " before assign, or name files of `intaglio profile` in assign.profile"
            )
        names = {layer.name for layer in table.layers}
        groups = workload.same_input if workload is not None and self.same_input else ()
        together = [[name for name in group if name in names] for group in groups]
        whole = [Option(layer, FLOAT.name, FLOAT) for layer in table.layers]
        return build_problem(
            options,
            [table.total(option.layer.name, option.measured) for option in options],
            {name: [amount(option) for option in options] for name, amount in amounts.items()},
            {name: sum(map(amount, whole)) for name, amount in amounts.items()},
            Alike([group for group in together if len(group) > 1], table.same_basis),
            self.mip_rel_gap,
        )

    def _check_inputs(self, table: Sensitivity, workload: Workload | None) -> None:
        problems = []
        measured = {scheme.name for schemes in table.schemes.values() for scheme in schemes.values()}
        kinds = {layer.op for layer in table.layers}
        named = {name for op, names in self.schemes.items() if op in kinds for name in names}
        absent = sorted(named - measured - set(USUAL_SCHEMES))
        problems += [f"assign.schemes: no layer was measured with {n}: list it in sensitivity.schemes" for n in absent]
        layers = {layer.name for layer in table.layers} | {layer.name for layer in _unreached(table, workload)}
        problems += [
            f"assign.keep: the model has no quantizable layer {name!r}{did_you_mean(name, layers)}"
            for name in sorted(set(self.keep) - layers)
        ]
        if self.profile and not any(profile.layers.keys() & layers for profile in self.profile):
            problems.append(
                f"assign.profile: has none of the model's {len(layers)} layers: it belongs to another model"
            )
        if workload is None:
            estimated = self.budget.latency is not None and not self.profile
            wanted = {"budget.latency": estimated, "budget.bops": self.budget.bops}
            wanted |= {"budget.activation": self.budget.activation, "same_input": self.same_input}
            wanted |= {"budget.psnr": self.budget.psnr}
            problems += [
                f"assign.{option}: needs the records of the calls of layers: put the step `calibrate` before it"
                for option, given in wanted.items()
                if given
            ]
        if problems:
            raise RecipeError(*problems)

    def _latencies(self, layers: Sequence[Layer], workload: Workload | None, target: Target) -> Latencies | None:
        """Return the times of layers; None if nothing is known of them."""
        from intaglio.passes.assign.latency import Latencies, basis_times, roofline

        device = next((each for each in target.devices if self.device in (None, each.name)), None)
        if device is None or workload is None:
            return Latencies.of(self.profile, layers, None) if self.profile else None
        bound, basis = roofline(workload, self.samples, device), basis_times(workload, self.samples, device)
        return Latencies.of(self.profile, layers, bound, basis)

    def _choices(self, layer: Layer, table: Sensitivity, target: Target) -> dict[str, LayerScheme]:
        """Return the schemes that were measured, that the options allow and that the target executes, or else float.

        Keys are the labels of the measurements. If a rounded output was not measured, the label is that of the scheme
        without it.
        """
        measured = table.schemes[layer.name]
        allowed = () if layer.name in self.keep else self.schemes.get(layer.op, ())
        forms = {(scheme, table.basis_of(layer.name, label)): label for label, scheme in measured.items()}
        legal: dict[str, LayerScheme] = {}
        for name in allowed:
            for (scheme, basis), label in forms.items():
                executed = self._executed(layer, scheme, target)
                if scheme.name == name and unfit(layer, executed, target) is None:
                    legal[forms.get((executed, basis), label)] = executed
        return _fast(layer, legal, target) or {FLOAT.name: FLOAT}

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
            problems = [problem for scheme in allowed if (problem := unfit(layer, scheme, target))]
            if layer.name in self.keep:
                found[layer.name] = "assign.keep names it"
            elif not allowed:
                found[layer.name] = "its shape admits none of the schemes"
            elif len(problems) == len(allowed):
                found[layer.name] = problems[0].removeprefix(f"{layer.name}: ")
            else:
                found[layer.name] = "the best plan within the budgets leaves it in float"
        return found

    def _executed(self, layer: Layer, scheme: LayerScheme, target: Target) -> LayerScheme:
        rounds = self.conv_output == "target" and target.conv_output == "int8" and layer.op == "conv"
        return with_output(scheme) if rounds and scheme.by_step else scheme


def _fast(layer: Layer, schemes: Mapping[str, LayerScheme], target: Target) -> dict[str, LayerScheme]:
    """Leave out each scheme whose codes would make all products of the graph slower, if a fast one can replace it.

    The fast one has the same input format, and takes as many bytes.
    """
    replaced = {(s.input, layer.size_bytes(s)) for s in schemes.values() if target.is_fast(s)}
    return {k: s for k, s in schemes.items() if target.is_fast(s) or (s.input, layer.size_bytes(s)) not in replaced}


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


def share_in_codes(plan: QuantPlan, workload: Workload, target: Target) -> float:
    """Return the share of the layers' multiplications that the target makes in INT8, FP8 or FP4; 0 without layers."""
    made = {layer: workload.rows.get(layer.name, 0.0) * layer.n * layer.k for layer in plan.layers}
    in_codes = sum(n for layer, n in made.items() if target.multiplies_codes(layer.op, plan.schemes[layer.name]))
    return in_codes / (sum(made.values()) or 1.0)


def _log(plan: QuantPlan, front: Front, limits: Mapping[str, float], ctx: Context) -> None:
    """Log what the plan costs, and the quality that is predicted for it."""
    costs = (f"{n} {cost:.3f}{f' of {limits[n]:g}' if n in limits else ''}" for n, cost in front.chosen.costs.items())
    ctx.log.info(
        "%d of %d layers quantized, %.2f bits per weight; relative to float: %s; predicted PSNR %.1f dB, SQNR %.1f dB",
        plan.quantized,
        len(plan.layers),
        plan.weight_bits_mean,
        ", ".join(costs),
        front.psnr_db(front.chosen),
        front.sqnr_db(front.chosen),
    )
