import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from harness import run_pass
from quantizing import with_plan
from safetensors import safe_open
from tiny import save_folder, tiny_dit

from intaglio.passes.calibrate import Calibrate, _joined
from intaglio.passes.distill.distill import Distill
from intaglio.passes.layer_inputs import SameInputs
from intaglio.passes.layer_ranges import expected_ends, output_amax
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, TRAJECTORY, WORKLOAD
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError, StepFailed
from intaglio.pipeline.formats.schemes import W8A8_STEP, with_shift
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import OneCall, Sampler
from intaglio.pipeline.numerics.quality import SampleRange


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
    by_step = products.unflatten(0, trajectory.outputs.shape[:2]).abs()
    torch.testing.assert_close(trajectory.output_amax[name], torch.stack([output_amax(y, conv) for y in by_step]))


def test_the_range_of_an_output_holds_its_largest_value_in_every_channel():
    y = torch.randn(32, 3, 1000, generator=torch.Generator().manual_seed(0))
    y[0, 2, 0] = -100.0
    amax_N = output_amax(y.abs(), torch.nn.Conv1d(3, 3, 1))
    assert torch.equal(amax_N, y.abs().amax((0, 2)))
    assert torch.equal(output_amax(y[0].abs(), torch.nn.Conv1d(3, 3, 1)), y[0].abs().amax(1))  # a row without an axis


def test_both_ends_of_every_input_are_recorded(calibrated):
    trajectory, name = calibrated[TRAJECTORY], "pos_embed.proj"
    inputs = trajectory.inputs["hidden_states"]
    assert torch.equal(trajectory.low[name], inputs.amin((1, 2, 3, 4)))
    assert torch.equal(trajectory.high[name], inputs.amax((1, 2, 3, 4)))
    assert set(trajectory.low) == set(trajectory.high) == set(trajectory.amax)


def test_ranges_are_around_the_middle_where_a_scheme_shifts(calibrated):
    trajectory = calibrated[TRAJECTORY]
    name, other = "transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"  # behind a GELU: mostly positive
    tables = trajectory.tables({name: with_shift(W8A8_STEP), other: W8A8_STEP})
    low, high = trajectory.low[name], trajectory.high[name]
    torch.testing.assert_close(tables[name].amax_T, (high - low) / 2)
    torch.testing.assert_close(tables[name].shift_T, (high + low) / 2)
    assert torch.equal(tables[other].amax_T, trajectory.amax[other])
    assert tables[other].shift_T is None


def test_rows_are_those_of_one_sample_with_guidance(calibrated):
    rows = calibrated[WORKLOAD].rows
    assert set(rows) == set(calibrated[TRAJECTORY].amax)
    assert rows["pos_embed.proj"] == 2 * 16  # pixels that the convolution gives: 8 x 8 in patches of 2 x 2
    assert rows["transformer_blocks.1.attn1.to_q"] == 2 * 16
    assert rows["transformer_blocks.1.norm1.linear"] == 2
    assert rows["proj_out_1"] == 2


def test_layers_that_read_one_tensor_are_found(calibrated):
    attention = ("to_q", "to_k", "to_v")
    assert calibrated[WORKLOAD].same_input == tuple(
        tuple(f"transformer_blocks.{block}.attn1.{name}" for name in attention) for block in (0, 1)
    )


def test_equal_tensors_and_new_ones_in_an_old_place_are_not_the_same_input():
    found = SameInputs()
    x = torch.ones(3)
    for name in ("a", "b", "a"):
        found.note(name, x)
    found.note("c", x.clone())
    for name in ("d", "e"):
        y = torch.ones(3)
        found.note(name, y)
        del y  # the next one may get its id
    assert found.groups == (("a", "b"),)


def test_the_workload_survives_the_store(calibrated, tmp_path):
    calibrated[WORKLOAD].save(tmp_path)
    assert type(calibrated[WORKLOAD]).load(tmp_path) == calibrated[WORKLOAD]


@pytest.fixture(scope="module")
def halved(calibrated, tmp_path_factory):
    step = Calibrate(samples=8, precision="float16")
    return calibrated | run_pass(step, calibrated, tmp_path_factory.mktemp("scratch"))


def test_float16_rounds_samples_and_outputs_and_nothing_else(calibrated, halved):
    whole, half = calibrated[TRAJECTORY], halved[TRAJECTORY]
    for given, kept in ((whole.outputs, half.outputs), *((v, half.inputs[n]) for n, v in whole.inputs.items())):
        assert kept.dtype == given.dtype
        # half a unit in the last place of 11 bits, or of the smallest numbers
        assert ((kept - given).abs() <= (given.abs() * 2**-11).clamp(min=2**-25)).all()
    assert not torch.equal(half.outputs, whole.outputs)
    assert torch.equal(half.inputs["timestep"], whole.inputs["timestep"])
    assert all(torch.equal(half.amax[name], amax) for name, amax in whole.amax.items())
    assert all(torch.equal(half.conditions[name], rows) for name, rows in whole.conditions.items())


def test_float16_halves_the_file_and_reads_back_as_float32(calibrated, halved, tmp_path):
    sizes = {}
    for name, artifacts in (("whole", calibrated), ("half", halved)):
        (tmp_path / name).mkdir()
        artifacts[TRAJECTORY].save(tmp_path / name)
        with safe_open(tmp_path / name / "trajectory.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
        sizes[name] = {key: tensor.nbytes for key, tensor in tensors.items()}
    recorded = {"outputs", "input.hidden_states"}
    assert {key for key, size in sizes["whole"].items() if sizes["half"][key] != size} == recorded
    assert all(2 * sizes["half"][key] == sizes["whole"][key] for key in recorded)
    loaded = type(halved[TRAJECTORY]).load(tmp_path / "half")
    assert loaded.half
    assert torch.equal(loaded.outputs, halved[TRAJECTORY].outputs)
    assert all(torch.equal(loaded.inputs[name], value) for name, value in halved[TRAJECTORY].inputs.items())
    assert {loaded.outputs.dtype, *(table.dtype for table in loaded.amax.values())} == {torch.float32}


def test_timesteps_that_float16_cannot_hold_stay(calibrated, tmp_path):
    trajectory = calibrated[TRAJECTORY]
    inputs = trajectory.inputs | {"timestep": trajectory.inputs["timestep"] * 0.3}
    replace(trajectory, inputs=inputs, half=True).save(tmp_path)
    assert torch.equal(type(trajectory).load(tmp_path).inputs["timestep"], inputs["timestep"])


def test_without_float16_the_files_say_nothing_of_it(calibrated, tmp_path):
    calibrated[TRAJECTORY].save(tmp_path)
    assert set(json.loads((tmp_path / "trajectory.json").read_text())) == {"timesteps", "samples"}


def test_what_is_beyond_float16_is_one_clear_error(tmp_path):
    module = tiny_dit()
    with torch.no_grad():
        module.proj_out_2.weight.zero_()
        module.proj_out_2.bias.fill_(70000.0)
    save_folder(module, tmp_path / "loud")
    start = {MODEL: Checkpoint.resolve(ModelRef(path="loud", sampling_steps=2), tmp_path)}
    message = r"the output reaches 70000 at timestep 999, and float16 ends at 65504: leave calibrate\.precision"
    with pytest.raises(StepFailed, match=message):
        run_pass(Calibrate(samples=2, precision="float16"), start, tmp_path / "scratch")


def test_distill_learns_from_float16_what_it_learns_from_float32(calibrated, halved, tmp_path):
    losses = {}
    for name, artifacts in (("whole", calibrated), ("half", halved)):
        (tmp_path / name).mkdir()
        artifacts[TRAJECTORY].save(tmp_path / name)
        loaded = type(artifacts[TRAJECTORY]).load(tmp_path / name)
        start = with_plan(calibrated | {TRAJECTORY: loaded}, lambda _: W8A8_STEP)
        step = Distill(updates=16, samples=2, rank=2)
        losses[name] = run_pass(step, start, tmp_path / f"{name}-scratch")[ADAPTER].loss
    assert losses["half"] != losses["whole"]
    # some inputs round to the other neighbour in 8 bits: other errors, but not larger ones
    assert sum(losses["half"]) == pytest.approx(sum(losses["whole"]), rel=0.2)


def test_the_range_of_the_samples_is_recorded_as_they_are(calibrated, tmp_path):
    trajectory, model = calibrated[TRAJECTORY], calibrated[MODEL].open()
    sampler = Sampler(model, 4, 2.0)
    drawn = sampler.sample(
        denoise_with(model.module, model), sampler.start(8, Context(tmp_path).torch_rng("calibrate"))
    )
    assert (trajectory.samples.low, trajectory.samples.high) == (drawn.min(), drawn.max())
    assert trajectory.samples.energy == pytest.approx(float(drawn.square().mean()), rel=1e-5)
    trajectory.save(tmp_path)
    assert type(trajectory).load(tmp_path).samples == trajectory.samples


class Heights(torch.nn.Module):
    """Multiplies its input by 1000: nothing of what it returns is between -1 and 1, or nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1, bias=False)
        self.layer.weight.data = 1000 * torch.eye(3).reshape(3, 3, 1, 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(sample)
        return y


def test_the_sample_of_a_model_that_is_called_once_is_its_output(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "open", lambda _: DenoiserModel(Heights().eval(), OneCall(), (3, 8, 8)))
    trajectory = run_pass(Calibrate(samples=2), calibrated, tmp_path)[TRAJECTORY]
    assert (trajectory.samples.low, trajectory.samples.high) == (trajectory.outputs.min(), trajectory.outputs.max())
    assert trajectory.samples.peak > 2000


def test_a_trajectory_without_the_range_of_its_samples_is_refused(calibrated, tmp_path):
    calibrated[TRAJECTORY].save(tmp_path)
    file = tmp_path / "trajectory.json"
    file.write_text(json.dumps({"timesteps": json.loads(file.read_text())["timesteps"]}))
    with pytest.raises(RecipeError, match=r"trajectory\.json: is damaged: samples: is missing"):
        type(calibrated[TRAJECTORY]).load(tmp_path)


def test_the_range_of_all_processes_is_that_of_all_samples(calibrated):
    trajectory = calibrated[TRAJECTORY]
    fewer = replace(trajectory, outputs=trajectory.outputs[:, :4], samples=SampleRange(-3.0, 0.5, 4.0))
    joined = _joined([replace(trajectory, samples=SampleRange(-1.0, 2.0, 1.0)), fewer], 2)
    assert joined.samples == SampleRange(-3.0, 2.0, 1.6)  # (16 rows of 1 + 4 rows of 4) / 20


class Diverges(OneCall):
    """A scheduler that makes Inf of finite outputs."""

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> OneCall.Output:
        return self.Output(model_output * torch.inf)


def test_samples_that_are_not_finite_are_an_error_that_names_the_scheduler(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "open", lambda _: DenoiserModel(Heights().eval(), Diverges(), (3, 8, 8)))
    message = (
        "NaN or Inf after 1 of 1 steps, while every output of the model is finite: Diverges makes them: choose the"
    )
    with pytest.raises(StepFailed, match=message):
        run_pass(Calibrate(samples=2), calibrated, tmp_path)


class Overflows(torch.nn.Module):
    """NaN behind its first layer at the timesteps below 500."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 3, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hot = torch.where(timestep.reshape(-1, 1, 1, 1) < 500, torch.inf, 1.0)
        y: torch.Tensor = self.outlet(self.inlet(sample) * hot)
        return y


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (None, StepFailed, "NaN or Inf at timestep 499: outlet is the first layer to read them: correct the model"),
        ("outlet.weight", RecipeError, r"outlet\.weight: 1 of its 12 values are NaN or Inf"),
    ],
)
def test_numbers_that_are_none_are_named(broken, error, message, calibrated, tmp_path, monkeypatch):
    model = Overflows()
    if broken is not None:
        model.get_parameter(broken).data.view(-1)[3] = torch.nan
    factory = DenoiserModel(model.eval(), DDIMScheduler(timestep_spacing="trailing"), (3, 8, 8))
    monkeypatch.setattr(Checkpoint, "open", lambda _: factory)
    with pytest.raises(error, match=message):
        run_pass(Calibrate(samples=1), calibrated, tmp_path / "scratch")


class Halves(DDIMScheduler):
    """Ends at samples that are not finite, after its first step."""

    def step(self, model_output, timestep, sample):
        return (sample / (timestep > 500),)


class Unlike(torch.nn.Module):
    """Adds something to its output: random numbers, the number of its calls, or the mean over all rows."""

    def __init__(self, more) -> None:
        super().__init__()
        self.layer, self.more, self.calls = torch.nn.Conv2d(3, 3, 1), more, 0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y: torch.Tensor = self.layer(sample) + self.more(self, sample)
        return y


@pytest.mark.parametrize(
    ("more", "scheduler", "message"),
    [
        (lambda _, x: 0.1 * torch.randn_like(x), DDIMScheduler(), "two calls with the same inputs differ by .* random"),
        (lambda module, x: module.calls, DDIMScheduler(), "two calls .* or keeps a state between calls"),
        (lambda _, x: 100 * x.mean(), DDIMScheduler(), "a call of 1 rows differs by .* its rows affect each other"),
        (lambda _, x: 0.0, Halves(timestep_spacing="trailing"), "after 3 of 4 steps, while .* Halves makes them"),
    ],
)
def test_a_model_that_no_graph_can_follow_is_named(more, scheduler, message, calibrated, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(Checkpoint, "open", lambda _: DenoiserModel(Unlike(more).eval(), scheduler, (3, 8, 8)))
    with pytest.raises((RecipeError, StepFailed), match=message):
        run_pass(Calibrate(samples=2), calibrated, tmp_path / "scratch")


def test_a_layer_that_is_called_again_joins_the_groups_of_all_its_inputs():
    found = SameInputs()
    x, y, z = torch.ones(3), torch.ones(3), torch.ones(3)
    for name, read in (("a", x), ("b", x), ("c", y), ("d", z), ("a", y)):
        found.note(name, read)
    assert found.readers == [("a", "b", "c"), ("d",)]


def test_a_range_of_few_rows_is_widened_to_what_sixteen_would_show_and_one_of_sixteen_is_not():
    rows = torch.tensor([[-1.0, 2.0], [-3.0, 2.0]])  # highs 2 and 2; lows -1 and -3, standard deviation sqrt(2)
    low, high = expected_ends(rows)
    assert high == 2.0
    assert low == pytest.approx(-3 - 6**0.5 / math.pi * math.log(16 / 2) * 2**0.5)
    assert expected_ends(rows.repeat(8, 1)) == (-3.0, 2.0)
    assert expected_ends(rows[:1]) == (-1.0, 2.0)
