import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import tiny_families
import torch
from diffusers import DDIMScheduler
from harness import Artifacts, run_pass
from pydantic import ValidationError
from quantizing import with_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from intaglio.passes.calibrate import Calibrate
from intaglio.passes.sensitivity.groups import layer_groups
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.passes.sensitivity.study import Batch, Progress
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, SENSITIVITY, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.schemes import FLOAT, w4a16
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.cost import measure_cost
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance, LayerBalance
from intaglio.pipeline.numerics.quality import SampleRange
from intaglio.pipeline.simulation.model import quantize_model

ROUNDED = "transformer_blocks.1.norm1.linear"
"""The layer that is rounded alone, at 4 bits."""


SAMPLES = SampleRange(-1.0, 1.0, 0.25)
NO_DRIFT = {"drift_below_db": -100}
"""No error of samples is as large."""
CONTENT = {f"transformer_blocks.{i}.norm1.linear" for i in range(2)} | {"proj_out_1"}
"""Layers of the DiT that read timestep and class alone."""


def test_samples_are_drawn_where_their_psnr_in_their_own_range_is_low(measured, sensitivity, tmp_path):
    assert measured[SENSITIVITY].drift
    assert measured[SENSITIVITY].samples == measured[TRAJECTORY].samples
    wide = replace(measured[TRAJECTORY], samples=SampleRange(-1e3, 1e3, 1e5))  # a range of 2000 adds some 55 dB
    assert run_pass(sensitivity, measured | {TRAJECTORY: wide}, tmp_path)[SENSITIVITY].drift == {}


def test_every_layer_has_every_scheme_its_shape_admits(measured):
    table = measured[SENSITIVITY]
    assert len(table.layers) == 2 * 9 + 3
    assert set(table.error["transformer_blocks.0.attn1.to_q"]) == {"float", "w8a8_token", "w8a8_step", "w4a16"}
    assert set(table.error["pos_embed.proj"]) == {"float", "w8a8_step"}  # K = 12 admits no group


def test_named_schemes_alone_are_measured(calibrated, tmp_path):
    step = MeasureSensitivity(buckets=1, rows=2, schemes=("w8a8_token", "w4a8_token"), bases=(), probes=0, **NO_DRIFT)
    error = run_pass(step, calibrated, tmp_path)[SENSITIVITY].error["transformer_blocks.0.attn1.to_q"]
    assert set(error) == {"float", "w8a8_token", "w4a8_token"}
    assert 0 < error["w8a8_token"][0] < error["w4a8_token"][0]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValidationError, match="no scheme 'w4a9': did you mean 'w4a16'"):
        MeasureSensitivity(schemes=("w4a9",))


def test_fewer_bits_cost_more_and_float_nothing(measured):
    table = measured[SENSITIVITY]
    name = "transformer_blocks.1.ff.net.2"
    assert table.total(name, "float") == 0
    assert 0 < table.total(name, "w8a8_token") < table.total(name, "w4a16")


def test_stopped_measurement_goes_on_where_it_was(measured, tmp_path):
    """The last line was cut off: that layer is measured again."""
    table = measured[SENSITIVITY]
    names = [layer.name for layer in table.layers]
    done = [
        [f"{bucket}:{name}:{scheme}", {"mse": [42.0, 42.0], "condition-swap": [42.0, 42.0]}]
        for name in names[:20]
        for scheme in table.error[name]
        for bucket in range(2)
    ]
    lines = [json.dumps(each) for each in done]
    (tmp_path / "measured.0.jsonl").write_text("\n".join(lines) + "\n" + lines[0].replace(names[0], names[20])[:-5])
    resumed = run_pass(MeasureSensitivity(buckets=2, rows=4, probes=0, **NO_DRIFT), measured, tmp_path)[SENSITIVITY]
    assert resumed.error[names[0]]["w8a8_step"] == (42.0, 42.0)
    again = json.loads((tmp_path / "measured.0.jsonl").read_text().splitlines()[-1])
    assert again[0].split(":")[1] == names[20]
    assert 0 < resumed.error[names[20]]["w8a8_step"][1] < 1


def test_lines_that_are_damaged_or_of_another_run_are_measured_again(tmp_path, caplog):
    good = ["0:a:w4a16", {"mse": [1.0]}]
    lines = [good, ["0:b:w4a16", {"mse": "1"}], [["a"], {}], 5, ["c"], {"d": 1}, None, ["0:e:w4a16", None]]
    text = "\n".join(map(json.dumps, lines)) + '\n["0:f:w4a16", {"mse": [1.0' + "\n" + "[" * 100_000
    (tmp_path / "measured.0.jsonl").write_bytes(text.encode() + b"\n\xff\xfe\n")
    (tmp_path / "measured.1.jsonl").mkdir()
    context = Context(scratch=tmp_path, seed=0, log=logging.getLogger("test"))
    progress = Progress(context, "measured", lambda value: value["mse"] == [1.0])
    assert progress.gathered() == {"0:a:w4a16": {"mse": [1.0]}}
    assert "measured.0.jsonl: 10 lines are damaged or from another run: measuring them again" in caplog.text


def test_total_weighs_buckets(measured):
    table = replace(measured[SENSITIVITY], ranked={}, weights=(0.5, 2.0), error={"a": {"w4a16": (1.0, 5.0)}})
    assert table.total("a", "w4a16") == pytest.approx(10.5)


def test_a_layer_that_changes_the_samples_is_measured_on_whole_trajectories(measured, tmp_path):
    """With a rounded layer, and noise, of its own; a measurement of another run has other noise: a factor of four."""
    step = MeasureSensitivity(buckets=2, rows=4, drift_below_db=60, drift_samples=8)
    table = replace(run_pass(step, measured, tmp_path)[SENSITIVITY], ranked={})  # by the mean squared error alone
    assert table.total(ROUNDED, "w4a16") == table.drift[ROUNDED]["w4a16"]
    assert 0.25 < table.drift[ROUNDED]["w4a16"] / error_of_samples(measured, table) < 4
    visible = 4 / 10**6
    for layer, by in table.error.items():
        drawn = {scheme for scheme in by if table.predicted(layer, scheme) > visible}
        assert set(table.drift.get(layer, {})) == drawn


def test_samples_are_predicted_by_gradients_along_trajectories(measured):
    """As measured from the same noise, of schemes that samples are drawn for; eight draws of a deviation of sqrt(2)."""
    table = measured[SENSITIVITY]
    pairs = [(name, scheme) for name, by in table.drift.items() for scheme in by]
    ratios = [table.drift[name][scheme] / table.drift_screened[name][scheme] for name, scheme in pairs]
    assert len(pairs) > 2
    assert 0.5 < median(ratios) < 2
    unmeasured = next((n, s) for n, by in table.drift_screened.items() for s in by if s not in table.drift.get(n, {}))
    assert replace(table, ranked={}).total(*unmeasured) == table.drift_screened[unmeasured[0]][unmeasured[1]] > 0


def test_a_sampler_without_gradients_is_named_and_outputs_are_added_up(calibrated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(DDIMScheduler, "step", torch.no_grad()(DDIMScheduler.step))
    step = MeasureSensitivity(buckets=1, rows=2, schemes=("w8a8_step",), **NO_DRIFT)
    table = replace(run_pass(step, calibrated, tmp_path)[SENSITIVITY], ranked={})
    assert table.drift_screened == {}
    assert "this sampler gives no gradient" in caplog.text
    assert table.total(ROUNDED, "w8a8_step") == table.predicted_by_outputs(ROUNDED, "w8a8_step") > 0


def test_layers_of_a_balanced_plan_are_rounded_in_its_bases(calibrated, tmp_path):
    """A rotation alone: weights have other errors in it, and what a layer computes in float stays."""
    name = "transformer_blocks.0.ff.net.2"
    low, high = (calibrated[TRAJECTORY].low[name] * 4, calibrated[TRAJECTORY].high[name] * 4)
    flat = torch.ones(calibrated[MODEL].open().module.get_submodule(name).in_features)
    basis = LayerBalance(Balance.rotated(flat, 16, torch.Generator().manual_seed(0)), low, high)
    plain = with_plan(calibrated, lambda layer: w4a16(64) if layer.name == name else FLOAT)
    rotated = plain | {PLAN: plain[PLAN].balanced({name: basis})}
    step = MeasureSensitivity(buckets=1, rows=2, schemes=("w4a16",), bases=(), probes=0, **NO_DRIFT)
    before, after = (
        run_pass(step, each, tmp_path / n)[SENSITIVITY].error for n, each in (("a", plain), ("b", rotated))
    )
    assert {n for n in before if before[n] != after[n]} == {name}
    assert 0.2 < after[name]["w4a16"][0] / before[name]["w4a16"][0] < 5


def test_drift_goes_on_where_it_was(measured, sensitivity, tmp_path):
    table = measured[SENSITIVITY]
    drawn = [f"{name}:{scheme}" for name, by in table.drift.items() for scheme in by]
    done = {name: 42.0 + i for i, name in enumerate(drawn)}
    (tmp_path / "drift.1.jsonl").write_text("\n".join(map(json.dumps, done.items())))
    resumed = run_pass(sensitivity, measured, tmp_path)[SENSITIVITY]
    assert {f"{name}:{scheme}": d for name, by in resumed.drift.items() for scheme, d in by.items()} == done
    assert len(done) > 2


def test_bucket_weights_predict_the_error_of_the_samples(measured):
    """One layer at 4 bits: predicted and measured squared error of the samples agree within a factor of four."""
    table = measured[SENSITIVITY]
    assert 0.25 < table.predicted_by_outputs(ROUNDED, "w4a16") / error_of_samples(measured, table) < 4


def test_buckets_weigh_by_gradients_what_they_do_by_noise_in_them(measured, tmp_path):
    step = MeasureSensitivity(buckets=2, rows=16, schemes=("w8a8_step",), samples=0, direct=0, probes=1, **NO_DRIFT)
    by_noise = run_pass(step, measured, tmp_path)[SENSITIVITY].weights
    for by_gradients, drawn in zip(measured[SENSITIVITY].weights, by_noise, strict=True):
        assert 0.5 < by_gradients / drawn < 2


def error_of_samples(measured: Artifacts, table: Sensitivity) -> float:
    """Mean squared error of samples with this one layer at 4 bits."""
    model, trajectory = measured[MODEL].open(), measured[TRAJECTORY]
    sampler = Sampler(model, 4, 2.0)
    start = sampler.start(8, torch.Generator().manual_seed(0))
    reference = sampler.sample(denoise_with(model.module, model), start)
    quantize_model(model.module, {ROUNDED: table.schemes[ROUNDED]["w4a16"]}, StepClock(trajectory.timesteps))
    moved = sampler.sample(denoise_with(model.module, model), start)
    return float((moved - reference).square().mean())


def test_a_measured_error_is_that_of_the_rounded_model(measured):
    """Equal to the bit to quantizing the layer and calling the whole model; the standard error is over samples."""
    table, trajectory, model = measured[SENSITIVITY], measured[TRAJECTORY], measured[MODEL].open()
    denoise, clock = denoise_with(model.module, model), StepClock(trajectory.timesteps)
    assert "w4a16" in table.measured[ROUNDED]
    rows = [0, 4, 8, 12]  # samples 0 and 4, with and without their class; the middle of the second half
    with torch.no_grad():
        reference = denoise(trajectory.call(3, rows))
        quantize_model(model.module, {ROUNDED: table.schemes[ROUNDED]["w4a16"]}, clock)
        with clock.at(3):
            off = denoise(trajectory.call(3, rows)) - reference
    by_row = off.flatten(1).square().sum(1) / reference.flatten(1).square().sum(1).mean()
    first, second = by_row.double().reshape(2, 2).mean(0).tolist()
    assert table.error[ROUNDED]["w4a16"][1] == (first + second) / 2
    assert table.stderr[ROUNDED]["w4a16"][1] == pytest.approx(abs(first - second) / 2)


def test_the_prediction_ranks_layers_as_their_measurement_does(measured):
    table = measured[SENSITIVITY]
    pairs = sum(len(by) - 1 for by in table.error.values())
    assert pairs / 10 <= sum(map(len, table.measured.values())) < pairs / 2
    assert 0.9 < table.rank_correlation <= 1
    visual = [(n, s) for n, by in table.screened.items() if n not in CONTENT for s in by]
    order = sorted(visual, key=lambda pair: table.predicted_by_outputs(*pair))
    halves = (order[: len(order) // 2], order[len(order) // 2 :])
    assert all(any(scheme in table.measured[name] for name, scheme in half) for half in halves)
    for name, schemes in table.measured.items():
        for scheme in {"w8a8_token", "w4a16"} & set(schemes):
            # four rows of two probes in each of two buckets: 16 draws of a relative deviation of sqrt(2), three of them
            assert 0.3 < table.screened[name][scheme][1] / table.error[name][scheme][1] < 3


def test_what_is_not_measured_is_predicted_as_the_measured_ones_say(measured):
    table = measured[SENSITIVITY]
    ratios = {
        table.error[name][scheme][bucket] / table.screened[name][scheme][bucket]
        for name, by in table.screened.items()
        for scheme in by
        for bucket in range(2)
        if scheme == "w8a8_token" and scheme not in table.measured[name]
    }
    assert len(ratios) > 2
    assert max(ratios) == pytest.approx(min(ratios))


def test_layers_whose_prediction_is_off_are_measured_in_all_schemes(measured, tmp_path):
    step = MeasureSensitivity(buckets=2, rows=4, bases=(), probes=2, direct=0.1, agree=1.05, **NO_DRIFT)
    table = run_pass(step, measured, tmp_path)[SENSITIVITY]
    whole = {name for name, schemes in table.measured.items() if len(schemes) == len(table.error[name]) - 1}
    assert whole - CONTENT
    worst = max((n for n in table.error if "w4a16" in table.screened[n]), key=lambda n: sum(table.screened[n]["w4a16"]))
    assert "w4a16" in table.measured[worst]


def test_weight_and_input_have_errors_of_their_own(measured, tmp_path):
    """Together near their sum: roundings of weight and input are independent."""
    table = measured[SENSITIVITY]
    parts = table.apart[ROUNDED]
    assert parts["w4a16"] == {"weight": table.error[ROUNDED]["w4a16"], "input": (0.0, 0.0)}
    assert parts["w8a8_step"]["weight"] == parts["w8a8_token"]["weight"] != parts["w8a8_token"]["input"]
    step = MeasureSensitivity(buckets=1, rows=4, probes=0, apart="measured", schemes=("w8a8_token",), **NO_DRIFT)
    exact = run_pass(step, measured, tmp_path)[SENSITIVITY]
    name = "transformer_blocks.0.ff.net.2"
    (weight,), (x,), (both,) = (*exact.apart[name]["w8a8_token"].values(), exact.error[name]["w8a8_token"])
    assert 0.5 < (weight + x) / both < 2
    assert min(weight, x) > 0


def test_groups_are_found_and_ranked_by_their_metric(measured):
    """Within the group the metric decides, all of it costs what the mean squared error says."""
    table = measured[SENSITIVITY]
    assert {name for name, group in table.groups.items() if group == "content"} == CONTENT
    assert table.metrics == {"visual": "mse", "content": "condition-swap"}
    assert set(table.ranked) == CONTENT
    pairs = [(name, scheme) for name in CONTENT for scheme in table.ranked[name]]
    squared = replace(table, ranked={})
    assert sum(table.total(*p) for p in pairs) == pytest.approx(sum(squared.total(*p) for p in pairs))
    assert any(table.total(*p) != pytest.approx(squared.total(*p), rel=0.01) for p in pairs)
    assert table.total(ROUNDED.replace("1.norm1.linear", "0.attn1.to_q"), "w4a16") == squared.total(
        ROUNDED.replace("1.norm1.linear", "0.attn1.to_q"), "w4a16"
    )


def test_total_moves_errors_within_their_group_alone():
    """Computed by hand: r = 2 / 1 and 1 / 3, moved 1 * 2 and 3 / 3, scaled by (1 + 3) / (2 + 1)."""
    errors = {"a": {"w8": (1.0,)}, "b": {"w8": (3.0,)}, "c": {"w8": (5.0,)}}
    groups = {"a": "content", "b": "content", "c": "visual"}
    ranked = {"a": {"w8": (2.0,)}, "b": {"w8": (1.0,)}}
    table = Sensitivity(((0, 1),), (1.0,), (), {}, errors, groups=groups, ranked=ranked, samples=SAMPLES)
    assert [table.total(name, "w8") for name in "abc"] == pytest.approx([8 / 3, 4 / 3, 5.0])


def test_a_metric_ranks_layers_and_never_the_schemes_of_one():
    """Computed by hand: a moves 1 * 9 + 3 * 1 / 3 of its 4, b keeps its 4, so f = 8 / 14 * 10 / 4 and 8 / 14."""
    errors = {"a": {"w8": (1.0,), "w4": (3.0,)}, "b": {"w8": (1.0,), "w4": (3.0,)}}
    ranked = {"a": {"w8": (9.0,), "w4": (1.0,)}, "b": errors["b"]}
    table = Sensitivity(
        ((0, 1),), (1.0,), (), {}, errors, groups=dict.fromkeys("ab", "content"), ranked=ranked, samples=SAMPLES
    )
    found = [table.total(name, scheme) for name in "ab" for scheme in ("w8", "w4")]
    assert found == pytest.approx([10 / 7, 30 / 7, 4 / 7, 12 / 7])


def test_without_guidance_samples_have_partners_under_another_condition(calibrated):
    model, trajectory = calibrated[MODEL].open(), calibrated[TRAJECTORY]
    batch = Batch.of(Sampler(model, 4, 1.0), trajectory, 8, swapped=True)
    inputs, context = batch.inputs(2), batch.context(2)
    assert context.partner.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert torch.equal(inputs["hidden_states"][:4], inputs["hidden_states"][4:])
    labels = inputs["class_labels"].tolist()
    assert labels[4:] == [labels[3], *labels[:3]]


def test_layers_that_read_conditions_alone_are_content():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.time, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, t, text):
            return self.out(self.query(x) * self.key(text) + self.time(t))

    torch.manual_seed(0)
    module = Cross()
    plain = {name: torch.randn(2, 8) for name in ("x", "t", "text")}
    calls = {
        "plain": plain,
        "noise": {**plain, "x": -plain["x"]},
        "conditions": {**plain, "text": plain["text"].flip(0)},
    }
    groups = layer_groups(module, lambda inputs: module(**inputs), calls, ["query", "key", "time", "out"])
    assert groups == {"query": "visual", "key": "content", "time": "visual", "out": "visual"}


def test_layers_that_read_tokens_along_frames_are_temporal(tmp_path):
    """Latte: 2 frames of 16 places. Its blocks for time, and nothing else, are ranked by differences of frames."""
    ref = ModelRef(path="tiny_families.py:latte", sampling_steps=2)
    start = {MODEL: Checkpoint.resolve(ref, Path(tiny_families.__file__).parent)}
    start |= run_pass(Calibrate(samples=2), start | {TARGET: load_target("onnxruntime-cpu")}, tmp_path / "calibrate")
    step = MeasureSensitivity(buckets=1, rows=4, schemes=("w8a8_token",), **NO_DRIFT)
    table = run_pass(step, start, tmp_path / "sensitivity")[SENSITIVITY]
    in_time = {layer.name for layer in table.layers if layer.name.startswith("temporal_transformer_blocks.")}
    assert {name for name, group in table.groups.items() if group == "temporal"} == in_time != set()
    assert table.groups["transformer_blocks.0.attn1.to_q"] == "visual"
    assert table.groups["transformer_blocks.0.attn2.to_k"] == "content"
    assert table.metrics == {"visual": "mse", "content": "condition-swap", "temporal": "temporal"}
    assert in_time < set(table.ranked)


def test_as_many_places_as_frames_are_not_taken_for_frames():
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.space, self.time = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            rows, _, frames, places = x.shape
            y = self.space(x.permute(0, 2, 3, 1).reshape(rows * frames, places, 4))
            return self.time(y.reshape(rows, frames, places, 4).transpose(1, 2).reshape(rows * places, frames, 4))

    module = Along()
    for places, group in ((5, "temporal"), (3, "visual"), (1, "visual")):
        calls = {"plain": {"x": torch.randn(2, 4, 3, places)}}
        found = layer_groups(module, lambda inputs: module(**inputs), calls, ["space", "time"], frames=(2, 3))
        assert found == {"space": "visual", "time": group}


def test_unknown_metrics_are_refused_before_anything_runs():
    step = MeasureSensitivity(metrics={"content": "condition-swop"})
    assert step.metrics["visual"] == "mse"
    with pytest.raises(RecipeError, match=r"sensitivity\.metrics\.content: no metric 'condition-swop': did you mean"):
        step.check(load_target("onnxruntime-cpu"))
    with pytest.raises(ValidationError, match="visuel"):
        MeasureSensitivity(metrics={"visuel": "mse"})


@pytest.mark.parametrize("options", [{"direct": 0.4, "agree": 1e9}, {"probes": 0}, {"probes": 0, "apart": "measured"}])
def test_rows_are_estimated_as_they_are_computed(calibrated, options, tmp_path):
    """Rows are counted by products, in a model whose layers all have the scheme; other metrics would measure more."""
    step = MeasureSensitivity(
        buckets=1, rows=4, schemes=("w8a8_step",), metrics={"content": "mse"}, **options, **NO_DRIFT
    )
    model = calibrated[MODEL].open()
    with FlopCounterMode(display=False) as one, torch.no_grad():
        denoise_with(model.module, model)(calibrated[TRAJECTORY].call(0, [0]))
    with FlopCounterMode(display=False) as all_of_it:
        run_pass(step, calibrated, tmp_path)
    counted = all_of_it.get_total_flops() / one.get_total_flops()
    assert step.forward_rows(measure_cost(calibrated[MODEL])) == pytest.approx(counted, rel=0.1)


def test_a_table_is_what_was_saved(measured, tmp_path):
    measured[SENSITIVITY].save(tmp_path)
    assert Sensitivity.load(tmp_path) == measured[SENSITIVITY]
