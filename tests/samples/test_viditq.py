import pytest
from _given_plan import GivenPlan
from _rows import Rows
from _viditq_plans import Ends, given
from harness import run_pass
from mixed_plan import narrowed
from viditq import derived, summary

from intaglio.pipeline.artifacts.keys import PLAN
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import W8A8_TOKEN, w4a8_token

LAYERS = tuple(
    Layer(name=name, op="linear", shape=(64, k), bias=True) for name, k in [("a", 128), ("b", 48), ("c", 256)]
)
EIGHT = QuantPlan(LAYERS, {layer.name: W8A8_TOKEN for layer in LAYERS})
FOUR = EIGHT.replace({name: w4a8_token(64) for name in "ac"})
ENDS = Ends(EIGHT, FOUR)


def four(plan: QuantPlan) -> set[str]:
    return {name for name, scheme in plan.schemes.items() if scheme.weight_bits == 4}


def test_layers_go_to_four_bits_until_it_fits_and_back_where_that_fits():
    saved = {name: EIGHT.size_bytes - ENDS.four_bits([name]).size_bytes for name in "ac"}
    assert saved["a"] < saved["c"]
    assert four(ENDS.in_order(EIGHT.size_bytes - 1)) == {"a"}
    assert four(ENDS.in_order(EIGHT.size_bytes - saved["c"])) == {"c"}  # with `c`, `a` is needed no more
    assert four(narrowed(EIGHT, FOUR.schemes, EIGHT.size_bytes)) == set()
    assert four(ENDS.in_order(0)) == {"a", "c"}


def test_random_plans_fit_and_are_the_same_again():
    limit = EIGHT.size_bytes - 1
    plans = list(ENDS.random(8, limit))
    assert all(plan.size_bytes <= limit for plan in plans)
    assert {frozenset(four(plan)) for plan in plans} == {frozenset("a"), frozenset("c")}
    assert [plan.schemes for plan in plans] == [plan.schemes for plan in ENDS.random(8, limit)]


def test_a_given_plan_is_the_one_that_it_was_made_of(tmp_path):
    _, step = given(ENDS.four_bits("c"))
    made = run_pass(GivenPlan(**step.options), {PLAN: EIGHT}, tmp_path)[PLAN]
    assert made.schemes == ENDS.four_bits("c").schemes


def test_our_plan_is_chosen_from_the_schemes_of_the_others():
    *_, sensitivity = ENDS.analysis()
    assert sensitivity.options == {"schemes": ["w4a8_token", "w8a8_token"]}
    options = ENDS.assigned(FOUR.size_bytes).options
    assert options["schemes"] == {"linear": ["w8a8_token", "w4a8_token"], "conv": []}
    assert FOUR.size_bytes < options["budget"]["size"] * ENDS.float_bytes < FOUR.size_bytes + 1


def seed(ours: float, theirs: float) -> dict[str, dict[str, object]]:
    def plans(ours_db: float) -> dict[str, dict[str, float]]:
        found = {"ours": ours_db, "network order": 30.0, "all layers": 31.0, "auto_quantize": theirs, "random 0": 29.0}
        return {name: {"psnr_db": db} for name, db in found.items()}

    row = {"psnr_db": 40.0, "psnr_db_min": 35.0, "size_ratio_fp16": 2.5, "feature_distance": 0.2}
    return {"w8a8": row, "mixed": row, "small": row, "nearest": plans(ours), "balanced": plans(33.0)}


SPEED = {
    "direct_without_reuse_cpu_s": 10.0,
    "screen_cpu_s": 1.0,
    "auto_quantize_cpu_s": 20.0,
    "step_cpu_s": 25.0,
}


def test_a_plan_beats_others_where_it_does_so_however_it_is_rounded():
    better, worse = derived([seed(34.0, 32.0)], SPEED), derived([seed(30.5, 32.0), seed(30.9, 32.0)], SPEED)
    assert (better["plan_beats_uniform"], better["plan_beats_auto_quantize"]) == (True, True)
    assert (worse["plan_beats_uniform"], worse["plan_beats_auto_quantize"]) == (False, False)
    assert worse["gain_over_uniform_nearest_db"] == pytest.approx(-0.3)
    assert better["gain_over_best_random_nearest_db"] == 5
    # the step is of three parts of the trajectory, the other times are of one
    assert better["sensitivity_speedup"] == pytest.approx(1.2)
    total = summary([better, worse])
    assert (total["plan_beats_uniform"], total["gain_over_uniform_nearest_db"]) == (False, pytest.approx(-0.3))


def test_rows_are_made_once_for_all_that_they_depend_on(tmp_path):
    calls: list[str] = []

    def make(place):
        calls.append(place.name)
        return {"figure": len(calls)}

    rows = Rows(tmp_path, {"samples": 2})
    assert [rows.kept(make, plan="a")["figure"], rows.kept(make, plan="a")["figure"]] == [1, 1]
    assert rows.kept(make, plan="b")["figure"] == 2
    assert Rows(tmp_path, {"samples": 3}).kept(make, plan="a")["figure"] == 3
