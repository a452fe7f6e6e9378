"""Compute scales, rounding and its inverse, in float32: x ~= scale * q, or scale * number(q) for formats of floats.

Shapes: N out features, K in features (of a convolution: channels times kernel), G scales per row (1, or K // group
size). A weight of two levels has one scale per row and an integer for each group; their product takes the place of the
scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from intaglio.pipeline.numerics.straight_through import round_ste

if TYPE_CHECKING:
    from intaglio.pipeline.numerics.minifloat import MiniFloat

INPUT_HIGH = {8: 127, 4: 7}
"""Code of an input's largest magnitude, by bits. The smallest code is one further from zero."""
NEARLY_HALF = 0.45
"""Distance from a code, in units of the scale.

A weight at this distance still rounds to the code, and a small update moves it to the next one."""
TOKEN_EPS = 1e-7
"""Smallest magnitude a token is divided by: an all-zero token stays zero."""
ROWS_ELEMENTS = 1 << 17
"""Number of weights that are fitted or rounded together, so that the results stay in the processor's cache.

They take 512 KiB: blocks of 1 MiB and more are mapped anew for every result inside `machine.giving_back`, which took
eight times as long."""
CLIPPING = tuple(1.0 - 0.02 * i for i in range(21))
"""Shares of the largest magnitude at which weights are clipped to find the scale of least squared error."""
LEAST_SHARE = 2.0**-8
"""Smallest share of a channel in the range of a product: smaller channels keep fewer codes."""
SCALE_EPS = 1e-9
"""Smallest weight scale: an all-zero channel gets zero codes."""
GROUP_LOW, GROUP_HIGH = 1, 8
"""Integers of the groups of two levels: with codes in [-8, 7] every 8-bit code is in [-64, 56].

So two products with 8-bit inputs fit into 16 bits, in which CPUs without VNNI add them.
"""


@dataclass(frozen=True)
class Grid:
    """The codes of a weight, all integers in [low, high], and which weights share a scale.

    `group_size` neighbouring input features share a scale; if it is None, all weights of a channel do. A code stands
    for itself times the scale; with `floats`, for a floating-point number of that format times the scale.
    """

    low: int
    high: int
    group_size: int | None = None
    floats: MiniFloat | None = None

    @property
    def largest(self) -> float:
        """Number that the largest code stands for."""
        return self.high if self.floats is None else self.floats.largest

    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
        """Return the numbers nearest to x / s; the gradient is 1 inside the range and 0 outside."""
        if self.floats is not None:
            return self.floats.nearest(unit)
        return round_ste(torch.clamp(unit, self.low, self.high))

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes, int8, that stand for these numbers."""
        return numbers.to(torch.int8) if self.floats is None else self.floats.encode(numbers)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers, float32, that the codes stand for."""
        return codes.to(torch.float32) if self.floats is None else self.floats.decode(codes)


def groups(w_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return w (N, K) as (N, G, K // G), in which a scale (N, G) belongs to a row of the last axis.

    Raises ValueError if the group size does not divide K.
    """
    n, k = w_NK.shape
    size = k if grid.group_size is None else grid.group_size
    if k % size:
        raise ValueError(f"in features {k} is not a multiple of the group size {size}")
    return w_NK.reshape(n, k // size, size)


def product_scale(scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> torch.Tensor:
    """Return the scale of a 4- or 8-bit code, (N, G): s, or s * clip(round(g), 1, 8) if the groups have integers g.

    It is differentiable in both, straight through the rounding of g.
    """
    if group_NG is None:
        return scale_NG
    return scale_NG * round_ste(torch.clamp(group_NG, GROUP_LOW, GROUP_HIGH))


def group_integers(group_NG: torch.Tensor) -> torch.Tensor:
    """Return clip(round(g), 1, 8), int8 (N, G)."""
    return torch.clamp(group_NG.detach(), GROUP_LOW, GROUP_HIGH).round().to(torch.int8)


def eight_bit_codes(q_NK: torch.Tensor, group_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return g * q of two levels, int8 (N, K): the codes that the product multiplies, w ~= s * (g * q).

    >>> codes, grid = torch.full((1, 32), -8, dtype=torch.int8), Grid(-8, 7, group_size=16)
    >>> eight_bit_codes(codes, torch.tensor([[2.0, 8.0]]), grid)[0, 15:17].tolist()
    [-16, -64]
    """
    return (groups(q_NK, grid) * group_integers(group_NG).unsqueeze(-1)).reshape(q_NK.shape)


def codes_float(w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the numbers nearest to w / s that codes stand for, as floats (N, G, K // G).

    They are clip(round(w / s), low, high) for integers, and differentiable in w and s.
    """
    return grid.nearest(groups(w_NK, grid) / scale_NG.unsqueeze(-1))


def quantize(w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return integer codes (N, K), int8.

    >>> quantize(torch.tensor([[1.0, -0.26, 99.0]]), torch.tensor([[0.5]]), Grid(-127, 127)).tolist()
    [[2, -1, 127]]
    """
    codes = w_NK.new_empty(w_NK.shape, dtype=torch.int8)
    for rows in _some_rows(*w_NK.shape):
        codes[rows] = grid.encode(codes_float(w_NK[rows].detach(), scale_NG[rows].detach(), grid).flatten(1))
    return codes


def dequantize(q_NK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return s * q, or s * number(q) for formats of floats, float32 (N, K).

    >>> dequantize(torch.tensor([[2, -1, 127]], dtype=torch.int8), torch.tensor([[0.5]]), Grid(-127, 127)).tolist()
    [[1.0, -0.5, 63.5]]
    """
    return (groups(grid.decode(q_NK), grid) * scale_NG.unsqueeze(-1)).reshape(q_NK.shape)


def fake_quantize(w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round w to the grid and back. It is idempotent; the error inside the range is at most scale / 2.

    The gradient with respect to w is 1 inside the range and 0 outside; to s it is round(w/s) - w/s inside and the bound
    outside (LSQ, Esser et al. 2020, Eq. 3).
    """
    return (codes_float(w_NK, scale_NG, grid) * scale_NG.unsqueeze(-1)).reshape(w_NK.shape)


def rounds_to(
    q_NK: torch.Tensor, w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: Grid, distance: float
) -> torch.Tensor:
    """Return the weight nearest to w that is at most `distance` scales from the codes q, (N, K)."""
    q, scale = groups(grid.decode(q_NK), grid), scale_NG.unsqueeze(-1)
    off = torch.clamp(groups(w_NK, grid) / scale - q, -distance, distance)
    return ((q + off) * scale).reshape(w_NK.shape)


def _some_rows(n: int, k: int) -> list[slice]:
    """Split n rows of k weights into slices of about ROWS_ELEMENTS weights, which are processed together."""
    step = max(1, ROWS_ELEMENTS // k)
    return [slice(start, start + step) for start in range(0, n, step)]


def fit_largest(w_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the scales (N, G) with which the largest magnitude has the largest code."""
    return torch.cat([_largest(w_NK[rows], grid) for rows in _some_rows(*w_NK.shape)])


def _largest(w_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    return (groups(w_NK.detach().float(), grid).abs().amax(-1) / grid.largest).clamp_min(SCALE_EPS)


def fit_clipped(w_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the scales (N, G) of least squared error, of those that clip at 0.6 to 1.0 of the largest magnitude."""
    return torch.cat([_fit_clipped(w_NK[rows], grid) for rows in _some_rows(*w_NK.shape)])


def _fit_clipped(w_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    w = groups(w_NK.detach().float(), grid)
    largest = w.abs().amax(-1)
    best_scale = _largest(w_NK, grid)
    best_error = torch.full_like(largest, torch.inf)
    for ratio in CLIPPING:
        scale = (ratio * largest / grid.largest).clamp_min(SCALE_EPS)
        error = _squared_error(w, scale, grid)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale


def fit_two_level(w_NK: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (N, 1), and the integers of groups (N, G) as floats, with the least squared error of all tried.

    Several scales are tried for each channel: with each of them, the largest integer of a group is near GROUP_HIGH. No
    other integers have a smaller error with the same scale.
    """
    found = [_fit_two_level(w_NK[rows], grid) for rows in _some_rows(*w_NK.shape)]
    return torch.cat([scale for scale, _ in found]), torch.cat([group for _, group in found])


def _fit_two_level(w_NK: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    w = groups(w_NK.detach().float(), grid)
    alone = _fit_clipped(w_NK, grid)
    best_scale = torch.full_like(alone[:, :1], SCALE_EPS)
    best_error = torch.full_like(best_scale, torch.inf)
    for ratio in (1.0, 0.96, 0.92, 1.04, 1.08):
        scale = (ratio * alone.amax(-1, keepdim=True) / GROUP_HIGH).clamp_min(SCALE_EPS)
        group = torch.clamp(torch.round(alone / scale), GROUP_LOW, GROUP_HIGH)
        error = _squared_error(w, scale * group, grid).sum(-1, keepdim=True)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    best_group = torch.ones_like(alone)
    best_error = torch.full_like(alone, torch.inf)
    for integer in range(GROUP_LOW, GROUP_HIGH + 1):
        error = _squared_error(w, (best_scale * integer).expand_as(alone), grid)
        better = error < best_error
        best_group, best_error = torch.where(better, float(integer), best_group), torch.where(better, error, best_error)
    return best_scale, best_group


def _squared_error(w_NGS: torch.Tensor, scale_NG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the squared error of each group when rounded with its scale, (N, G)."""
    q = grid.nearest(w_NGS / scale_NG.unsqueeze(-1))
    return (q * scale_NG.unsqueeze(-1) - w_NGS).square().sum(-1)


def input_scale(bits: int = 8) -> float:
    """Return float32(1 / 127) or float32(1 / 7): the scale of an input that was divided by its largest magnitude.

    It is a constant: runtimes run an integer GEMM only if the scale is constant.
    """
    return float(np.float32(1 / INPUT_HIGH[bits]))


def input_codes(x_unit: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Return codes, as floats, of an input in [-1, 1]: clip(round(127 x), -128, 127), or clip(round(7 x), -8, 7).

    >>> x = torch.tensor([-1.0, 0.1, 0.5, 2.0])
    >>> input_codes(x).tolist(), input_codes(x, bits=4).tolist()
    ([-127.0, 13.0, 64.0, 127.0], [-7.0, 1.0, 3.0, 7.0])
    """
    high = INPUT_HIGH[bits]
    return round_ste(torch.clamp(x_unit / input_scale(bits), -high - 1, high))


def output_scale(output_amax_T: torch.Tensor, amax_T: torch.Tensor) -> torch.Tensor:
    """Return (T,) scales of the codes of a product whose input was divided by `amax_T`; the largest code is 127."""
    return (output_amax_T / amax_T / 127).clamp_min(SCALE_EPS)


def output_ranges(amax_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the largest magnitudes of a product's channels, (T, N), into those of the steps, (T,), and shares, (N,).

    A channel's share is its largest magnitude relative to that of all channels, at the step where this is largest, and
    at least LEAST_SHARE. A channel that is divided by its share stays within the magnitude of the step. So channels of
    small range keep as many codes as others, and runtimes still round the product with one scale.

    >>> amax_T, share_N = output_ranges(torch.tensor([[8.0, 2.0], [1.0, 0.125]]))
    >>> amax_T.tolist(), share_N.tolist()
    ([8.0, 1.0], [1.0, 0.25])
    """
    share_N = (amax_TN / amax_TN.amax(1, keepdim=True).clamp_min(TOKEN_EPS)).amax(0).clamp_min(LEAST_SHARE)
    return (amax_TN / share_N).amax(1), share_N


def output_codes(acc: torch.Tensor, weight_scale: torch.Tensor, scale: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Return codes, as floats, of a sum of products of codes: clip(round(sum * ((S * s_w) / s)), -128, 127).

    S is the scale of the input, and `weight_scale` that of the weight divided by the channel's share. The order of the
    operations is that of ONNX Runtime; `acc` is exact below 2^24.
    """
    return round_ste(torch.clamp(acc * ((input_scale(bits) * weight_scale) / scale), -128, 127))


def token_amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each token of each sample, at least `TOKEN_EPS`: x (..., K) -> (..., 1)."""
    return x.abs().amax(-1, keepdim=True).clamp_min(TOKEN_EPS)


def token_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the width of each token's range, at least `TOKEN_EPS`, and its middle: x (..., K) -> (..., 1) twice.

    >>> half, middle = token_range(torch.tensor([[-1.0, 0.0, 5.0]]))
    >>> half.item(), middle.item()
    (3.0, 2.0)
    """
    return half_range(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))


def half_range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the width of a range, at least `TOKEN_EPS`, and its middle."""
    return ((high - low) * 0.5).clamp_min(TOKEN_EPS), (high + low) * 0.5


def with_zero(amax: torch.Tensor, shift: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring half widths and middles of ranges to values with which one code stands for zero exactly.

    The middle becomes a multiple of the scale, which moves both ends by at most half a scale. A range without zero is
    widened up to zero. Ranges that have such a code stay as they are, to the bit. The gradient passes straight through
    the rounding of `shift`.

    >>> amax, shift = with_zero(torch.tensor([127.0, 1.0]), torch.tensor([-41.3, 4.0]))
    >>> amax.tolist(), shift.tolist()
    ([127.0, 2.5], [-41.0, 2.5])
    """
    high = INPUT_HIGH[bits]
    outside = shift.abs() > (high + 0.5) * (amax * input_scale(bits))
    widened = (shift.abs() + amax) * 0.5
    amax, shift = torch.where(outside, widened, amax), torch.where(outside, widened * shift.sign(), shift)
    return amax, shift_codes(amax, shift, bits) * (amax * input_scale(bits))


def with_one_zero(amax_T: torch.Tensor, shift_T: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring ranges to those with which the same code stands for zero at every step, at the least widening, (T,) each.

    The widening that is minimized is the mean of (new half width / old half width)^2. Ranges that already share one
    code are not changed.

    >>> amax, shift = with_one_zero(torch.tensor([127.0, 63.5]), torch.tensor([60.0, 40.0]))
    >>> [round(v, 2) for v in amax.tolist()], shift_codes(amax, shift).tolist()
    ([127.0, 70.29], [60.0, 60.0])
    """
    high = INPUT_HIGH[bits]
    amax_T, shift_T = with_zero(amax_T, shift_T, bits)
    zero_T = shift_codes(amax_T, shift_T, bits)
    if bool((zero_T == zero_T[0]).all()):
        return amax_T, shift_T
    codes_C = torch.arange(-high + 1, high, dtype=amax_T.dtype, device=amax_T.device)
    above_TC = (shift_T + amax_T).unsqueeze(1) / (high + codes_C)
    below_TC = (amax_T - shift_T).unsqueeze(1) / (high - codes_C)
    wide_TC = torch.maximum(above_TC, below_TC) * high
    best = int((wide_TC / amax_T.unsqueeze(1)).square().mean(0).argmin())
    return wide_TC[:, best], codes_C[best] * (wide_TC[:, best] * input_scale(bits))


def shift_codes(amax: torch.Tensor, shift: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Return middles of ranges divided by the scale, rounded to integers, as floats.

    After `with_zero` they are minus the code of zero.

    >>> shift_codes(torch.tensor([127.0]), torch.tensor([-41.3])).tolist()
    [-41.0]
    """
    return round_ste(shift / (amax * input_scale(bits)))


def input_codes_around(x_unit: torch.Tensor, zero: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Return codes, as floats, of an input whose zero has the code -`zero`: clip(round(127 x) - zero, -128, 127).

    >>> input_codes_around(torch.tensor([0.0, 0.1, -0.1, 2.0]), torch.tensor(116.0)).tolist()
    [-116.0, -103.0, -128.0, 127.0]
    """
    high = INPUT_HIGH[bits]
    unit = x_unit / input_scale(bits)
    return round_ste(torch.clamp(unit, -high - 1 + zero, high + zero)) - zero


def half_table(table: torch.Tensor) -> torch.Tensor:
    """Return the table in float16, or unchanged if an entry is too large for float16.

    The error of an entry is at most 2^-11 of it, or 2^-25.
    """
    half = table.to(torch.float16)
    return half if half.isfinite().all() else table
