"""Schedulers that users write themselves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.sampler import Sampler


class Net(nn.Module):
    def forward(self, sample, timestep):
        return 0.5 * sample


class Halving:
    """Takes the output off the sample, twice; `form` makes what `step` returns."""

    def __init__(self, form) -> None:
        self.form, self.timesteps = form, torch.tensor([])

    def set_timesteps(self, count, **_):
        self.timesteps = torch.tensor([2.0, 1.0])[:count]

    def step(self, output, timestep, sample):
        return self.form(sample - output)


def samples(scheduler) -> torch.Tensor:
    model = DenoiserModel(Net(), scheduler, (3,))
    sampler = Sampler(model, 2, 1.0)
    start = sampler.start(2, torch.Generator().manual_seed(0))
    return sampler.sample(denoise_with(model.module, model), start) / start.noise


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: (x, "state"), lambda x: SimpleNamespace(prev_sample=x)],
    ids=["x", "tuple", "object"],
)
def test_a_step_may_return_the_sample_a_tuple_or_an_object(form):
    assert torch.allclose(samples(Halving(form)), torch.tensor(0.25))


def test_a_step_that_returns_something_else_is_named():
    with pytest.raises(RecipeError, match=r"Halving\.step returns a dict: it returns the next sample, a tuple"):
        samples(Halving(lambda x: {"x": x}))


def test_a_scheduler_that_lacks_a_method_is_named():
    lacking = SimpleNamespace(set_timesteps=lambda count: None, timesteps=torch.tensor([1.0]))
    with pytest.raises(RecipeError, match=r"the scheduler SimpleNamespace has no step: a scheduler has set_timesteps"):
        samples(lacking)
