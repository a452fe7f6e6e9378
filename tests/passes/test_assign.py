import itertools

import pytest
from harness import run_pass

from intaglio.passes.assign import AssignPrecision, Budget, solve
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.keys import PLAN, SENSITIVITY, TARGET
from intaglio.pipeline.plan import Layer
from intaglio.pipeline.quant.spec import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16, with_output
from intaglio.pipeline.sensitivity import Sensitivity
from intaglio.pipeline.target import load_target

SCHEMES = {"float": FLOAT, "w8a8_token": W8A8_TOKEN, "w4a16": w4a16(16)}


def table(*errors: tuple[float, float]) -> Sensitivity:
    layers = tuple(Layer(name=f"l{i}", op="linear", shape=(8 * (i + 1), 32), bias=False) for i in range(len(errors)))
    error = {
        layer.name: {"float": (0.0,), "w8a8_token": (e8,), "w4a16": (e4,)}
        for layer, (e8, e4) in zip(layers, errors, strict=True)
    }
    return Sensitivity(layers, ((0, 1),), (1.0,), {layer.name: SCHEMES for layer in layers}, error)


def test_solution_is_the_best_of_all_plans():
    t = table((1e-6, 5e-4), (2e-6, 3e-4), (3e-6, 9e-4), (1e-7, 2e-5), (4e-6, 1e-4))
    names = [layer.name for layer in t.layers]
    limit = 0.45 * sum(layer.size_bytes(FLOAT) for layer in t.layers)
    plans = (dict(zip(names, pick, strict=True)) for pick in itertools.product(SCHEMES, repeat=len(names)))

    def size(plan: dict[str, str]) -> int:
        return sum(layer.size_bytes(SCHEMES[plan[layer.name]]) for layer in t.layers)

    best = min((p for p in plans if size(p) <= limit), key=lambda p: sum(t.total(n, s) for n, s in p.items()))
    found = solve(t, t.schemes, limit)
    assert {n: s.name for n, s in found.items()} == best


def test_impossible_budget_says_what_is_possible():
    t = table((1e-6, 1e-4))
    with pytest.raises(RecipeError, match=r"smallest legal plan takes \d+ bytes: allow at least 0\.\d+"):
        solve(t, t.schemes, 10.0)


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


def test_unknown_kept_layer_is_an_error(measured, tmp_path):
    with pytest.raises(RecipeError, match="no quantizable layer 'proj_out_9'"):
        run_pass(AssignPrecision(keep=("proj_out_9",)), measured, tmp_path)


def test_plan_is_total_and_round_trips(measured, tmp_path):
    plan = run_pass(AssignPrecision(budget=Budget(size=0.6)), measured, tmp_path)[PLAN]
    assert set(plan.schemes) == {layer.name for layer in measured[SENSITIVITY].layers}
    plan.save(tmp_path)
    assert type(plan).load(tmp_path) == plan


def test_scheme_the_target_does_not_run_is_refused_before_anything_runs():
    with pytest.raises(TargetError, match="for a conv, not w8a8_token"):
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
        t = Sensitivity((layer,), ((0, 1),), (1.0,), {"c": known}, {"c": dict.fromkeys(known, (0.1,))})
        choices = step._choices(layer, t, load_target("onnxruntime-cpu"))
        assert choices == {list(known)[-1]: with_output(W8A8_STEP)}
