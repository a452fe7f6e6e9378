import torch
from harness import run_pass

from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.keys import MODEL, TRAJECTORY
from intaglio.pipeline.quant.spec import W8A8_STEP, with_shift


def test_every_step_is_recorded_with_guidance_rows(calibrated):
    trajectory = calibrated[TRAJECTORY]
    assert trajectory.outputs.shape == (4, 16, 3, 8, 8)
    labels = trajectory.conditions["class_labels"]
    assert (labels[8:] == 4).all()  # the null class
    assert (labels[:8] < 4).all()
    assert trajectory.inputs["timestep"][:, 0].tolist() == list(trajectory.timesteps)


def test_outputs_are_those_of_the_model(calibrated):
    trajectory = calibrated[TRAJECTORY]
    module = calibrated[MODEL].open().module
    with torch.no_grad():
        again = module(**trajectory.call(2)).sample
    assert torch.equal(again, trajectory.outputs[2])


def test_ranges_are_the_largest_input_of_each_step(calibrated):
    trajectory = calibrated[TRAJECTORY]
    seen = trajectory.amax["pos_embed.proj"]
    expected = trajectory.inputs["hidden_states"].abs().amax((1, 2, 3, 4))
    assert torch.equal(seen, expected)


def test_same_seed_same_trajectory(calibrated, tmp_path):
    again = run_pass(Calibrate(samples=8), calibrated, tmp_path)[TRAJECTORY]
    assert torch.equal(again.outputs, calibrated[TRAJECTORY].outputs)


def test_trajectory_survives_the_store(calibrated, tmp_path):
    trajectory = calibrated[TRAJECTORY]
    trajectory.save(tmp_path)
    loaded = type(trajectory).load(tmp_path)
    assert loaded.timesteps == trajectory.timesteps
    assert torch.equal(loaded.outputs, trajectory.outputs)
    assert loaded.inputs.keys() == trajectory.inputs.keys()
    assert loaded.amax.keys() == trajectory.amax.keys()
    assert all(torch.equal(loaded.low[n], low) for n, low in trajectory.low.items())
    assert all(torch.equal(loaded.high[n], high) for n, high in trajectory.high.items())
    assert loaded.output_amax.keys() == trajectory.output_amax.keys()


def test_output_ranges_of_convolutions_leave_the_bias_out(calibrated):
    trajectory, name = calibrated[TRAJECTORY], "pos_embed.proj"
    assert set(trajectory.output_amax) == {name}
    conv = calibrated[MODEL].open().module.get_submodule(name)
    with torch.no_grad():
        products = conv._conv_forward(trajectory.inputs["hidden_states"].flatten(0, 1), conv.weight, None)
    expected = products.unflatten(0, trajectory.outputs.shape[:2]).abs().amax((1, 2, 3, 4))
    torch.testing.assert_close(trajectory.output_amax[name], expected)


def test_both_ends_of_every_input_are_recorded(calibrated):
    trajectory, name = calibrated[TRAJECTORY], "pos_embed.proj"
    inputs = trajectory.inputs["hidden_states"]
    assert torch.equal(trajectory.low[name], inputs.amin((1, 2, 3, 4)))
    assert torch.equal(trajectory.high[name], inputs.amax((1, 2, 3, 4)))
    assert set(trajectory.low) == set(trajectory.high) == set(trajectory.amax)


def test_ranges_are_around_the_middle_where_a_scheme_shifts(calibrated):
    trajectory = calibrated[TRAJECTORY]
    name, other = "transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"  # behind a GELU: mostly positive
    ranges = trajectory.ranges({name: with_shift(W8A8_STEP), other: W8A8_STEP})
    low, high = trajectory.low[name], trajectory.high[name]
    torch.testing.assert_close(ranges.amax[name], (high - low) / 2)
    torch.testing.assert_close(ranges.shift[name], (high + low) / 2)
    assert torch.equal(ranges.amax[other], trajectory.amax[other])
    assert set(ranges.shift) == {name}
