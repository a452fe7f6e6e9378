"""The times that a budget of latency counts: a device's roofline, its profile, or times of layers measured here."""

import json

import pytest
from assigning import ERRORS, EVERY, RTX, SAMPLES, given, named
from harness import run_pass
from pydantic import ValidationError

from intaglio import Recipe
from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.pipeline.artifacts.keys import FRONT, LAYER_TIMES, PLAN, SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.layer_times import LayerTimes
from intaglio.pipeline.artifacts.profile import LayerTime, Profile
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.formats.cost import latency_s
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN, W8A16, w4a16
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.runs.binding import bind


def test_a_latency_budget_needs_a_device_or_a_profile(tmp_path):
    step = AssignPrecision(budget=Budget(latency=0.5))
    step.check(RTX)
    cpu = load_target("onnxruntime-cpu")
    with pytest.raises(TargetError, match="onnxruntime-cpu lists no device to estimate times for"):
        step.check(cpu.model_copy(update={"kernels": ()}))
    step.check(cpu)  # time-layers can time its layers
    with pytest.raises(RecipeError, match=r"budget\.latency: no times of layers are known for onnxruntime-cpu"):
        run_pass(step, given(*ERRORS) | {TARGET: cpu}, tmp_path / "untimed")
    with pytest.raises(TargetError, match=r"tensorrt-rtx has no 'rtx-4080': did you mean 'rtx-4090'\?"):
        AssignPrecision(device="rtx-4080").check(RTX)
    artifacts = given(*ERRORS)
    del artifacts[WORKLOAD]
    with pytest.raises(RecipeError, match=r"assign\.budget\.latency: needs the records of the calls"):
        run_pass(step, artifacts, tmp_path)


def profile(microseconds: dict[str, dict[str, float]], **about: object) -> list[dict[str, object]]:
    """One profile for each scheme, as `intaglio profile` writes them."""
    found = []
    for scheme, times in microseconds.items():
        layers = {n: LayerTime(scheme=scheme, microseconds=t, bytes=1) for n, t in times.items()}
        about = {"runtime": "tensorrt", "made_by": "trtexec", "runs": 3, "rows": 2, **about}
        found.append(Profile(layers=layers, rest_microseconds={}, **about).model_dump(mode="json"))
    return found


def test_measured_times_take_the_place_of_the_roofline(tmp_path):
    artifacts = given(*ERRORS[:2]) | {TARGET: load_target("onnxruntime-cpu")}  # which has no device
    times = {"float": {"l0": 10, "l1": 20}, "w8a8_token": {"l0": 12, "l1": 5}, "w4a16": {"l0": 4, "l1": 30}}
    for scheme, measured in times.items():
        (tmp_path / f"{scheme}.json").write_text(
            json.dumps(profile({scheme: measured}, runtime="onnxruntime", made_by="ort")[0])
        )
    step = AssignPrecision(
        profile=[str(tmp_path / f"{s}.json") for s in times], budget=Budget(latency=0.35), schemes=EVERY
    )
    with pytest.raises(TargetError, match=r"measured by ort, but tensorrt-rtx is for tensorrt-rtx$"):
        step.check(RTX)
    step.check(artifacts[TARGET])
    made = run_pass(step, artifacts, tmp_path)
    # (12 + 5) / 30 is too much, (4 + 5) / 30 is not
    assert named(made[PLAN]) == {"l0": "w4a16", "l1": "w8a8_token"}
    assert made[FRONT].chosen.costs["latency"] == pytest.approx(9 / 30)


def test_what_was_not_measured_is_scaled_from_the_nearest_that_was(tmp_path, caplog):
    artifacts = given(*ERRORS[:3])
    layers = {layer.name: layer for layer in artifacts[SENSITIVITY].layers}

    def bound(name, scheme):
        return latency_s(layers[name], scheme, int(artifacts[WORKLOAD].rows[name]), RTX.devices[0])

    step = AssignPrecision(
        profile=profile({"w4a16": {"l0": 7.0, "l1": 11.0}}), budget=Budget(size=1), keep=("l1", "l2")
    )
    with caplog.at_level("INFO"):
        found = run_pass(step, artifacts, tmp_path)[FRONT].chosen.costs["latency"]
    assert "1 of 4 pairs of layer and scheme were measured" in caplog.text
    whole = {n: t * bound(n, FLOAT) / bound(n, w4a16(32)) for n, t in (("l0", 7.0), ("l1", 11.0))}
    whole["l2"] = 18.0 / (bound("l0", w4a16(32)) + bound("l1", w4a16(32))) * bound("l2", FLOAT)
    quantized = 7.0 * bound("l0", W8A8_TOKEN) / bound("l0", w4a16(32))
    assert found == pytest.approx((quantized + whole["l1"] + whole["l2"]) / sum(whole.values()))


def test_a_profile_that_does_not_fit_is_an_error(tmp_path):
    other = AssignPrecision(profile=profile({"float": {"x": 1.0}}))
    with pytest.raises(RecipeError, match=r"assign\.profile: has none of the model's 5 layers"):
        run_pass(other, given(*ERRORS), tmp_path)
    two = profile({"float": {"l0": 1.0}}) + profile({"w4a16": {"l0": 1.0}}, rows=8)
    with pytest.raises(ValidationError, match="have different numbers of rows, 2 and 8: measure them again"):
        AssignPrecision(profile=two)
    two = profile({"float": {"l0": 1.0}}) + profile({"w4a16": {"l0": 1.0}}, made_by="ort")
    with pytest.raises(ValidationError, match="made by different tools, ort and trtexec: measure them again with one"):
        AssignPrecision(profile=two)
    with pytest.raises(ValidationError, match=r"gone\.json: cannot be read: No such file"):
        AssignPrecision(profile="gone.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValidationError, match=r"plan\.json: is damaged: .*: not what `intaglio profile` writes"):
        AssignPrecision(profile=[str(tmp_path / "plan.json")])


def test_a_profile_is_found_beside_the_recipe_and_is_part_of_the_options(tmp_path):
    (tmp_path / "fast.json").write_text(json.dumps(profile({"float": {"l0": 1.5}}, runtime="onnxruntime")[0]))
    text = "{model: m, targets: [onnxruntime-cpu], steps: [calibrate, sensitivity, assign: {profile: fast.json}]}"
    ((*_, assign),) = (chain.steps for chain in bind(Recipe.parse(text), base=tmp_path))
    step = assign.configured
    assert step.model_dump()["profile"][0]["layers"]["l0"]["microseconds"] == 1.5
    assert AssignPrecision.model_validate(step.model_dump(mode="json")) == step


def test_the_roofline_is_that_of_the_named_device_and_of_so_many_samples(tmp_path):
    artifacts = given(*ERRORS[:2], rows=(1.5, 4096)) | {TARGET: load_target("tensorrt-10")}
    device = next(device for device in artifacts[TARGET].devices if device.name == "h100-sxm")
    step = AssignPrecision(device="h100-sxm", samples=3, budget=Budget(size=1))
    plan, front = (run_pass(step, artifacts, tmp_path)[key] for key in (PLAN, FRONT))
    assert named(plan) == {"l0": "w8a8_token", "l1": "w8a8_token"}
    quantized, whole = (
        sum(latency_s(layer, s, rows, device) for layer, rows in zip(plan.layers, (5, 3 * 4096), strict=True))
        for s in (W8A8_TOKEN, FLOAT)
    )
    assert front.chosen.costs["latency"] == pytest.approx(quantized / whole)


def test_measured_times_of_layers_take_the_place_of_estimates(tmp_path):
    """`a` is fast in 8 bits and slow in W8A16; without any loss to speak of, the times alone decide."""
    layer = Layer(name="a", op="linear", shape=(64, 32), bias=True)
    schemes = {scheme.name: scheme for scheme in (W8A8_TOKEN, W8A16)}
    table = Sensitivity(
        ((0, 1),), (1.0,), (layer,), {"a": schemes}, {"a": dict.fromkeys(schemes, (1e-9,))}, samples=SAMPLES
    )
    step = AssignPrecision(budget=Budget(psnr=20), schemes={"linear": tuple(schemes)}, drawn=0)
    artifacts = {SENSITIVITY: table, TARGET: load_target("onnxruntime-vnni"), WORKLOAD: Workload({"a": 16.0})}
    for fast, slow in (("w8a8_token", "w8a16"), ("w8a16", "w8a8_token")):
        times = LayerTimes({"a": {"float": 1.0, fast: 0.5, slow: 0.75}}, 1e-9)
        made = run_pass(step, {**artifacts, LAYER_TIMES: times}, tmp_path / fast)
        assert made[PLAN].schemes["a"].name == fast
        assert made[FRONT].chosen.costs["latency"] == pytest.approx(0.5)


def test_a_plan_that_is_slower_than_float_says_so_and_an_untimed_scheme_is_an_error(tmp_path, caplog):
    layer = Layer(name="a", op="linear", shape=(64, 32), bias=True)
    table = Sensitivity(
        ((0, 1),), (1.0,), (layer,), {"a": {"w8a8_token": W8A8_TOKEN}}, {"a": {"w8a8_token": (1e-9,)}}, samples=SAMPLES
    )
    step = AssignPrecision(budget=Budget(psnr=20), schemes={"linear": ("w8a8_token",)}, drawn=0)
    artifacts = {SENSITIVITY: table, TARGET: load_target("onnxruntime-vnni"), WORKLOAD: Workload({"a": 16.0})}
    times = LayerTimes({"a": {"float": 1.0, "w8a8_token": 1.25}}, 1e-9)
    run_pass(step, {**artifacts, LAYER_TIMES: times}, tmp_path / "slow")
    assert "the layers of the plan take 1.25 times as long as in float on this CPU: add `float`" in caplog.text
    times = LayerTimes({"a": {"float": 1.0}}, 1e-9)
    with pytest.raises(RecipeError, match=r"time-layers\.schemes: a was not timed with w8a8_token: add this scheme"):
        run_pass(step, {**artifacts, LAYER_TIMES: times}, tmp_path / "untimed")
