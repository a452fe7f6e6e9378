"""A prediction is exact for a linear denoiser with one number as output: no probe is left out."""

import diffusers
import pytest
import torch
from torch import nn

from intaglio.passes.sensitivity.forms import Form
from intaglio.passes.sensitivity.rounded import RoundedLayers
from intaglio.passes.sensitivity.screen import Screen
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.schemes import W8A8_TOKEN, W8A16, w4a16
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.numerics.quality import SampleRange

NONE = Trajectory((1.0,), {}, torch.zeros(1), {}, {}, {}, {}, samples=SampleRange(-1.0, 1.0, 0.25))


class Linear(nn.Module):
    """A layer in front of the one number, called twice, and a condition that no sample moves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.condition, self.outlet = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x, c):
        return self.outlet(self.inner(x) + self.inner(2 * x - 1) + self.condition(c))


def made():
    torch.manual_seed(0)
    module = Linear().requires_grad_(False).eval()
    inputs = {"x": torch.randn(1, 64), "c": torch.randn(1, 64)}
    return module, inputs, RoundedLayers(module, NONE)


@pytest.mark.parametrize("name", ["inner", "condition", "outlet"])
def test_a_linear_model_is_predicted_exactly(name):
    module, inputs, rounded = made()
    forms = {"w8": Form(W8A16), "w4": Form(w4a16(32)), "w8a8": Form(W8A8_TOKEN)}
    screen = Screen(rounded, lambda i: module(**i), {name: forms})
    predicted, output = screen.errors(inputs, [torch.Generator().manual_seed(1)])
    assert torch.equal(output, module(**inputs))
    for label, form in forms.items():
        with rounded.alone(name, form), torch.no_grad():
            measured = float((module(**inputs) - output).square().sum())
        # differences of near numbers; the product of both roundings, some hundredth of each, is left out
        assert predicted[name][label] == pytest.approx(measured, rel=3e-2 if label == "w8a8" else 1e-2)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_along_any_number_of_axes_is_predicted_exactly(kind):
    torch.manual_seed(0)
    inner = kind(32, 16, 3, 2, 1)
    sizes = [5] * len(inner.stride)
    module = nn.Sequential(inner, nn.Flatten(), nn.Linear(16 * 3 ** len(sizes), 1)).requires_grad_(False).eval()
    inputs, form = {"input": torch.randn(1, 32, *sizes)}, Form(W8A16)
    rounded = RoundedLayers(module, NONE)
    screen = Screen(rounded, lambda i: module(**i), {"0": {"w8": form}})
    predicted, output = screen.errors(inputs, [torch.Generator().manual_seed(1)])
    with rounded.alone("0", form), torch.no_grad():
        assert predicted["0"]["w8"] == pytest.approx(float((module(**inputs) - output).square().sum()), rel=1e-2)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.EulerDiscreteScheduler(),  # scales what the denoiser is called with
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),  # goes on from former outputs
        diffusers.UniPCMultistepScheduler(),
        diffusers.HeunDiscreteScheduler(),  # two calls a step
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_errors_of_samples_are_predicted_along_the_trajectory(scheduler):
    """One number through four steps: exact but for what rounding does to its own effect: below a tenth."""

    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.condition, self.outlet = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, sample, timestep, c):
            seen = sample.flatten(1) * torch.linspace(-1, 1, 64) + timestep[:, None] / 1000
            return self.outlet(self.inner(seen) + self.condition(c)).reshape(sample.shape)

    torch.manual_seed(0)
    module = Pointwise().requires_grad_(False).eval()
    c = {"c": torch.randn(2, 64)}
    model = DenoiserModel(module, scheduler, (1, 1, 1), conditions=c)
    sampler = Sampler(model, 4, 1.0)
    rounded = RoundedLayers(module, NONE)
    start, denoise = sampler.start(1, torch.Generator().manual_seed(0)), denoise_with(module, model)
    # weights alone: rounded inputs are others along another trajectory, which is no first order
    forms = {"w8": Form(W8A16), "w4": Form(w4a16(32))}
    names = ("inner", "condition", "outlet")
    screen = Screen(rounded, denoise, dict.fromkeys(names, forms))
    predicted, _ = screen.errors_of_samples(sampler, start, torch.Generator().manual_seed(1))
    reference = sampler.sample(denoise, start)
    for name in names:
        for label, form in forms.items():
            with rounded.alone(name, form):
                measured = float((sampler.sample(denoise, start) - reference).square().mean())
            assert predicted[name][label] == pytest.approx(measured, rel=0.1)
            assert measured > 0


def test_probes_approach_the_error_of_many_outputs():
    """Mean of 400 draws whose relative standard deviation is at most sqrt(2): 7 %, with room for three of them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).requires_grad_(False).eval()
    rounded, inputs = RoundedLayers(module, NONE), {"input": torch.randn(1, 64)}
    screen = Screen(rounded, lambda i: module(**i), {"0": {"w4": Form(w4a16(32))}})
    predicted, output = screen.errors(inputs, [torch.Generator().manual_seed(i) for i in range(400)])
    with rounded.alone("0", Form(w4a16(32))), torch.no_grad():
        measured = float((module(**inputs) - output).square().sum())
    assert predicted["0"]["w4"] == pytest.approx(measured, rel=0.21)


def test_a_model_without_gradients_says_what_to_do():
    module, inputs, rounded = made()

    def denoise(inputs):
        with torch.no_grad():
            return module(**inputs)

    with pytest.raises(StepFailed, match=r"no backward pass through this model .*: set sensitivity\.probes=0"):
        Screen(rounded, denoise, {"inner": {"w8": Form(W8A8_TOKEN)}}).errors(inputs, [torch.Generator()])


def test_switching_bits_changes_the_weight_that_a_layer_computes_with():
    """Relative errors of a weight at 4 and at 8 bits, and nothing left behind in the model."""
    module, inputs, rounded = made()
    weight, before = module.inner.weight, module(**inputs)
    error = {}
    for label, form in (("w4", Form(w4a16(32))), ("w8", Form(W8A8_TOKEN)), ("w4 again", Form(w4a16(32)))):
        with rounded.alone("inner", form), torch.no_grad():
            assert module.inner is rounded.layer("inner", form)
            error[label] = float((module.inner.rounded_weight() - weight).norm() / weight.norm())
    assert error["w8"] < 0.01 < 0.05 < error["w4"] == error["w4 again"]
    assert module.inner.weight is weight
    assert torch.equal(module(**inputs), before)
