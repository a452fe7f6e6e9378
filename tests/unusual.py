"""A denoiser whose layers are called several times, under several names, by others, or not at all."""

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.nn import functional

from intaglio.pipeline.model.denoiser import DenoiserModel


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 64, 3, padding=1)
        self.twice = nn.Linear(64, 64)
        self.same = self.twice
        self.blocks = nn.ModuleList([Inner()])
        self.again = self.blocks[0]
        self.thrice = nn.Linear(64, 64)
        self.two_sizes = nn.Conv2d(64, 64, 3, padding=1)
        self.one, self.tied = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.tied.weight = self.one.weight
        self.never, self.dead, self.by_value = nn.Linear(64, 64), nn.Conv2d(64, 64, 1), nn.Linear(64, 64)
        self.named = nn.Linear(64, 64)
        self.side = nn.Conv1d(64, 64, 1)
        self.last = nn.Conv2d(64, 4, 1)
        self.spare = nn.Linear(64, 64)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.first(sample)) + timestep.float().reshape(-1, 1, 1, 1) / 1000
        small = self.two_sizes(functional.avg_pool2d(x, 2))
        x = x + self.two_sizes(x) + functional.interpolate(small, scale_factor=2.0, mode="nearest")
        self.dead(x)
        y = x.flatten(2).transpose(1, 2)
        y = y + self.twice(torch.tanh(y + self.same(y)))
        y = self.again(torch.tanh(self.blocks[0](y)))
        y = self.thrice(y) + self.thrice(torch.tanh(y)) + self.thrice(y.mean(1)).unsqueeze(1)
        y = y + torch.sigmoid(self.one(y)) * self.tied(y).to(self.tied.weight.dtype)
        y = y + functional.linear(y, self.by_value.weight) + self.side(y.transpose(1, 2)).transpose(1, 2)
        return self.last((y + self.named(input=y)).transpose(1, 2).reshape(x.shape))


def make() -> DenoiserModel:
    torch.manual_seed(0)
    return DenoiserModel(Unusual().eval(), DDIMScheduler(timestep_spacing="trailing"), (4, 8, 8))
