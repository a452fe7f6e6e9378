"""A network of two-step consistency sampling with outlier channels, as real networks have them at their noisiest step.

Three hidden channels are 50 times as large as all others where sigma is 80, and like the others where sigma is 2. One
row of a weight is a hundredth of the others.
"""

from types import SimpleNamespace

import torch
from torch import nn

from intaglio import DenoiserModel

SIGMAS = (80.0, 2.0)


class ConsistencySteps:
    """Jumps from the noise of each sigma to a sample, and adds noise of the next sigma from a fixed seed."""

    init_noise_sigma = SIGMAS[0]

    def __init__(self):
        self.config, self.timesteps = {}, torch.tensor([])

    def set_timesteps(self, count, device=None):
        self.timesteps = torch.tensor(SIGMAS[:count]).log()

    def scale_model_input(self, sample, timestep):
        return sample / (float(timestep.exp()) ** 2 + 0.25) ** 0.5

    def step(self, output, timestep, sample, return_dict=True, **_):
        sigma = float(timestep.exp())
        sample = 0.25 / (sigma**2 + 0.25) * sample + sigma * 0.5 / (sigma**2 + 0.25) ** 0.5 * output
        if sigma > SIGMAS[-1]:
            sample = sample + SIGMAS[-1] * torch.randn(sample.shape[1:], generator=torch.Generator().manual_seed(1))
        return SimpleNamespace(prev_sample=sample)


class Denoiser(nn.Module):
    """A ReLU MLP; `gain` multiplies its inputs, and divides the weight that they meet."""

    def __init__(self, gain: float, width: int = 64) -> None:
        super().__init__()
        self.gain = gain
        self.enter, self.middle, self.leave = nn.Linear(32, width), nn.Linear(width, width), nn.Linear(width, 32)
        self.outliers = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.enter.weight /= gain
            self.outliers[:3] = 15
            self.middle.weight[:, :3] /= 50
            self.middle.weight[5] /= 100

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        large = 1 + self.outliers * torch.relu(timestep.reshape(-1, 1) - 1)
        hidden = torch.relu(self.enter(sample * self.gain)) * large
        return self.leave(torch.relu(self.middle(hidden)))


def make(gain: float = 1.0) -> DenoiserModel:
    torch.manual_seed(0)
    return DenoiserModel(Denoiser(gain), ConsistencySteps(), (32,))


def rescaled() -> DenoiserModel:
    """The same function; the inputs of its first layer are 64 times as large."""
    return make(64.0)
