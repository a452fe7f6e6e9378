"""Inputs that a pipeline joins to its samples, repeats for frames or changes from step to step are recorded as such."""

import copy
from dataclasses import dataclass

import diffusers
import joined_pipelines as joined
import pytest
import torch
from joined_pipelines import ROWS, call_of, seeded

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.call_form import CallForm, Part
from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import check_inputs, denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.form_search import formed
from intaglio.pipeline.model.recording import Recording, record
from intaglio.pipeline.model.sampler import Call, Sampler

TEXTS = {"encoder_hidden_states": (ROWS, 8, 64)}
FLUX = {"encoder_hidden_states": (ROWS, 5, 64), "pooled_projections": (ROWS, 64), "guidance": (ROWS,)}
FOUR_FIRST = CallForm(Part(axis=0, start=0, size=4))
EXPECTED = {
    joined.inpainting: (FOUR_FIRST, {**TEXTS, "sample": (ROWS, 5, 8, 8)}, set()),
    joined.instruct_pix2pix: (FOUR_FIRST, {**TEXTS, "sample": (ROWS, 4, 8, 8)}, set()),
    joined.controlnet: (
        CallForm(),
        {
            **TEXTS,
            "down_block_additional_residuals.[0]": (ROWS, 3, 32, 8, 8),
            "down_block_additional_residuals.[1]": (ROWS, 3, 32, 8, 8),
            "mid_block_additional_residual": (ROWS, 3, 32, 8, 8),
        },
        set(),
    ),
    joined.t2i_adapter: (CallForm(), {**TEXTS, "down_intrablock_additional_residuals.[0]": (ROWS, 32, 8, 8)}, set()),
    joined.animatediff: (
        CallForm(repeats={"encoder_hidden_states": 3}),
        {"encoder_hidden_states": (ROWS, 3, 8, 64)},
        set(),
    ),
    joined.flux_control: (
        CallForm(Part(axis=1, start=0, size=16)),
        {**FLUX, "hidden_states": (ROWS, 64, 16)},
        {"img_ids", "txt_ids"},
    ),
    joined.flux_kontext: (
        CallForm(Part(axis=0, start=0, size=64), cut=(0, 64)),
        {**FLUX, "hidden_states": (ROWS, 64, 16)},
        {"img_ids", "txt_ids"},
    ),
}


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_the_recording_draws_the_pipelines_own_latents(make, tmp_path):
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    made = record(pipe, call_of(given))
    form, conditions, shared = EXPECTED[make]
    assert made.form == form
    assert {name: tuple(rows.shape) for name, rows in made.conditions.items()} == conditions
    assert made.shared.keys() == shared
    made.save(tmp_path / "c.safetensors")
    loaded = Recording.load(tmp_path / "c.safetensors")
    assert (loaded.form, loaded.steps) == (made.form, made.steps)
    model = loaded.given_to(DenoiserModel(denoiser, copy.deepcopy(pipe.scheduler), made.sample_shape))
    latents = torch.randn(ROWS, *model.state_shape, generator=torch.Generator().manual_seed(3))
    record(pipe, {**call_of(given), "latents": latents}).save(tmp_path / "c.safetensors")
    model = Recording.load(tmp_path / "c.safetensors").given_to(model)
    found = pipe(**call_of(given), latents=latents)
    expected = found.frames if hasattr(found, "frames") else found.images
    sampler = Sampler(model, 3, 1.0)
    start = Start(latents, dict(model.conditions), {})
    torch.testing.assert_close(
        sampler.sample(denoise_with(denoiser, model), start), expected.reshape(latents.shape), atol=1e-4, rtol=1e-4
    )


def test_residuals_of_a_controlnet_are_those_of_each_step():
    pipe, given = joined.controlnet()
    pipe.set_progress_bar_config(disable=True)
    made = record(pipe, call_of(given))
    name = "mid_block_additional_residual"
    assert made.steps[name] == (667.0, 334.0, 1.0)
    first, second, third = made.conditions[name].unbind(1)
    assert not torch.equal(first, second)
    sampler = Sampler(made.given_to(DenoiserModel(pipe.unet, pipe.scheduler, (4, 8, 8))), 3, 1.0)
    start = sampler.start(ROWS, torch.Generator().manual_seed(0), rows=(0, 1))
    near_third = sampler.rows(start.noise, torch.tensor(40), start)
    assert torch.equal(near_third[name], third)
    assert "encoder_hidden_states" not in made.steps


def test_a_pipeline_whose_denoiser_has_another_name_is_recorded():
    pipe, given = joined.cascade_prior()
    pipe.set_progress_bar_config(disable=True)
    given = call_of(given) | {"output_type": "pt"}
    made = record(pipe, given)
    assert made.sample_shape == (4, 6, 6)
    assert {"clip_text_pooled", "clip_text", "clip_img"} == made.conditions.keys()
    model = made.given_to(DenoiserModel(pipe.prior, pipe.scheduler, made.sample_shape))
    sampler = Sampler(model, 3, 1.0)
    assert model.names.timestep == "timestep_ratio"
    assert sampler.timesteps == pytest.approx((1.0, 2 / 3, 1 / 3))  # the schedule's end, 0, is no step
    start = sampler.start(2, torch.Generator().manual_seed(0))
    assert sampler.sample(denoise_with(pipe.prior, model), start).isfinite().all()


class Joined(torch.nn.Module):
    """Predicts two channels of six; its output depends on all."""

    def __init__(self, out: int = 2) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(6, out, 1)

    def forward(self, sample, timestep):
        return self.body(sample)


def test_channels_that_no_output_has_are_joined_to_what_the_scheduler_moves():
    given = torch.arange(3 * 4 * 16.0).reshape(3, 4, 4, 4)
    scheduler = diffusers.EulerDiscreteScheduler()
    model = DenoiserModel(seeded(Joined), scheduler, (6, 4, 4), conditions={"sample": given})
    sampler = Sampler(model, 2, 1.0)
    assert sampler.model.form == CallForm(Part(0, 0, 2))
    start = sampler.start(3, torch.Generator().manual_seed(0), rows=(2, 0, 1))
    assert start.noise.shape == (3, 2, 4, 4)
    *calls, samples = sampler.drive(denoise_with(model.module, sampler.model), start)
    assert all(isinstance(call, Call) and torch.equal(call.inputs["sample"][:, 2:], given[[2, 0, 1]]) for call in calls)
    assert calls[1].inputs["sample"][:, :2].std() > 2 * start.noise.std()  # scaled as Euler does; the rest is not
    assert samples.shape == (3, 2, 4, 4)
    felt = sampler.influence(calls[0].inputs["sample"], [call.output for call in calls])
    assert felt == sampler.influence(start.noise, [call.output for call in calls])


def test_without_conditions_noise_is_joined_and_null_rows_have_their_own():
    model = formed(DenoiserModel(seeded(Joined), diffusers.DDIMScheduler(), (6, 4, 4)), 2)
    sampler = Sampler(model, 2, 1.0)
    start = sampler.start(2, torch.Generator().manual_seed(0))
    assert start.conditions["sample"].shape == (2, 4, 4, 4)
    given = {"sample": torch.ones(3, 4, 4, 4)}, {"sample": torch.zeros(1, 4, 4, 4)}
    guided = Sampler(
        DenoiserModel(model.module, model.scheduler, (6, 4, 4), conditions=given[0], null=given[1]), 2, 3.0
    )
    start = guided.start(2, torch.Generator().manual_seed(0))
    rows = guided.rows(start.noise, torch.tensor(1), start)["sample"]
    assert rows[:, 2:].mean((1, 2, 3)).tolist() == [1, 1, 0, 0]
    assert torch.equal(rows[:2, :2], rows[2:, :2])


def test_features_and_frames_are_joined_along_their_own_axis():
    class Tokens(torch.nn.Module):
        def forward(self, hidden_states, timestep):
            return hidden_states[..., :8] * 2

    class Frames(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample[:, :, :4]

    for module, shape, part in ((Tokens(), (16, 24), Part(1, 0, 8)), (Frames(), (2, 8, 4, 4), Part(1, 0, 4))):
        sampler = Sampler(DenoiserModel(module, diffusers.DDIMScheduler(), shape), 2, 1.0)
        assert sampler.model.form.part == part
        samples = sampler.sample(
            denoise_with(module, sampler.model), sampler.start(2, torch.Generator().manual_seed(0))
        )
        assert samples.shape == (2, *part.shape(shape))


def test_a_part_is_taken_out_and_put_back():
    x = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    part = Part(axis=1, start=1, size=2)
    assert part.of(x)[0, 0].tolist() == [1, 2]
    assert part.rest(x)[0, 0].tolist() == [0, 3, 4]
    assert torch.equal(part.joined(part.of(x), part.rest(x)), x)
    assert (part.shape((3, 5)), part.rest_shape((3, 5))) == ((3, 2), (3, 3))


def test_a_variance_behind_features_is_cut_off_and_the_other_size_is_called_whole():
    class Wide(torch.nn.Module):
        def forward(self, hidden_states, timestep):
            return torch.cat([hidden_states, hidden_states], -1)

    model = formed(DenoiserModel(Wide(), diffusers.DDIMScheduler(), (16, 8), other=SecondSize((24, 8))), 2)
    assert model.form == CallForm(cut=(1, 8))
    inputs = {"hidden_states": torch.zeros(1, 24, 8), "timestep": torch.ones(1)}
    assert denoise_with(model.module, model)(inputs).shape == (1, 24, 8)


class WithVariance(torch.nn.Module):
    """Predicts noise, and a variance that is the text's number everywhere."""

    def forward(self, sample, timestep, text):
        return torch.cat([sample * 0.1 + text[:, :, None, None], text[:, :, None, None].expand_as(sample)], 1)


def test_a_variance_goes_to_a_scheduler_that_reads_it_and_only_the_noise_is_guided():
    given = {"conditions": {"text": torch.full((1, 1), 0.9)}, "null": {"text": torch.full((1, 1), -0.9)}}
    fixed = formed(DenoiserModel(WithVariance(), diffusers.DDPMScheduler(), (2, 4, 4), **given), 3)
    assert fixed.form == CallForm(cut=(0, 2))
    learned = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    sampler = Sampler(DenoiserModel(WithVariance(), learned, (2, 4, 4), **given), 3, 3.0)
    assert sampler.model.form == CallForm(variance=True)
    start = sampler.start(1, torch.Generator().manual_seed(0))
    *calls, samples = sampler.drive(denoise_with(sampler.model.module, sampler.model), start)
    (cond, null), guided = calls[0].output, sampler.guided(calls[0].output)[0]
    torch.testing.assert_close(guided[:2], null[:2] + 3 * (cond[:2] - null[:2]))
    assert guided[2:].unique().tolist() == pytest.approx([0.9])

    def quieter(inputs):
        output = denoise_with(fixed.module, sampler.model)(inputs)
        return torch.cat([output[:, :2], output[:, 2:] - 1], 1)

    assert not torch.equal(sampler.sample(quieter, start), samples)
    assert sampler.influence(start.noise, [sampler.guided(call.output) for call in calls])[0] > 0


class Particular(torch.nn.Module):
    """Takes a timestep in the sample's type, a list, and a text for every frame."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.proj = what, torch.nn.Linear(3, 3)

    def forward(self, sample, timestep, text, pictures=None):
        if self.what == "float":
            return sample + self.proj(timestep[:, None].expand(-1, 3))[:, :, None, None]
        if self.what == "list":
            assert isinstance(pictures, list)
            return sample + pictures[0].mean() + text.mean()
        if self.what == "frames":
            flat = sample.transpose(1, 2).flatten(0, 1)
            assert len(text) == len(flat)
            return (flat + text[:, :, None, None]).unflatten(0, (len(sample), -1)).transpose(1, 2)
        assert isinstance(sample, list)
        return [x + text.mean() for x, text in zip(sample, text, strict=True)]


@pytest.mark.parametrize(
    ("what", "shape", "form"),
    [
        ("float", (3, 4, 4), CallForm(float_timestep=True)),
        ("list", (3, 4, 4), CallForm(lists=True)),
        ("frames", (3, 5, 4, 4), CallForm(repeats={"text": 5, "pictures.0": 5})),
        ("rows", (3, 4, 4), CallForm(apart=("sample", "text", "pictures.0"))),
    ],
)
def test_the_form_of_a_call_is_found_by_calls(what, shape, form):
    given = {"text": torch.randn(4, 3), "pictures.0": torch.randn(4, 2)}
    model = DenoiserModel(Particular(what), diffusers.DDIMScheduler(), shape, conditions=given)
    sampler = Sampler(model, 2, 1.0)
    assert sampler.model.form == form
    check_inputs(sampler)
    start = sampler.start(2, torch.Generator().manual_seed(0))
    assert sampler.sample(denoise_with(model.module, sampler.model), start).shape == (2, *shape)


def test_an_output_is_its_first_field_whatever_its_name():
    class Named(torch.nn.Module):
        def forward(self, sample, timestep):
            return diffusers.utils.BaseOutput(predicted=sample + 1, other=sample)

    model = formed(DenoiserModel(Named(), diffusers.DDIMScheduler(), (3, 4, 4)), 2)
    assert model.form.fields == ("predicted", "other")
    output = denoise_with(model.module, model)({"sample": torch.zeros(1, 3, 4, 4), "timestep": torch.ones(1)})
    assert output.unique().tolist() == [1.0]


@dataclass
class Predicted:
    noise: torch.Tensor
    other: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("held", "fields"),
    [
        (lambda y: Predicted(y), ("noise", "other")),
        (lambda y: ((y, y + 1), y), ("sample",)),
        (lambda y: [y], ("sample",)),
        (lambda y: [y, y + 1], ("sample",)),
        (lambda y: [*y], ("sample",)),
    ],
    ids=["a dataclass", "a tuple in a tuple", "a list of one", "a list of as many as rows", "a list of rows"],
)
def test_the_prediction_is_found_in_whatever_holds_it(held, fields):
    class Held(torch.nn.Module):
        def forward(self, sample, timestep):
            return held(2 * sample)

    model = formed(DenoiserModel(Held(), diffusers.DDIMScheduler(), (3, 4, 4)), 2)
    assert model.form.fields == fields
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(denoise_with(model.module, model)({"sample": x, "timestep": torch.ones(2)}), 2 * x)


@pytest.mark.parametrize("held", [lambda y: (None, y), lambda y: "y", lambda y: Predicted(None), lambda y: []])
def test_an_output_that_begins_with_no_tensor_is_one_clear_error(held):
    class Held(torch.nn.Module):
        def forward(self, sample, timestep):
            return held(sample)

    with pytest.raises(RecipeError, match=r"the denoiser's output is a \w+ that does not begin with a tensor: let its"):
        check_inputs(Sampler(DenoiserModel(Held(), diffusers.DDIMScheduler(), (3, 4, 4)), 2, 1.0))


class RowsApart(torch.nn.Module):
    """Takes one tensor for each row, and gives one; its timestep runs from 0 to 1."""

    def forward(self, x, t, texts, sizes=None, blocks=None, return_dict=True):
        assert isinstance(sizes, tuple)
        assert isinstance(blocks, dict)
        return ([a * 0.1 + b.mean() + s + blocks[0] for a, b, s in zip(x, texts, t, strict=True)],)


class OwnPipeline:
    """A pipeline of somebody's own."""

    def __init__(self) -> None:
        self.transformer, self.scheduler = RowsApart(), diffusers.FlowMatchEulerDiscreteScheduler()

    def __call__(self, texts, latents, steps=4):
        self.scheduler.set_timesteps(steps)
        unwatched = copy.deepcopy(self.scheduler)
        for t in self.scheduler.timesteps:
            times = (1 - t / 1000).expand(len(latents))
            given = {"sizes": ((8, 8),), "blocks": {0: torch.tensor(0.5)}, "return_dict": False}
            (found,) = self.transformer(list(latents.unbind()), times, texts, **given)
            unwatched.step(torch.zeros(1), t, torch.zeros(1))
            latents = self.scheduler.step(torch.stack(found), t, latents).prev_sample
        return latents


def test_lists_of_rows_tuples_dicts_and_a_timestep_that_runs_the_other_way(tmp_path):
    pipe, texts = OwnPipeline(), [torch.full((5,), float(row)) for row in range(3)]
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    made = record(pipe, {"texts": texts, "latents": latents})
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert made.form == CallForm(apart=("x", "texts"))
    assert torch.equal(made.conditions["texts"], torch.stack(texts))
    assert made.shared == {"blocks.{0}": torch.tensor(0.5)}
    assert made.constants == {"sizes": ((8, 8),)}
    assert (made.timestep_scale, made.timestep_offset) == pytest.approx((-1e-3, 1.0))
    made.save(tmp_path / "c.safetensors")
    loaded = Recording.load(tmp_path / "c.safetensors")
    assert loaded.constants == made.constants
    model = loaded.given_to(DenoiserModel(pipe.transformer, pipe.scheduler, made.sample_shape))
    sampler = Sampler(model, 4, 1.0)
    assert model.names.timestep == "t"
    found = sampler.sample(denoise_with(pipe.transformer, model), Start(latents, dict(model.conditions), {}))
    torch.testing.assert_close(found, pipe(texts, latents))


def test_texts_of_different_lengths_cannot_be_rows():
    pipe, texts = OwnPipeline(), [torch.zeros(5), torch.zeros(4)]
    with pytest.raises(RecipeError, match=r"texts has rows of the shapes \[\(4,\), \(5,\)\]: record with texts of one"):
        record(pipe, {"texts": texts, "latents": torch.zeros(2, 2, 4, 4)})


def test_a_part_that_is_not_the_first_is_found_by_the_scheduler():
    class Last(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample[:, 3:] * 0.1

    class Behind:
        def __init__(self) -> None:
            self.unet, self.scheduler = Last(), diffusers.EulerDiscreteScheduler()

        def __call__(self, picture):
            self.scheduler.set_timesteps(2)
            x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * self.scheduler.init_noise_sigma
            for t in self.scheduler.timesteps:
                found = self.unet(torch.cat([picture, self.scheduler.scale_model_input(x, t)], 1), t)
                x = self.scheduler.step(found, t, x).prev_sample
            return x

    pipe, picture = Behind(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    made = record(pipe, {"picture": picture})
    assert made.form == CallForm(Part(axis=0, start=3, size=2))
    assert torch.equal(made.conditions["sample"], picture)
    model = made.given_to(DenoiserModel(pipe.unet, pipe.scheduler, made.sample_shape))
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = Sampler(model, 2, 1.0).sample(denoise_with(pipe.unet, model), Start(noise, dict(model.conditions), {}))
    torch.testing.assert_close(found, pipe(picture))
