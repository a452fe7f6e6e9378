import json

import pytest
import torch
from harness import Artifacts, run_pass
from pydantic import ValidationError

from intaglio.passes.sensitivity import MeasureSensitivity
from intaglio.pipeline.denoiser import Sampler, denoise_with
from intaglio.pipeline.keys import MODEL, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.quant.modules import StepClock, quantize_model
from intaglio.pipeline.sensitivity import Sensitivity

ROUNDED = "transformer_blocks.1.norm1.linear"
"""The layer that is rounded alone, at 4 bits."""


def test_every_layer_has_every_scheme_its_shape_admits(measured):
    table = measured[SENSITIVITY]
    assert len(table.layers) == 2 * 9 + 3
    assert set(table.error["transformer_blocks.0.attn1.to_q"]) == {"float", "w8a8_token", "w8a8_step", "w4a16"}
    assert set(table.error["pos_embed.proj"]) == {"float", "w8a8_step"}  # K = 12 admits no group


def test_named_schemes_alone_are_measured(measured, tmp_path):
    step = MeasureSensitivity(buckets=1, rows=2, schemes=("w8a8_token", "w4a8_token"))
    done = {layer.name: {} for layer in measured[SENSITIVITY].layers}
    name = "transformer_blocks.0.attn1.to_q"
    del done[name]
    (tmp_path / "measured.json").write_text(json.dumps(done))  # as if the others were done
    error = run_pass(step, measured, tmp_path)[SENSITIVITY].error[name]
    assert set(error) == {"float", "w8a8_token", "w4a8_token"}
    assert 0 < error["w8a8_token"][0] < error["w4a8_token"][0]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValidationError, match="unknown schemes w4a9: there is float, w8a8_token"):
        MeasureSensitivity(schemes=("w4a9",))


def test_fewer_bits_cost_more_and_float_nothing(measured):
    table = measured[SENSITIVITY]
    name = "transformer_blocks.1.ff.net.2"
    assert table.total(name, "float") == 0
    assert 0 < table.total(name, "w8a8_token") < table.total(name, "w4a16")


def test_stopped_measurement_goes_on_where_it_was(measured, tmp_path):
    table = measured[SENSITIVITY]
    done = {name: {s: [42.0] * 2 for s in schemes} for name, schemes in list(table.error.items())[:20]}
    (tmp_path / "measured.json").write_text(json.dumps(done))
    resumed = run_pass(MeasureSensitivity(buckets=2, rows=4), measured, tmp_path)[SENSITIVITY]
    names = [layer.name for layer in table.layers]
    assert resumed.error[names[0]]["w8a8_step"] == (42.0, 42.0)
    assert resumed.error[names[20]] == table.error[names[20]]


def test_total_weighs_buckets(measured):
    from dataclasses import replace

    table = replace(measured[SENSITIVITY], weights=(0.5, 2.0), error={"a": {"w4a16": (1.0, 5.0)}})
    assert table.total("a", "w4a16") == pytest.approx(10.5)


def test_a_layer_that_changes_the_samples_is_measured_on_whole_trajectories(measured, tmp_path):
    """With a rounded layer, and noise, of its own; a measurement of another run has other noise: a factor of four."""
    step = MeasureSensitivity(buckets=2, rows=4, drift_below_db=60, drift_samples=8)
    (tmp_path / "measured.json").write_text(json.dumps(measured[SENSITIVITY].error))
    table = run_pass(step, measured, tmp_path)[SENSITIVITY]
    assert table.total(ROUNDED, "w4a16") == table.drift[ROUNDED]["w4a16"]
    assert 0.25 < table.drift[ROUNDED]["w4a16"] / error_of_samples(measured, table) < 4
    visible = 4 / 10**6
    for layer, by in table.error.items():
        drawn = {scheme for scheme in by if table.predicted(layer, scheme) > visible}
        assert set(table.drift.get(layer, {})) == drawn


def test_drift_goes_on_where_it_was(measured, tmp_path):
    table = measured[SENSITIVITY]
    drawn = [f"{name}:{scheme}" for name, by in table.drift.items() for scheme in by]
    done = {name: 42.0 + i for i, name in enumerate(drawn)}
    (tmp_path / "measured.json").write_text(json.dumps(table.error))
    (tmp_path / "drift.json").write_text(json.dumps(done))
    resumed = run_pass(MeasureSensitivity(buckets=2, rows=4), measured, tmp_path)[SENSITIVITY]
    assert {f"{name}:{scheme}": d for name, by in resumed.drift.items() for scheme, d in by.items()} == done
    assert len(done) > 2


def test_bucket_weights_predict_the_error_of_the_samples(measured):
    """One layer at 4 bits: predicted and measured squared error of the samples agree within a factor of four."""
    table = measured[SENSITIVITY]
    assert 0.25 < table.predicted(ROUNDED, "w4a16") / error_of_samples(measured, table) < 4


def error_of_samples(measured: Artifacts, table: Sensitivity) -> float:
    """Mean squared error of samples with this one layer at 4 bits."""
    model, trajectory = measured[MODEL].open(), measured[TRAJECTORY]
    sampler = Sampler(model, 4, 2.0)
    start = sampler.start(8, torch.Generator().manual_seed(0))
    reference = sampler.sample(denoise_with(model.module, model), start)
    quantize_model(model.module, {ROUNDED: table.schemes[ROUNDED]["w4a16"]}, StepClock(trajectory.timesteps), {})
    moved = sampler.sample(denoise_with(model.module, model), start)
    return float((moved - reference).square().mean())
