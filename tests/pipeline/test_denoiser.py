import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from tiny import tiny_dit

from intaglio.pipeline.checkpoint import Factory
from intaglio.pipeline.denoiser import Call, Sampler, denoise_with


def model(scheduler=None) -> Factory:
    return Factory(tiny_dit(), scheduler or DDIMScheduler(timestep_spacing="trailing"), (3, 8, 8), classes=4)


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


def test_second_order_solver_is_indexed_by_timestep():
    m = model(HeunDiscreteScheduler())
    sampler = Sampler(m, 3, 2.0)
    samples = sampler.sample(denoise_with(m.module, m), sampler.start(1, torch.Generator().manual_seed(0)))
    assert samples.isfinite().all()


def test_learned_variance_is_cut_off():
    class Wide(torch.nn.Module):
        def forward(self, sample, timestep):
            return (torch.cat([sample, sample + 1], dim=1),)

    wide = Factory(Wide(), DDIMScheduler(), (3, 8, 8))
    assert denoise_with(wide.module, wide)({"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.ones(1)}).shape[1] == 3


def test_unconditional_model_has_no_guidance():
    class Plain(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample

    sampler = Sampler(Factory(Plain(), DDIMScheduler(), (3, 8, 8)), 2, 5.0)
    assert sampler.guidance == 1.0
    assert not sampler.start(2, torch.Generator().manual_seed(0)).conditions
