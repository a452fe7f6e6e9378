import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from tiny import tiny_dit

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import check_inputs, clocked, denoise_with, other_call
from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.inputs import MissingInputs
from intaglio.pipeline.model.sampler import Call, OneCall, Sampler
from intaglio.pipeline.model.step_clock import StepClock


def model(scheduler=None) -> DenoiserModel:
    return DenoiserModel(tiny_dit(), scheduler or DDIMScheduler(timestep_spacing="trailing"), (3, 8, 8), classes=4)


def test_guidance_is_the_null_output_plus_the_weighted_difference():
    sampler = Sampler(model(), 2, 3.0)
    output = torch.tensor([[[[2.0]]], [[[1.0]]]])
    assert sampler.guided(output).item() == 1 + 3 * (2 - 1)


def test_calls_carry_conditional_rows_then_null_rows():
    sampler = Sampler(model(), 2, 3.0)
    start = sampler.start(3, torch.Generator().manual_seed(0))
    calls = [c for c in sampler.drive(denoise_with(sampler.model.module, sampler.model), start) if isinstance(c, Call)]
    assert [c.step for c in calls] == [0, 1]
    assert calls[0].inputs["class_labels"].tolist() == [*start.conditions["class_labels"].tolist(), 4, 4, 4]
    assert torch.equal(calls[0].inputs["hidden_states"][:3], calls[0].inputs["hidden_states"][3:])


def test_guided_sampling_equals_the_plain_loop():
    m = model()
    sampler = Sampler(m, 3, 2.0)
    start = sampler.start(2, torch.Generator().manual_seed(1))
    x = start.noise
    with torch.no_grad():
        for t in m.scheduler.timesteps:
            cond = m.module(x, t.expand(2), class_labels=start.conditions["class_labels"]).sample
            null = m.module(x, t.expand(2), class_labels=torch.full((2,), 4)).sample
            x = m.scheduler.step(null + 2.0 * (cond - null), t, x).prev_sample
    samples = sampler.sample(denoise_with(m.module, m), start)
    assert torch.allclose(samples, x, atol=1e-3)  # float32 rounding, divided by sqrt(alpha) = 0.006 at t = 999


def test_calls_of_a_second_order_solver_find_their_step_by_their_timestep():
    """Heun calls the model twice at some timesteps: both calls have one step, and none is counted."""
    m = model(HeunDiscreteScheduler(timestep_spacing="trailing"))
    sampler, clock, steps = Sampler(m, 3, 2.0), StepClock((999.0, 666.0, 333.0)), []
    plain = denoise_with(m.module, m)

    def noted(inputs):
        steps.append(clock.step)
        return plain(inputs)

    samples = sampler.sample(clocked(noted, clock, "timestep"), sampler.start(1, torch.Generator().manual_seed(0)))
    assert steps == [0, 1, 1, 2, 2]
    assert samples.isfinite().all()


def test_learned_variance_is_cut_off():
    class Wide(torch.nn.Module):
        def forward(self, sample, timestep):
            return (torch.cat([sample, sample + 1], dim=1),)

    wide = DenoiserModel(Wide(), DDIMScheduler(), (3, 8, 8))
    assert denoise_with(wide.module, wide)({"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.ones(1)}).shape[1] == 3


def test_unconditional_model_has_no_guidance():
    class Plain(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample

    sampler = Sampler(DenoiserModel(Plain(), DDIMScheduler(), (3, 8, 8)), 2, 5.0)
    assert sampler.guidance == 1.0
    assert not sampler.start(2, torch.Generator().manual_seed(0)).conditions


class Nested(torch.nn.Module):
    """Takes a dict, a tuple, a table that rows share and a constant."""

    def forward(self, sample, timestep, added, rotary, table, frames, scale=1.0):
        assert isinstance(added, dict)
        assert isinstance(rotary, tuple)
        return sample + added["text"][:, :, None, None] + rotary[0][:, None, None, None] * frames + table * scale


def nested(**changed) -> DenoiserModel:
    given = {
        "conditions": {"added.text": torch.arange(15.0).reshape(5, 3), "rotary.0": torch.arange(5.0)},
        "null": {"added.text": torch.full((1, 3), -1.0)},
        "shared": {"table": torch.full((8,), 10.0)},
        "constants": {"frames": 2, "scale": 0.5},
    }
    return DenoiserModel(Nested(), FlowMatchEulerDiscreteScheduler(), (3, 8, 8), **given | changed)


def test_rows_of_all_conditions_are_drawn_together_and_null_rows_follow():
    sampler = Sampler(nested(), 2, 3.0)
    start = sampler.start(4, torch.Generator().manual_seed(0))
    text, rotary = start.conditions["added.text"], start.conditions["rotary.0"]
    assert text[:, 0].tolist() == (3 * rotary).tolist()
    assert len(set(rotary.tolist())) > 1
    inputs = sampler.rows(start.noise, torch.tensor(500.0), start)
    assert torch.equal(inputs["added.text"], torch.cat([text, torch.full((4, 3), -1.0)]))
    assert torch.equal(inputs["rotary.0"], torch.cat([rotary, rotary]))  # without null rows it keeps its own
    assert inputs["table"].shape == (8,)
    text, rotary = inputs["added.text"], inputs["rotary.0"]
    expected = inputs["sample"] + text[:, :, None, None] + 2 * rotary[:, None, None, None] + 5
    torch.testing.assert_close(denoise_with(sampler.model.module, sampler.model)(inputs), expected)


def test_as_many_null_rows_are_drawn_with_their_conditions():
    model = nested(null={"added.text": -torch.arange(15.0).reshape(5, 3)})
    start = Sampler(model, 2, 3.0).start(4, torch.Generator().manual_seed(0))
    assert torch.equal(start.null["added.text"], -start.conditions["added.text"])


def test_the_timestep_is_scaled_and_known_so():
    sampler = Sampler(nested(timestep_scale=0.001), 2, 1.0)
    assert sampler.timesteps == pytest.approx((1.0, 0.001))
    start = sampler.start(1, torch.Generator().manual_seed(0))
    assert sampler.rows(start.noise, torch.tensor(250.0), start)["timestep"].tolist() == [0.25]


def test_what_is_required_and_not_given_is_named():
    with pytest.raises(
        RecipeError, match=r"Nested requires added, frames, which was not provided: name a file of intagl"
    ):
        Sampler(nested(conditions={"rotary.0": torch.zeros(5)}, null={}, constants={}), 2, 1.0)


def test_what_may_be_left_out_and_is_needed_after_all_is_named():
    class Lazy(torch.nn.Module):
        def forward(self, sample, timestep, text=None, mask=None):
            return sample + text.mean()

    sampler = Sampler(DenoiserModel(Lazy(), DDIMScheduler(), (3, 8, 8)), 2, 1.0)
    with pytest.raises(RecipeError, match=r"Lazy requires text, which was not provided.*NoneType"):
        check_inputs(sampler)


def test_names_of_sample_and_timestep_can_be_given_and_the_only_other_argument_is_the_timestep():
    class Swapped(torch.nn.Module):
        def forward(self, sigma, noisy):
            return noisy * sigma.reshape(-1, 1, 1, 1)

    class Plain(torch.nn.Module):
        def forward(self, noisy, sigma):
            return noisy

    given = DenoiserModel(Swapped(), DDIMScheduler(), (3, 8, 8), sample_name="noisy", timestep_name="sigma")
    assert (given.names.sample, given.names.timestep) == ("noisy", "sigma")
    for module in (Plain(), Swapped()):
        found = DenoiserModel(module, DDIMScheduler(), (3, 8, 8)).names
        assert (found.sample, found.timestep) == ("noisy", "sigma")


def test_a_model_without_a_timestep_is_called_once():
    class Decoder(torch.nn.Module):
        def forward(self, latents):
            return latents.repeat(1, 2, 1, 1)

    model = DenoiserModel(Decoder(), OneCall(), (2, 4, 4))
    sampler = Sampler(model, 20, 1.0)
    start = sampler.start(3, torch.Generator().manual_seed(0))
    call, samples = sampler.drive(denoise_with(model.module, model), start)
    assert list(call.inputs) == ["latents"]
    assert torch.equal(samples, start.noise.repeat(1, 2, 1, 1))  # its channels are its own: none is cut off


def test_the_other_call_has_the_same_rows_and_timestep():
    other = SecondSize((3, 8, 12), {"added.text": torch.zeros(2, 3)}, {"table": torch.zeros(12)})
    model = nested(other=other)
    sampler = Sampler(model, 2, 3.0)
    call = sampler.rows(torch.zeros(3, 3, 8, 8), torch.tensor(7.0), sampler.start(3, torch.Generator().manual_seed(0)))
    changed = other_call(model, call)
    assert {n: tuple(v.shape) for n, v in changed.items()} == {
        "sample": (6, 3, 8, 12),
        "timestep": (6,),
        "added.text": (6, 3),
        "rotary.0": (6,),
        "table": (12,),
    }
    assert denoise_with(model.module, model)(changed).shape == (6, 3, 8, 12)


def test_rows_that_cannot_be_drawn_together_are_refused_at_once():
    given = {"added.text": torch.zeros(5, 3), "rotary.0": torch.zeros(4)}
    with pytest.raises(RecipeError) as caught:
        nested(conditions=given, null={"added.text": torch.zeros(2, 3), "mask": torch.zeros(1)})
    assert caught.value.problems == (
        "model: conditions have different numbers of rows: {'added.text': 5, 'rotary.0': 4}",
        "model: 2 null rows for added.text: give 1, or 5 like the condition",
        "model: null rows for mask, which is no condition",
    )


def test_samples_feel_of_an_output_what_the_scheduler_makes_of_it():
    scheduler = DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=False)
    sampler = Sampler(model(scheduler), 4, 1.0)
    generator = torch.Generator().manual_seed(0)
    x, *outputs = torch.randn(5, 2, 3, 8, 8, generator=generator)
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    sigma = torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1)])
    # x / sqrt(kept) moves by the output times the change of sigma: Song et al. 2021, Eq. 14
    # the last change is 1e-4 of samples that float32 holds to 1e-7
    assert sampler.influence(x, outputs) == pytest.approx(sigma.diff().abs().tolist(), rel=1e-2)


class Blend(torch.nn.Module):
    """Its arithmetic rounds each number alike, whatever is beside it."""

    def forward(self, sample, timestep):
        return 0.5 * sample + timestep.reshape(-1, 1, 1, 1) / 2000


def blending(scheduler) -> tuple[Sampler, object]:
    model = DenoiserModel(Blend(), scheduler, (4, 8, 8))
    return Sampler(model, 4, 1.0), denoise_with(model.module, model)


CANNOT_RUN = {
    "AmusedScheduler": "fills in tokens",
    "BlockRefinementScheduler": "fills in tokens",
    "CogVideoXDPMScheduler": "also takes the prediction of the step before",
    "CosineDPMSolverMultistepScheduler": "needs torchsde",
    "DPMSolverSDEScheduler": "needs torchsde",
    "DiscreteDDIMScheduler": "fills in tokens",
    "EntropyBoundScheduler": "fills in tokens",
    "HeliosDMDScheduler": "has stages, each with timesteps of its own",
    "HeliosScheduler": "has stages, each with timesteps of its own",
    "KarrasVeScheduler": "takes two noise levels in place of a timestep",
    "PiflowScheduler": "takes the coefficients of a policy",
    "RFD4ProteinaScheduler": "draws proteins",
    "RePaintScheduler": "takes a picture and a mask",
    "SCMScheduler": "has a timestep more than it has steps",
    "ScoreSdeVeScheduler": "has no step",
    "VQDiffusionScheduler": "fills in tokens",
}
"""Schedulers of diffusers that cannot follow the predicted noise of a plain denoiser, and why."""


@pytest.mark.parametrize("name", sorted(n for n in dir(diffusers) if n.endswith("Scheduler")))
def test_full_precision_equals_itself_along_every_scheduler_and_a_sample_alone_equals_it_in_a_batch(name):
    try:
        sampler, denoise = blending(getattr(diffusers, name)())
        start = sampler.start(3, torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        first = sampler.sample(denoise, start)
    except Exception as error:
        if name not in CANNOT_RUN:
            raise
        pytest.skip(f"{CANNOT_RUN[name]} ({type(error).__name__}: {str(error).strip().splitlines()[0][:80]})")
    torch.manual_seed(2)
    untouched = torch.get_rng_state()
    assert torch.equal(first, sampler.sample(denoise, start))
    assert torch.equal(torch.get_rng_state(), untouched)
    assert first.isfinite().all()
    alone = torch.cat([sampler.sample(denoise, start.part(slice(i, i + 1))) for i in range(3)])
    torch.testing.assert_close(alone, first, rtol=1e-6, atol=1e-6)


class Drawing:
    """A scheduler of somebody's own: `how` it draws, and a tuple in place of an output."""

    def __init__(self, how) -> None:
        self.how, self.timesteps = how, torch.zeros(0)

    def set_timesteps(self, num_inference_steps):
        self.timesteps = torch.arange(num_inference_steps, 0, -1) * 100

    def step(self, model_output, timestep, sample):
        return (0.5 * sample + self.how(sample),)


DRAWS = {
    "like": torch.randn_like,
    "uniform": lambda x: torch.rand(x.shape),
    "one_for_all": lambda x: torch.randn(x.shape[1:]).expand_as(x),
    "in_place": lambda x: x.clone().normal_(),
}


@pytest.mark.parametrize("how", DRAWS)
def test_whatever_a_scheduler_draws_is_of_the_sample_and_the_step(how):
    sampler, denoise = blending(Drawing(DRAWS[how]))
    start = sampler.start(3, torch.Generator().manual_seed(0))
    first = sampler.sample(denoise, start)
    assert torch.equal(first, sampler.sample(denoise, start))
    parts = [sampler.sample(denoise, start.part(part)) for part in (slice(2), slice(2, 3))]
    assert torch.equal(first, torch.cat(parts))


def test_noise_differs_from_step_to_step_and_from_sample_to_sample():
    drawn = []
    sampler, denoise = blending(Drawing(lambda x: drawn.append(torch.randn_like(x)) or drawn[-1]))
    start = sampler.start(2, torch.Generator().manual_seed(0))
    sampler.sample(denoise, start)
    drawn.clear()
    sampler.sample(denoise, start)
    assert len({float(noise.sum()) for noise in drawn}) == len(drawn) == 2 * 4


def test_the_models_scheduler_is_not_stepped_and_two_trajectories_can_be_driven_by_turns():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    sampler, denoise = blending(scheduler)
    starts = [sampler.start(2, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    expected = [sampler.sample(denoise, start) for start in starts]
    *_, last = zip(*(sampler.drive(denoise, start) for start in starts), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True))
    assert (scheduler.step_index, scheduler.model_outputs) == (None, [None, None])


def test_influence_of_a_step_does_not_contain_the_schedulers_noise():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    sampler, _ = blending(scheduler)
    x, *outputs = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    felt = sampler.influence(x, outputs)
    assert sampler.influence(x, outputs) == felt
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas
    to_sigma = (sigma[1:] ** 2 * (sigma[:-1] ** 2 - sigma[1:] ** 2) / sigma[:-1] ** 2).sqrt()
    down = (sigma[1:] ** 2 - to_sigma**2).sqrt()
    assert felt == pytest.approx((down - sigma[:-1]).abs().tolist(), rel=1e-2)  # Euler's step down, Karras et al. 2022


def test_inputs_that_a_call_works_without_are_not_called_missing():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, sample, timestep, text=None, mask=None, control=None):
            return sample if text is None else sample + self.proj(text).mean() + mask.mean()

    text = {"text": torch.zeros(2, 5, 3)}
    unfit = Sampler(DenoiserModel(Wide(), DDIMScheduler(), (3, 8, 8), conditions=text), 2, 1.0)
    with pytest.raises(RecipeError, match=r"Wide cannot be called with sample \(1, 3, 8, 8\), .*text \(1, 5, 3\): it"):
        check_inputs(unfit)
    lacking = Sampler(
        DenoiserModel(Wide(), DDIMScheduler(), (3, 8, 8), conditions={"text": torch.zeros(2, 5, 4)}), 2, 1.0
    )
    with pytest.raises(MissingInputs, match="Wide requires mask, which was not provided"):
        check_inputs(lacking)
