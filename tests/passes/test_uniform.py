import pytest
from harness import run_pass
from pydantic import ValidationError

from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import PLAN, TARGET
from intaglio.pipeline.formats.target import load_target


def test_every_layer_has_the_first_scheme_that_fits(calibrated, tmp_path):
    step = UniformPlan(schemes=("w4a4_token", "w4a4_step", "w8a8_step"), groups=(32,))
    schemes = {n: s.name for n, s in run_pass(step, calibrated, tmp_path)[PLAN].schemes.items()}
    assert schemes["pos_embed.proj"] == "w8a8_step"  # K = 3 * 2 * 2 has no groups
    assert {scheme for name, scheme in schemes.items() if name != "pos_embed.proj"} == {"w4a4_token"}


def test_the_ends_have_their_own(calibrated, tmp_path):
    step = UniformPlan(schemes=("w4a4_token", "w8a8_step"), ends=("w8a8_token", "w8a8_step"), groups=(32,))
    plan = run_pass(step, calibrated, tmp_path)[PLAN]
    first, *between, last = (plan.schemes[layer.name].name for layer in plan.layers)
    assert (first, last) == ("w8a8_step", "w8a8_token")
    assert set(between) == {"w4a4_token"}


def test_what_the_target_does_not_run_stays_in_float(calibrated, tmp_path):
    start = calibrated | {TARGET: load_target("tensorrt-rtx")}
    plan = run_pass(UniformPlan(schemes=("w8a8o8_step",)), start, tmp_path)[PLAN]
    assert {scheme.name for scheme in plan.schemes.values()} == {"float"}


def test_unknown_schemes_are_named():
    with pytest.raises(ValidationError, match=r"no scheme 'w3a3': known are float, fp8_static, .*, w4a16, "):
        UniformPlan(schemes=("w3a3",))
