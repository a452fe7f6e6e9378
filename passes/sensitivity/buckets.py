"""Split the trajectory into buckets, and measure how an output error in each bucket changes the samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.calls import denoise_with

if TYPE_CHECKING:
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Inputs

NOISE = 0.02
"""Relative magnitude of the noise that stands for an output error; close to the error of 4-bit weights."""


def split(count: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Split the steps of a trajectory into parts of nearly equal size, each as (first, last + 1).

    >>> split(5, 2), split(2, 5)
    (((0, 2), (2, 5)), ((0, 1), (1, 2)))
    """
    edges = [round(i * count / parts) for i in range(parts + 1)]
    return tuple((a, b) for a, b in itertools.pairwise(edges) if b > a)


def sums(by_call: Sequence[float], buckets: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """Return the sum over the calls of each bucket, from one number for each call."""
    return tuple(sum(by_call[first:past]) for first, past in buckets)


def bucket_weights(
    sampler: Sampler, buckets: tuple[tuple[int, int], ...], samples: int, ctx: Context
) -> tuple[float, ...]:
    """Add noise to the outputs of each bucket in turn, and return its effect on the final samples.

    That is the squared error of the final samples, divided by the relative squared size of the noise.
    """
    denoise = denoise_with(sampler.model.module, sampler.model)
    start = sampler.start(samples, ctx.torch_rng("start"))

    def draw(first: int, past: int) -> torch.Tensor:
        noise = ctx.torch_rng("noise")
        calls = itertools.count()

        def noisy(inputs: Inputs) -> torch.Tensor:
            output = denoise(inputs)
            spoilt = output + NOISE * output.square().mean().sqrt() * torch.randn(output.shape, generator=noise)
            return spoilt if first <= next(calls) < past else output

        return sampler.sample(noisy, start)

    own = range(len(buckets))[ctx.processes.index :: ctx.processes.count]
    with ctx.progress("bucket weights", 1 + len(buckets)) as advance:
        reference = draw(0, 0)
        advance()
        weights = {}
        for bucket in own:
            weights[bucket] = float((draw(*buckets[bucket]) - reference).square().mean()) / NOISE**2
            advance(ctx.processes.count)
    every = {bucket: weight for part in ctx.processes.gather(weights) for bucket, weight in part.items()}
    return tuple(every[bucket] for bucket in range(len(buckets)))
