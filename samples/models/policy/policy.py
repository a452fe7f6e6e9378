"""A robot's policy as a model factory: `model: {path: models/policy/policy.py:make, sampling_steps: 10}`.

A gripper moves in a plane to a goal ahead, around a round obstacle. The policy sees both (`observation`) and draws the
next 16 target positions (`sample`). It is a transformer trained by flow matching: 10 Euler steps lead from noise to a
trajectory. Where the obstacle is in the middle of the way, trajectories pass on its left or on its right.

Shapes: B batch, L waypoints, T tokens, D channels of a token. Lengths are relative to the reach of the gripper, and
positions to its present position.
"""

import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

from intaglio import DenoiserModel

WEIGHTS = Path(__file__).with_suffix(".safetensors")
WAYPOINTS, STEPS = 16, 10
WIDTH, BLOCKS, HEADS = 128, 2, 4
OBSERVATIONS = 1024
"""Situations from which calibration, distillation and verification draw."""
LOW, HIGH = torch.tensor([0.5, -0.6, 0.4, -0.2, 0.08]), torch.tensor([1.0, 0.6, 0.6, 0.2, 0.16])
"""Smallest and largest values of five numbers: distance of the goal, its direction in radians, part of the way to the
goal at which the obstacle is, distance of the obstacle to the left of that way, and its radius."""


def situations(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw observations (B, 5): five numbers in the order of LOW, each scaled to the range from -1 to 1."""
    return 2 * torch.rand(count, 5, generator=generator) - 1


class Block(nn.Module):
    """Attention and an MLP. The flow's time and the observation scale and shift what both read."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: torch.Tensor, condition_BD: torch.Tensor) -> torch.Tensor:
        scale, shift, mlp_scale, mlp_shift = self.condition(condition_BD).unsqueeze(1).chunk(4, -1)
        h = self.norm(x_BTD) * (1 + scale) + shift
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.out(attended)
        h = self.norm(x_BTD) * (1 + mlp_scale) + mlp_shift
        return x_BTD + self.mlp_out(nn.functional.gelu(self.mlp_in(h)))


class Policy(nn.Module):
    """The velocity of the flow, noise minus trajectory (B, 2, L), at a timestep in 0..STEPS (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.time_in, self.time_out = nn.Linear(32, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.observe_in, self.observe_out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.waypoints_in = nn.Conv1d(2, WIDTH, 3, padding=1)
        self.place = nn.Parameter(torch.randn(WAYPOINTS, WIDTH) / 2)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.waypoints_out = nn.Conv1d(WIDTH, 2, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        angles = timestep.unsqueeze(-1) * torch.arange(1, 17, device=sample.device) * (math.pi / 2 / STEPS)
        time = self.time_out(nn.functional.silu(self.time_in(torch.cat([angles.sin(), angles.cos()], -1))))
        seen = self.observe_out(nn.functional.silu(self.observe_in(observation)))
        whole, *tokens = seen.chunk(3, -1)
        condition = nn.functional.silu(time + whole)
        waypoints = self.waypoints_in(sample).transpose(1, 2) + self.place
        x = torch.cat([torch.stack(tokens, 1), waypoints], 1)
        for block in self.blocks:
            x = block(x, condition)
        return self.waypoints_out(self.norm(x[:, len(tokens) :]).transpose(1, 2))


def untrained() -> DenoiserModel:
    """Return the model with random weights; its observations are drawn from `situations`."""
    # timesteps 10, 9, ... 1 of 10: Euler steps of equal length from noise to the trajectory
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
    seen = situations(OBSERVATIONS, torch.Generator().manual_seed(1))
    return DenoiserModel(Policy(), scheduler, (2, WAYPOINTS), conditions={"observation": seen})


def make() -> DenoiserModel:
    """Return the trained model."""
    model = untrained()
    model.module.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model
