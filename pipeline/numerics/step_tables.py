"""Interpolate tables with one entry for each denoising step at timesteps that were not measured.

Shapes: T timesteps that were measured, S timesteps that are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from intaglio.pipeline.numerics.rounding import TOKEN_EPS

if TYPE_CHECKING:
    from numpy.typing import NDArray


def refine(timesteps: tuple[float, ...], between: int) -> tuple[float, ...]:
    """Return `timesteps` and, between each two neighbours, `between` more timesteps at even distances.

    >>> refine((900.0, 300.0), between=2)
    (900.0, 700.0, 500.0, 300.0)
    """
    finer = timesteps[:1]
    for a, b in itertools.pairwise(timesteps):
        finer += tuple(a + (b - a) * i / (between + 1) for i in range(1, between + 1)) if a != b else ()
        finer += (b,)
    return finer


def largest_of_repeated(values_T: torch.Tensor, timesteps: tuple[float, ...]) -> torch.Tensor:
    """Return the largest entry at each entry's timestep, (T, ...): second-order solvers call the model twice at some.

    >>> largest_of_repeated(torch.tensor([1.0, 4.0, 2.0]), (900.0, 900.0, 300.0)).tolist()
    [4.0, 4.0, 2.0]
    """
    t = torch.tensor(timesteps, dtype=torch.float64)
    return torch.stack([values_T[t == each].amax(0) for each in t])


def where_known(values: Sequence[float | None], choose: Callable[[list[float]], float]) -> torch.Tensor:
    """Fill in the entries of steps at which a layer is not called, (T,): `choose` computes them from the known ones.

    >>> where_known([1.0, None, 4.0], max).tolist()
    [1.0, 4.0, 4.0]
    """
    known = [value for value in values if value is not None]
    return torch.tensor([choose(known) if value is None else value for value in values])


def resample_magnitude(values_T: torch.Tensor, timesteps: tuple[float, ...], wanted: tuple[float, ...]) -> torch.Tensor:
    """Return magnitudes at the `wanted` timesteps, (S,): their logarithm is linear between measured ones.

    >>> resample_magnitude(torch.tensor([16.0, 1.0]), (900.0, 100.0), (900.0, 500.0, 0.0)).tolist()
    [16.0, 4.0, 1.0]
    """
    logs = values_T.double().clamp_min(TOKEN_EPS).log().numpy()
    return _resample(values_T, np.exp(_interpolate(logs, timesteps, wanted)), timesteps, wanted)


def resample_linear(values_T: torch.Tensor, timesteps: tuple[float, ...], wanted: tuple[float, ...]) -> torch.Tensor:
    """Return values at the `wanted` timesteps, (S,): linear between measured ones.

    >>> resample_linear(torch.tensor([16.0, 1.0]), (900.0, 100.0), (900.0, 500.0, 0.0)).tolist()
    [16.0, 8.5, 1.0]
    """
    return _resample(values_T, _interpolate(values_T.double().numpy(), timesteps, wanted), timesteps, wanted)


def _interpolate(
    values_T: NDArray[np.float64], timesteps: tuple[float, ...], wanted: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return values at the `wanted` timesteps, (S,); beyond the measured ones, the value of the nearest one."""
    t, first = np.unique(np.array(timesteps), return_index=True)
    values: NDArray[np.float64] = np.interp(np.array(wanted), t, values_T[first])
    return values


def _resample(
    values_T: torch.Tensor, between_S: NDArray[np.float64], timesteps: tuple[float, ...], wanted: tuple[float, ...]
) -> torch.Tensor:
    """Return measured values at measured timesteps, to the bit, and interpolated values elsewhere."""
    measured = dict(zip(reversed(timesteps), reversed(values_T.tolist()), strict=True))
    return torch.tensor([measured.get(t, b) for t, b in zip(wanted, between_S.tolist(), strict=True)])
