"""Compute Fourier transforms as products with matrices, because TensorRT has no operator for them.

The transform of N numbers is their product with the matrix exp(-2 pi i n k / N), where n and k are from 0 to N - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from intaglio.pipeline.errors import StepFailed

aten = torch.ops.aten


def of_real(x: torch.Tensor, axes: Sequence[int], norm: int, onesided: bool) -> torch.Tensor:
    """Return the complex transform of real numbers; with `onesided`, only frequencies up to N / 2 of the last axis.

    Raises StepFailed if the size of an axis is no constant.
    """
    last = _size(x, axes[-1])
    cos, sin = _turns(x, last, last // 2 + 1 if onesided else last)
    real, imaginary = (_times(x, axes[-1], matrix) for matrix in (cos, -sin))
    found = torch.complex(real, imaginary)
    for axis in axes[:-1]:
        found = _turned(found, axis, forward=True)
    return found * _factor(norm, [_size(x, axis) for axis in axes])


def of_complex(x: torch.Tensor, axes: Sequence[int], norm: int, forward: bool) -> torch.Tensor:
    """Return the transform of complex numbers, or the inverse one. Raises StepFailed if the size of an axis varies."""
    found = x
    for axis in axes:
        found = _turned(found, axis, forward)
    return found * _factor(norm, [_size(x, axis) for axis in axes])


def to_real(x: torch.Tensor, axes: Sequence[int], norm: int, last: int) -> torch.Tensor:
    """Return the real numbers whose frequencies from 0 to `last` / 2, of the last axis, are `x`.

    Raises StepFailed if the size of an axis is no constant.
    """
    found, count = x, _constant(last)
    for axis in axes[:-1]:
        found = _turned(found, axis, forward=False)
    cos, sin = _turns(x.real, _size(x, axes[-1]), count)
    # a frequency k between 0 and N / 2 also stands for N - k, whose number is the conjugate
    twice = 2 - (2 * torch.arange(len(cos)) % count == 0).to(cos.dtype)[:, None]
    real = _times(found.real, axes[-1], cos * twice) - _times(found.imag, axes[-1], sin * twice)
    return real * _factor(norm, [*(_size(x, axis) for axis in axes[:-1]), count])


FOURIER: Mapping[Any, Callable[..., torch.Tensor]] = {
    aten._fft_r2c.default: of_real,
    aten._fft_c2c.default: of_complex,
    aten._fft_c2r.default: to_real,
}
"""Operators of ATen, and the functions that compute the same without complex products."""


def _turned(x: torch.Tensor, axis: int, forward: bool) -> torch.Tensor:
    """Return the transform of complex numbers along one axis."""
    size = _size(x, axis)
    cos, sin = _turns(x.real, size, size)
    sin = -sin if forward else sin
    real = _times(x.real, axis, cos) - _times(x.imag, axis, sin)
    return torch.complex(real, _times(x.real, axis, sin) + _times(x.imag, axis, cos))


def _turns(like: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of 2 pi n k / N, (rows, columns): N is the larger of both, the other may count fewer."""
    period = max(rows, columns)
    products = torch.arange(rows)[:, None] * torch.arange(columns) % period  # exact, where angles would be rounded
    angles = products.to(torch.float64) * (2 * math.pi / period)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _times(x: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    """Return the product of the matrix (N, K) with the N numbers along one axis."""
    return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


def _size(x: torch.Tensor, axis: int) -> int:
    return _constant(x.shape[axis])


def _constant(size: object) -> int:
    if not isinstance(size, int):
        raise StepFailed(
            "torch cannot export the model: a Fourier transform goes along an axis whose size varies: compile the model"
            " for one size"
        )
    return size


def _factor(norm: int, sizes: Sequence[int]) -> float:
    """Return the factor of a normalization: 1 by none (0), by the root of the number of values (1), or by it (2)."""
    count = math.prod(sizes)
    return (1.0, 1 / math.sqrt(count), 1 / count)[norm]
