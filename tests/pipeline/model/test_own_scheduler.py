"""Schedulers that users write themselves."""

import random
import threading
from types import SimpleNamespace

import numpy as np
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


def samples(scheduler, times: int = 1) -> torch.Tensor:
    model = DenoiserModel(Net(), scheduler, (3,))
    sampler = Sampler(model, 2, 1.0)
    start = sampler.start(2, torch.Generator().manual_seed(0))
    for _ in range(times):
        found = sampler.sample(denoise_with(model.module, model), start) / start.noise
    return found


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: (x, "state"), lambda x: [x], lambda x: SimpleNamespace(prev_sample=x)],
    ids=["x", "tuple", "list", "object"],
)
def test_a_step_may_return_the_sample_a_tuple_a_list_or_an_object(form):
    assert torch.allclose(samples(Halving(form)), torch.tensor(0.25))


def test_a_step_that_returns_something_else_is_named():
    with pytest.raises(RecipeError, match=r"Halving\.step returns a dict: it returns the next sample, a tuple"):
        samples(Halving(lambda x: {"x": x}))


def test_a_scheduler_that_lacks_a_method_is_named():
    lacking = SimpleNamespace(set_timesteps=lambda count: None, timesteps=torch.tensor([1.0]))
    with pytest.raises(RecipeError, match=r"the scheduler SimpleNamespace has no step: a scheduler has set_timesteps"):
        samples(lacking)


class Changed(Halving):
    """Differs from Halving in what a test gives: its timesteps, or the step itself."""

    def __init__(self, times=None, step=None, **more) -> None:
        super().__init__(lambda x: x)
        self.times = times
        vars(self).update({"step": step} if step else {}, **more)

    def set_timesteps(self, count, **_):
        self.timesteps = torch.tensor([2.0, 1.0])[:count] if self.times is None else self.times


@pytest.mark.parametrize("times", [[2.0, 1.0], np.array([2.0, 1.0]), torch.tensor([[2.0], [1.0]])])
def test_timesteps_may_be_a_list_or_an_array(times):
    assert torch.allclose(samples(Changed(times)), torch.tensor(0.25))


@pytest.mark.parametrize(
    "step",
    [
        lambda output, timestep, sample: (sample - output).double(),
        lambda sample, timestep, model_output: sample - model_output,
        lambda *, model_output, timestep, sample: sample - model_output,
    ],
    ids=["another precision", "another order", "keywords alone"],
)
def test_a_step_may_have_another_form(step):
    assert torch.allclose(samples(Changed(step=step)), torch.tensor(0.25))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_a_scheduler_that_draws_from_a_global_generator_draws_the_same_again(draw):
    scheduler = Changed(step=lambda output, timestep, sample: sample - output + draw())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    state, first = random.getstate(), samples(scheduler)
    assert random.getstate() == state
    assert torch.equal(first, samples(scheduler, times=2))


def refuses(count, **_):
    raise ValueError("too few\nsteps")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Changed(set_timesteps=refuses), "Changed makes no schedule of sampling_steps: 2: ValueError: too few steps"),
        (Changed([]), "Changed makes 0 timesteps of sampling_steps: 2"),
        (Changed([2.0, float("nan")]), "makes 2 timesteps of sampling_steps: 2, 1 of them NaN or Inf"),
        (
            Changed(lock=threading.Lock()),
            "Changed cannot be copied, and each run steps a copy: TypeError: cannot pickle",
        ),
        (Changed(step=lambda output, t, x: x[:, :2]), r"Changed.step returns \(1, 2\) for samples \(1, 3\)"),
        (Changed(step=lambda output, t, x: 1 / 0), r"Changed.step fails at timestep 2, with outputs .*: ZeroDivision"),
    ],
    ids=["refused", "none", "nan", "no copy", "shape", "raises"],
)
def test_a_scheduler_that_cannot_be_stepped_is_one_error_that_names_it(scheduler, message):
    with pytest.raises(RecipeError, match=message):
        samples(scheduler)
