"""Scales, rounding and its inverse, in float32: x ~= scale * q.

Shapes: N out features, K in features (of a convolution: channels times kernel), G scales a row (1, or K // group size).
"""

from __future__ import annotations

import numpy as np
import torch

from intaglio.pipeline.quant.spec import IntWeight, PerChannel, PerGroup

INPUT_SCALE = float(np.float32(1 / 127))
"""Scale of an input that was divided by its largest magnitude: a constant, so that the integer GEMM stays one."""
INPUT_LOW, INPUT_HIGH = -128, 127
TOKEN_EPS = 1e-7
"""Smallest magnitude a token is divided by: an all-zero token stays zero."""
SCALE_EPS = 1e-9
"""Smallest weight scale: an all-zero channel gets zero codes."""


class _RoundStraightThrough(torch.autograd.Function):
    """Round half to even; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Round half to even with a straight-through gradient (Bengio et al. 2013)."""
    rounded: torch.Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return rounded


def groups(w_NK: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """w (N, K) -> (N, G, K // G), the view in which a scale (N, G) belongs to a row of the last axis."""
    n, k = w_NK.shape
    match form.granularity:
        case PerChannel():
            return w_NK.reshape(n, 1, k)
        case PerGroup(size=size):
            if k % size:
                raise ValueError(f"in features {k} is not a multiple of the group size {size}")
            return w_NK.reshape(n, k // size, size)


def codes_float(w_NK: torch.Tensor, scale_NG: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """Codes q = clip(round(w / s), low, high) as floats (N, G, K // G); differentiable in w and s."""
    return round_ste(torch.clamp(groups(w_NK, form) / scale_NG.unsqueeze(-1), form.low, form.high))


def quantize(w_NK: torch.Tensor, scale_NG: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """Integer codes (N, K), int8."""
    return codes_float(w_NK.detach(), scale_NG.detach(), form).reshape(w_NK.shape).to(torch.int8)


def dequantize(q_NK: torch.Tensor, scale_NG: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """s * q, float32 (N, K)."""
    return (groups(q_NK.to(torch.float32), form) * scale_NG.unsqueeze(-1)).reshape(q_NK.shape)


def fake_quantize(w_NK: torch.Tensor, scale_NG: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """Round w to the grid and back. Idempotent. Error <= scale / 2 inside the range.

    The gradient to w is 1 inside the range and 0 outside; to s it is round(w/s) - w/s inside and the bound outside
    (LSQ, Esser et al. 2020, Eq. 3).
    """
    return (codes_float(w_NK, scale_NG, form) * scale_NG.unsqueeze(-1)).reshape(w_NK.shape)


def fit_scale(w_NK: torch.Tensor, form: IntWeight) -> torch.Tensor:
    """Weight scales (N, G): the largest magnitude at 8 bit, the clipping of least squared error at 4 bit."""
    w = groups(w_NK.detach().float(), form)
    largest = w.abs().amax(-1)
    ratios = (1.0,) if form.bits == 8 else tuple(1.0 - 0.02 * i for i in range(21))
    best_scale = (largest / form.high).clamp_min(SCALE_EPS)
    best_error = torch.full_like(largest, torch.inf)
    for ratio in ratios:
        scale = (ratio * largest / form.high).clamp_min(SCALE_EPS)
        q = torch.clamp(torch.round(w / scale.unsqueeze(-1)), form.low, form.high)
        error = (q * scale.unsqueeze(-1) - w).square().sum(-1)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale


def input_codes(x_unit: torch.Tensor) -> torch.Tensor:
    """Codes, as floats, of an input scaled into [-1, 1]: clip(round(x / S), -128, 127), S = 1/127."""
    return round_ste(torch.clamp(x_unit / INPUT_SCALE, INPUT_LOW, INPUT_HIGH))


def token_amax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each token of each sample, at least `TOKEN_EPS`: x (..., K) -> (..., 1)."""
    return x.abs().amax(-1, keepdim=True).clamp_min(TOKEN_EPS)
