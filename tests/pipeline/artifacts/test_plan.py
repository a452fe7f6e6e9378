import re

import pytest

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.errors import ContractError, TargetError
from intaglio.pipeline.formats.known import scheme_names
from intaglio.pipeline.formats.layer import Layer, admitted_schemes, structural_schemes
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W8A8_STEP,
    W8A8_TOKEN,
    w4a8_step,
    w4a8_token,
    w4a16,
    w8ga16,
    with_output,
    with_shift,
)
from intaglio.pipeline.formats.target import load_target

LINEAR = Layer(name="to_q", op="linear", shape=(8, 128), bias=True)
CONV = Layer(name="conv", op="conv", shape=(8, 32, 3, 3), bias=False)


def test_sizes_in_bytes():
    assert LINEAR.size_bytes(FLOAT) == 2 * (8 * 128 + 8)
    assert LINEAR.size_bytes(W8A8_TOKEN) == 8 * 128 + 4 * 8 + 4 * 8
    assert LINEAR.size_bytes(w4a8_token(64)) == 8 * 128 // 2 + 8 * 2 + 4 * 8 + 4 * 8
    assert LINEAR.size_bytes(w4a16(64)) == 8 * 128 // 2 + 4 * 8 * 2 + 4 * 8 * 2


def test_schemes_follow_the_shape():
    assert [s.name for s in structural_schemes(LINEAR)] == ["float", "w8a8_token", "w8a8_step", "w4a16"]
    assert [s.name for s in structural_schemes(CONV)] == ["float", "w8a8_step", "w4a16"]
    assert structural_schemes(CONV)[-1] == w4a16(32)  # 288 is no multiple of 64
    narrow = Layer(name="a", op="linear", shape=(4, 12), bias=False)
    assert structural_schemes(narrow)[-1] == W8A8_STEP


def test_other_schemes_are_there_when_named():
    assert structural_schemes(LINEAR, (64,), ("w4a8_token", "w4a8_step")) == (FLOAT, w4a8_token(64), w4a8_step(64))
    stepped = ("w8a8_step", "w7a8_step", "w4a8_step", "w4a4_step")
    rounded = tuple(name.replace("_", f"{shift}o8_") for name in stepped for shift in ("", "s"))
    shifted = tuple(name.replace("_", "s_") for name in stepped)
    known = {s.name for s in admitted_schemes(CONV)}
    assert known == {"float", "w8a16", "w8ga16", "w4a16", *stepped, *rounded, *shifted, "fp8_step", "fp8_static"}
    assert known == {s.name for s in admitted_schemes(CONV.model_copy(update={"padded": True}))}
    assert set(scheme_names()) - {s.name for s in admitted_schemes(LINEAR)} == set(rounded)
    narrow = Layer(name="a", op="linear", shape=(4, 12), bias=False)
    assert structural_schemes(narrow, names=("w4a8_token",)) == (FLOAT,)


def test_two_levels_obey_the_groups_of_the_target():
    plan = QuantPlan((LINEAR,), {"to_q": w4a8_token(16)})
    with pytest.raises(TargetError, match="to_q: group size 16, but tensorrt-rtx takes 32, 64, 128"):
        plan.check(load_target("tensorrt-rtx"))
    with pytest.raises(TargetError, match=r"tensorrt-10.3-orin runs .* for linear layers, not w4a8_token"):
        plan.check(load_target("tensorrt-10.3-orin"))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt-10.3-orin"])
def test_a_padded_convolution_can_have_a_shifted_input(target):
    padded = CONV.model_copy(update={"shape": (16, 32, 3, 3), "padded": True})
    QuantPlan((padded,), {"conv": with_shift(W8A8_STEP)}).check(load_target(target))


def test_layers_that_are_refused_for_one_reason_are_named_in_one_line():
    layers = tuple(LINEAR.model_copy(update={"name": name}) for name in "abcdefghijklmno")
    plan = QuantPlan(layers, dict.fromkeys("abcdefghijklmno", w8ga16(32)))
    with pytest.raises(TargetError) as raised:
        plan.check(load_target("tensorrt-rtx"))
    assert len(raised.value.problems) == 1
    assert re.fullmatch(
        r"a, b, c, .*, l and 3 more: tensorrt-rtx runs .* for linear layers, not w8ga16", str(raised.value)
    )
    plan.check(load_target("onnxruntime-cpu"))


def test_a_convolution_with_codes_has_the_channels_that_the_target_takes():
    first = Layer(name="conv_in", op="conv", shape=(32, 4, 3, 3), bias=True)
    plan = QuantPlan((first,), {"conv_in": W8A8_STEP})
    with pytest.raises(TargetError, match="conv_in: 32 channels out, 4 in, but tensorrt-10 takes multiples of 16"):
        plan.check(load_target("tensorrt-10"))
    plan.check(load_target("tensorrt-rtx"))
    QuantPlan((first,), {"conv_in": FLOAT}).check(load_target("tensorrt-10"))


def test_a_plan_of_two_levels_is_read_as_it_was_written(tmp_path):
    plan = QuantPlan((LINEAR, CONV), {"to_q": with_shift(w4a8_token(64)), "conv": with_output(w4a8_step(32))})
    plan.save(tmp_path)
    assert QuantPlan.load(tmp_path) == plan


def test_a_plan_names_every_layer_once():
    with pytest.raises(ContractError, match=r"missing \['conv'\], unknown \['cnov'\]"):
        QuantPlan((LINEAR, CONV), {"to_q": FLOAT, "cnov": FLOAT})


def test_every_illegal_layer_is_listed():
    plan = QuantPlan((LINEAR, CONV), {"to_q": w4a16(16), "conv": W8A8_TOKEN})
    with pytest.raises(TargetError, match=r"(?s)to_q: group size 16.*conv: tensorrt-rtx runs .* not w8a8_token"):
        plan.check(load_target("tensorrt-rtx"))


def test_legal_plan_passes():
    """A layer that the target cannot execute would raise."""
    QuantPlan((LINEAR, CONV), {"to_q": w4a16(64), "conv": W8A8_STEP}).check(load_target("tensorrt-rtx"))


def test_mean_bits_are_weighted_by_parameters():
    plan = QuantPlan((LINEAR, CONV), {"to_q": w4a16(64), "conv": FLOAT})
    assert plan.weight_bits_mean == pytest.approx((1024 * 4 + 2304 * 16) / 3328)
