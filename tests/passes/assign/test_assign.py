"""The plan is the best one within the budgets: compared with all plans and with another solver."""

import math
import os

import numpy as np
import pytest
from assigning import ERRORS, EVERY, RTX, SAMPLES, costs, every_plan, given, loss, named
from harness import run_pass
from scipy.optimize import Bounds, LinearConstraint, milp

from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.assign.knapsack import Knapsack, _silenced
from intaglio.pipeline.artifacts.keys import FRONT, PLAN, SENSITIVITY, TARGET
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W7A8_TOKEN, W8A8_STEP, W8A8_TOKEN, w4a16, with_output
from intaglio.pipeline.formats.target import load_target


@pytest.mark.parametrize(
    "limits",
    [
        {"size": 0.45},
        {"latency": 0.8},
        {"bops": 0.3},
        {"size": 0.6, "latency": 0.75},
        {"size": 0.5, "bops": 0.27},
        {"size": 0.45, "latency": 0.7, "bops": 0.26},
    ],
)
def test_the_plan_is_the_best_of_all_that_are_within_every_budget(limits, tmp_path):
    artifacts = given(*ERRORS)
    within = [p for p in every_plan(artifacts) if all(costs(artifacts, p)[n] <= limit for n, limit in limits.items())]
    best = min(within, key=lambda p: loss(artifacts, p))
    assert 0 < len(within) < 3**5
    made = run_pass(AssignPrecision(budget=Budget(**limits), schemes=EVERY), artifacts, tmp_path)
    assert named(made[PLAN]) == best
    front, chosen = made[FRONT], made[FRONT].chosen
    assert chosen.costs == pytest.approx(costs(artifacts, best), rel=1e-12)
    assert chosen.loss == pytest.approx(loss(artifacts, best), rel=1e-12)
    assert front.psnr_db(chosen) == pytest.approx(10 * math.log10(9 / loss(artifacts, best)))
    assert front.sqnr_db(chosen) == pytest.approx(10 * math.log10(0.5 / loss(artifacts, best)))


def test_without_any_budget_the_size_is_half():
    assert Budget().limits == Budget(size=None, latency=None).limits == {"size": 0.52}
    assert Budget(latency=0.7).limits == {"latency": 0.7}
    assert AssignPrecision.model_validate({"budget": {"bops": 0.5}}).budget.limits == {"bops": 0.5}


def test_the_largest_layer_is_within_the_budget_of_activations(tmp_path):
    """In bytes, l1 moves 4096 x (64 x 2 + 16 x 2) in float and 4096 x (64 + 16 x 2) in W8A8, l4 0.325 of that."""
    artifacts = given(*ERRORS)
    plan = named(run_pass(AssignPrecision(budget=Budget(activation=0.6), schemes=EVERY), artifacts, tmp_path)[PLAN])
    assert plan == {"l0": "float", "l1": "w8a8_token", "l2": "float", "l3": "float", "l4": "float"}
    both = Budget(activation=0.6, size=0.45)
    made = run_pass(AssignPrecision(budget=both, schemes=EVERY), artifacts, tmp_path)
    assert all(point.schemes["l1"] == "w8a8_token" for point in made[FRONT].points)
    assert made[FRONT].chosen.costs["size"] <= 0.45
    text = r"activation: 0\.5 of 655,360 bytes a sample is 327,680, but l1 take more .* allow at least 0\.6, or"
    with pytest.raises(RecipeError, match=text):
        run_pass(AssignPrecision(budget=Budget(activation=0.5), schemes=EVERY), artifacts, tmp_path)


def test_a_budget_that_no_plan_meets_says_what_is_possible(tmp_path):
    artifacts = given(*ERRORS)
    sizes = [sum(layer.size_bytes(s) for layer in artifacts[SENSITIVITY].layers) for s in (FLOAT, w4a16(32))]
    whole, smallest = sizes
    allowed = math.ceil(1000 * smallest / whole) / 1000
    text = (
        rf"assign\.budget\.size: 0\.2 of float is {0.2 * whole:,.0f} bytes, but every legal plan needs"
        rf" {smallest:,} bytes or more: set at least {allowed}"
    )
    with pytest.raises(RecipeError, match=text):
        run_pass(AssignPrecision(budget=Budget(size=0.2), schemes=EVERY), artifacts, tmp_path)
    run_pass(AssignPrecision(budget=Budget(size=allowed), schemes=EVERY), artifacts, tmp_path)


@pytest.mark.parametrize(
    ("limits", "alone"),
    [({"size": 0.36, "latency": 0.7}, True), ({"size": 0.36, "latency": 0.7, "bops": 0.2}, False)],
)
def test_budgets_that_cannot_be_met_together_say_the_least_common_factor(limits, alone, tmp_path):
    artifacts = given(*ERRORS)
    factor = min(max(costs(artifacts, p)[n] / x for n, x in limits.items()) for p in every_plan(artifacts))
    assert factor > 1
    with pytest.raises(RecipeError) as raised:
        run_pass(AssignPrecision(budget=Budget(**limits), schemes=EVERY), artifacts, tmp_path)
    rounded = math.ceil(factor * 1000) / 1000
    size = math.ceil(360 * rounded) / 1000
    assert f"multiply all limits by {rounded:g}, the smallest factor that works: size {size:g} and" in str(raised.value)
    assert ("can be met one by one, but not together" in str(raised.value)) == alone
    relaxed, tight = (Budget(**{n: x * f for n, x in limits.items()}) for f in (rounded, rounded - 0.002))
    run_pass(AssignPrecision(budget=relaxed, schemes=EVERY), artifacts, tmp_path)
    with pytest.raises(RecipeError, match="the smallest factor that works"):
        run_pass(AssignPrecision(budget=tight, schemes=EVERY), artifacts, tmp_path)


def test_layers_on_one_input_round_it_alike_if_that_is_asked_for(tmp_path):
    # apart, l0 would take w4a16, whose input is float, and l2 w8a8
    artifacts = given((1e-3, 1e-5), (1e-4, 1e-3), (1e-6, 1e-3), same_input=(("l0", "l2"), ("l1", "gone")))
    apart = run_pass(AssignPrecision(budget=Budget(size=0.6)), artifacts, tmp_path)[PLAN]
    assert named(apart) == {"l0": "w4a16", "l1": "w8a8_token", "l2": "w8a8_token"}
    alike = run_pass(AssignPrecision(budget=Budget(size=0.6), same_input=True), artifacts, tmp_path)[PLAN]
    assert alike.schemes["l0"].input == alike.schemes["l2"].input
    plans = [p for p in every_plan(artifacts) if "float" not in p.values() and p["l0"] == p["l2"]]
    best = min((p for p in plans if costs(artifacts, p)["size"] <= 0.6), key=lambda p: loss(artifacts, p))
    assert named(alike) == best


def test_layers_on_one_input_without_a_common_format_are_an_error(tmp_path):
    artifacts = given(*ERRORS, same_input=(("l0", "l1"),))
    step = AssignPrecision(schemes={"linear": ("w8a8_token",)}, same_input=True, keep=("l1",))
    with pytest.raises(RecipeError, match=r"l0 \(w8a8_token\), l1 \(float\) read the same tensor, but no input format"):
        run_pass(step, artifacts, tmp_path)


def test_the_front_goes_from_the_smallest_plan_to_the_best_and_every_point_can_be_taken(measured, tmp_path):
    artifacts = measured | {TARGET: RTX}
    schemes = {"linear": ("float", "w8a8_token", "w4a16"), "conv": ("float", "w8a8_step", "w4a16")}
    made = run_pass(AssignPrecision(schemes=schemes), artifacts, tmp_path)
    front = made[FRONT]
    assert len(front.points) >= 12
    sizes = [p.costs["size"] for p in front.points]
    losses = [p.loss for p in front.points]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    layers, t = made[PLAN].layers, artifacts[SENSITIVITY]
    whole = sum(layer.size_bytes(FLOAT) for layer in layers)
    smallest = sum(min(layer.size_bytes(s) for s in t.schemes[layer.name].values()) for layer in layers)
    assert sizes[0] == pytest.approx(smallest / whole, rel=1e-4)
    assert (losses[-1], front.psnr_db(front.points[-1])) == (0.0, math.inf)
    for point in front.points:
        assert point.loss == pytest.approx(sum(t.total(n, s) for n, s in point.schemes.items()))
        assert set(point.costs) == {"size", "latency", "bops"}
        # nothing that is not larger than the point is better
        assert all(other.loss >= point.loss for other in front.points if other.costs["size"] <= point.costs["size"])
    taken = run_pass(AssignPrecision(schemes=schemes, point=7), artifacts, tmp_path)
    assert named(taken[PLAN]) == front.points[7].schemes
    assert (taken[FRONT].points, taken[FRONT].chosen) == (front.points, front.points[7])
    count = len(front.points)
    too_large = rf"assign\.point: 99 is too large: the front has {count} plans, numbered 0 to {count - 1}"
    with pytest.raises(RecipeError, match=too_large):
        run_pass(AssignPrecision(schemes=schemes, point=99), artifacts, tmp_path)
    with pytest.raises(RecipeError, match=r"assign\.point: 0 is too large: the front has no plans: set assign\.front"):
        run_pass(AssignPrecision(schemes=schemes, front=0, point=0), artifacts, tmp_path)


def test_the_front_keeps_to_the_other_budgets_and_round_trips(tmp_path):
    artifacts = given(*ERRORS)
    front = run_pass(AssignPrecision(budget=Budget(size=0.6, bops=0.27), schemes=EVERY), artifacts, tmp_path)[FRONT]
    assert max(point.costs["bops"] for point in front.points) <= 0.27
    within = [p for p in every_plan(artifacts) if costs(artifacts, p)["bops"] <= 0.27]
    for point in front.points:
        size = point.costs["size"] * (1 + 1e-9)
        best = min(loss(artifacts, p) for p in within if costs(artifacts, p)["size"] <= size)
        assert point.loss == pytest.approx(best, rel=1e-4)
    front.save(tmp_path)
    assert type(front).load(tmp_path) == front
    assert run_pass(AssignPrecision(front=0), artifacts, tmp_path)[FRONT].points == ()


def test_a_hundred_layers_within_three_budgets_are_solved_to_a_thousandth():
    rng = np.random.default_rng(0)
    layers, formats = 100, 6
    bits = np.array([(16, 16), (8, 8), (8, 8), (4, 16), (4, 8), (4, 4)])
    weights, rows = rng.integers(1, 100, layers), rng.choice([1, 64, 1024], layers)
    worst = np.array([0, 1, 1.5, 20, 25, 300])
    error = 10 ** rng.normal(-6, 1, (layers, 1)) * worst * 10 ** rng.normal(0, 0.1, (layers, formats))
    size = weights[:, None] * bits[:, 0] / (16 * weights.sum())
    bops = (weights * rows)[:, None] * bits.prod(1) / (256 * (weights * rows).sum())
    time = rng.uniform(0.5, 1, (layers, 1)) * np.array([1, 0.5, 0.45, 0.9, 0.55, 0.5]) / layers
    problem = Knapsack(
        np.repeat(np.arange(layers), formats),
        error.ravel(),
        {"size": size.ravel(), "latency": time.ravel(), "bops": bops.ravel()},
        gap=1e-3,
    )
    limits = {"size": 0.35, "latency": 0.45, "bops": 0.2}
    chosen = problem.best(limits)
    assert len(chosen) == layers
    assert (problem.layer[chosen] == np.arange(layers)).all()
    for name, limit in limits.items():
        assert problem.costs[name][chosen].sum() <= limit * (1 + 1e-9)
    # the bound is that of mixed options: what it leaves open are steps of a few layers
    assert problem.bound(limits) <= problem.loss[chosen].sum() <= problem.bound(limits) * 1.02
    unit = problem.bound(limits) / 1000
    whole = milp(
        problem.loss / unit,
        integrality=np.ones(layers * formats),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(layers), np.ones(formats)), 1, 1),
            LinearConstraint([1000 * problem.costs[n] / limit for n, limit in limits.items()], -np.inf, 1000),
        ],
        options={"mip_rel_gap": 1e-5},
    )
    assert whole.mip_dual_bound * (1 - 1e-9) <= problem.loss[chosen].sum() / unit <= whole.mip_dual_bound * (1 + 1e-3)


def test_lines_that_the_solver_prints_are_dropped(capfd):
    with _silenced():
        os.write(1, b"noise\n")
    print("result")
    assert capfd.readouterr() == ("result\n", "")


def test_default_budget_keeps_8_bits(measured, tmp_path):
    plan = run_pass(AssignPrecision(budget=Budget(size=0.7)), measured, tmp_path)[PLAN]
    assert {s.name for s in plan.schemes.values()} == {"w8a8_token", "w8a8_step"}
    assert plan.weight_bits_mean == 8


def test_kept_layers_stay_in_float(measured, tmp_path):
    step = AssignPrecision(budget=Budget(size=0.9), keep=("proj_out_2",))
    plan = run_pass(step, measured, tmp_path)[PLAN]
    assert [n for n, s in plan.schemes.items() if s == FLOAT] == ["proj_out_2"]


def test_a_scheme_that_was_not_measured_is_an_error(measured, tmp_path):
    step = AssignPrecision(schemes={"linear": ("w4a8_token",), "conv": ("w8a8_step",)})
    with pytest.raises(RecipeError, match=r"no layer was measured with w4a8_token: list it in sensitivity\.schemes"):
        run_pass(step, measured, tmp_path)


@pytest.mark.parametrize("name", ["proj_out_9", "proj_out", "transformer_blocks.0", "to_q"])
def test_unknown_kept_layer_is_an_error(name, measured, tmp_path):
    """Parts of names are names of no layer."""
    with pytest.raises(RecipeError, match=f"no quantizable layer '{name}'"):
        run_pass(AssignPrecision(keep=(name,)), measured, tmp_path)


def test_plan_is_total_and_round_trips(measured, tmp_path):
    plan = run_pass(AssignPrecision(budget=Budget(size=0.6)), measured, tmp_path)[PLAN]
    assert set(plan.schemes) == {layer.name for layer in measured[SENSITIVITY].layers}
    plan.save(tmp_path)
    assert type(plan).load(tmp_path) == plan


def test_scheme_the_target_does_not_run_is_refused_before_anything_runs():
    with pytest.raises(TargetError, match="for conv layers, not w8a8_token"):
        AssignPrecision(schemes={"linear": ("w8a8_token",), "conv": ("w8a8_token",)}).check(load_target("tensorrt-rtx"))


def test_illegal_groups_are_not_chosen(measured, tmp_path):
    narrow = measured[TARGET].model_copy(update={"group_sizes": (128,)})
    plan = run_pass(AssignPrecision(budget=Budget(size=0.6)), {**measured, TARGET: narrow}, tmp_path)[PLAN]
    assert "w4a16" not in {s.name for s in plan.schemes.values()}  # every measured group is 64 or 32


def test_outputs_of_convolutions_are_rounded_where_the_recipe_and_the_target_ask_for_it(measured, tmp_path):
    found = {}
    for asked in ("float", "target"):
        for target in ("onnxruntime-cpu", "tensorrt-rtx"):
            step = AssignPrecision(budget=Budget(size=0.7), conv_output=asked)
            plan = run_pass(step, {**measured, TARGET: load_target(target)}, tmp_path)[PLAN]
            found[asked, target] = plan.schemes["pos_embed.proj"].name
            assert plan.schemes["proj_out_2"].name in ("w8a8_token", "w8a8_step")
    assert found.pop(("target", "onnxruntime-cpu")) == "w8a8o8_step"
    assert set(found.values()) == {"w8a8_step"}


def test_a_rounded_output_counts_with_its_own_error_if_that_was_measured(measured):
    layer = Layer(name="c", op="conv", shape=(8, 4, 3, 3), bias=True)
    schemes = {"w8a8_step": W8A8_STEP, "w8a8o8_step": with_output(W8A8_STEP)}
    step = AssignPrecision(conv_output="target")
    for known in (schemes, {"w8a8_step": W8A8_STEP}):
        t = Sensitivity(((0, 1),), (1.0,), (layer,), {"c": known}, {"c": dict.fromkeys(known, (0.1,))}, samples=SAMPLES)
        choices = step._choices(layer, t, load_target("onnxruntime-cpu"))
        assert choices == {list(known)[-1]: with_output(W8A8_STEP)}


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("onnxruntime-avx2", {"w7a8_token"}),  # one 8-bit weight would make all products slower
        ("onnxruntime-vnni", {"w7a8_token", "w8a8_token"}),
        ("tensorrt-rtx", {"w7a8_token", "w8a8_token"}),
    ],
)
def test_weights_that_the_fast_kernels_cannot_multiply_give_way_to_narrower_ones(target, chosen):
    layer = Layer(name="a", op="linear", shape=(64, 32), bias=True)
    schemes = {scheme.name: scheme for scheme in (W8A8_TOKEN, W7A8_TOKEN)}
    errors = {"a": dict.fromkeys(schemes, (0.1,))}
    table = Sensitivity(((0, 1),), (1.0,), (layer,), {"a": schemes}, errors, samples=SAMPLES)
    step = AssignPrecision(schemes={"linear": tuple(schemes)})
    assert step._choices(layer, table, load_target(target)).keys() == chosen
    alone = AssignPrecision(schemes={"linear": ("w8a8_token",)})
    assert alone._choices(layer, table, load_target(target)).keys() == {"w8a8_token"}
