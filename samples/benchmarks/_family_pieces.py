"""The parts of the tiny denoisers of all families: weights, schedulers, conditions and coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from torch import nn
from torch.nn import functional

ROWS = 3
"""Recorded rows of each condition."""


def _make(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with weights that let every branch be seen: those that start at zero, or with no values, get noise."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory without values, such as that of torch.empty, is NaN
    try:
        module = build()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.isnan().any() or not parameter.any():
                parameter.normal_(std=0.02)
    return module.eval()


def _flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _noise() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(timestep_spacing="trailing")


def _rows(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random conditions."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def _mask(tokens: int) -> torch.Tensor:
    """Which tokens of a text are there: all but the last."""
    mask = torch.ones(ROWS, tokens, dtype=torch.int64)
    mask[:, -1] = 0
    return mask


def _grid(*sizes: int) -> torch.Tensor:
    """Coordinates of every place, (places, axes)."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def _flux_ids(text: int, height: int, width: int, axes: int = 3) -> Mapping[str, torch.Tensor]:
    places = functional.pad(_grid(height, width), (1, axes - 3))
    return {"img_ids": places, "txt_ids": torch.zeros(text, axes)}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def _two_texts() -> Mapping[str, torch.Tensor]:
    first = {"encoder_hidden_states": _rows(5, 64), "encoder_attention_mask": _mask(5)}
    return {**first, "encoder_hidden_states_2": _rows(4, 32), "encoder_attention_mask_2": _mask(4)}
