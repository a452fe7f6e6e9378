"""Round a weight so that the error of the layer's output, not that of the weight, is smallest.

Shapes: N out features, K in features of one output, G scales per row, M rows of the input (tokens, or output pixels),
P groups of a convolution, 1 for other layers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.model.layer_types import Conv, LayerModule
from intaglio.pipeline.numerics import rounding

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it: entries of unused channels are zero."""


def second_moment(layer: LayerModule, x: torch.Tensor) -> torch.Tensor:
    """Return sum x x^T over the rows that multiply the weight, for each group of a convolution.

    It has the shape (P, K, K), in float64, and is half the Hessian of the error of the group's outputs.
    """
    rows_PMK = (x.reshape(1, -1, x.shape[-1]) if isinstance(layer, nn.Linear) else _patches(layer, x)).double()
    return rows_PMK.mT @ rows_PMK


def _patches(layer: Conv, x: torch.Tensor) -> torch.Tensor:
    """Return the input that each output pixel of a convolution reads, (P, M, K)."""
    x = functional.pad(x, layer._reversed_padding_repeated_twice)
    for axis, (size, step, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    places = len(layer.stride)
    rows = x.movedim(1, places + 1).flatten(places + 1).flatten(0, places)
    return rows.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def gptq(w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: rounding.Grid, moment_PKK: torch.Tensor) -> torch.Tensor:
    """Round a weight to codes (N, K), int8, on the grid of the scales, with the `second_moment` of its input."""
    parts = zip(w_NK.chunk(len(moment_PKK)), scale_NG.chunk(len(moment_PKK)), moment_PKK, strict=True)
    return torch.cat([_gptq(w, scale, grid, moment) for w, scale, moment in parts])


def _gptq(w_NK: torch.Tensor, scale_NG: torch.Tensor, grid: rounding.Grid, moment_KK: torch.Tensor) -> torch.Tensor:
    """Round the weight of one group.

    Columns are rounded one after the other, beginning with the input feature of largest energy. The columns that follow
    compensate the error of each, as far as their inputs are correlated (GPTQ, Frantar et al. 2023, Algorithm 1).
    """
    k = w_NK.shape[1]
    order = moment_KK.diagonal().argsort(descending=True, stable=True)
    hessian = moment_KK[order][:, order].clone()
    hessian.diagonal().add_(DAMPING * float(hessian.diagonal().mean()) + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    w = w_NK.detach().double()[:, order].clone()
    scale_NK = rounding.groups(torch.ones_like(w_NK), grid).mul(scale_NG.detach().unsqueeze(-1)).reshape(w_NK.shape)
    scale_NK = scale_NK.double()[:, order]
    numbers = torch.empty_like(w)
    for i in range(k):
        numbers[:, i] = grid.nearest(w[:, i] / scale_NK[:, i])
        error = (w[:, i] - numbers[:, i] * scale_NK[:, i]) / factor[i, i]
        w[:, i:] -= error.unsqueeze(1) * factor[i, i:].unsqueeze(0)
    in_place = torch.empty_like(w_NK)
    in_place[:, order] = numbers.to(w_NK.dtype)
    return grid.encode(in_place)
