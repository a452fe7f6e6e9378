"""Make quantized layers trainable, and extract the trained values.

Shapes: N out features, K in features, G scales per row, T denoising steps, `rank` of the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from intaglio.pipeline.artifacts.quantized import LayerAdapter
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.numerics import rounding
from intaglio.pipeline.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from intaglio.pipeline.simulation.layer import QuantizedLayer
    from intaglio.pipeline.simulation.weight import WeightRounding


class TrainedWeight(nn.Module):
    """The float weight start + B A, (N, K), that is rounded in the place of the model's own (EfficientDM Eq. 5).

    `start_NK` is not trained. A is (rank, K) and B is (N, rank); without them the weight is `start_NK`.
    """

    def __init__(self, start_NK: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> None:
        super().__init__()
        self.start_NK = start_NK
        self.a = None if a is None else nn.Parameter(a)
        self.b = None if b is None else nn.Parameter(b)

    def forward(self) -> torch.Tensor:
        """Return the weight; differentiable in A and B."""
        return self.start_NK if self.a is None or self.b is None else self.start_NK + self.b @ self.a


class InputScales(nn.Module):
    """One trainable scale and shift for each denoising step (TALSQ, EfficientDM section 3.4), relative to calibration.

    The magnitude of the input is multiplied by exp(log_factor), so it stays positive; the middle of its range moves by
    `offset` magnitudes. Every step has a parameter of its own: the optimizer changes neither value nor momentum of a
    parameter without a gradient.
    """

    def __init__(self, factor_T: torch.Tensor) -> None:
        super().__init__()
        self.log_factor = nn.ParameterList([nn.Parameter(f.log()) for f in factor_T])
        self.offset_T = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in factor_T])

    def factor(self, step: int) -> torch.Tensor:
        """Return the factor on the magnitude, ()."""
        factor: torch.Tensor = self.log_factor[step].exp()
        return factor

    def offset(self, step: int) -> torch.Tensor:
        """Return the shift of the middle, in units of the magnitude, ()."""
        offset: torch.Tensor = self.offset_T[step]
        return offset


def add_adapter(layer: QuantizedLayer, rank: int, generator: torch.Generator) -> None:
    """Add a trainable low-rank term B A to the layer's weight: A is uniform, B is zero (Hu et al. 2021).

    The weight that the term is added to is fixed from now on.
    """
    trained = trained_weight(layer)
    w_NK = _own_weight(layer) if trained is None else trained.start_NK
    n, k = w_NK.shape
    bound = (3 / k) ** 0.5
    a = (torch.rand(rank, k, generator=generator) * 2 - 1) * bound
    device = layer.layer.weight.device
    layer.weight_rounding.trained = TrainedWeight(w_NK, a.to(device), torch.zeros(n, rank, device=device))


def _own_weight(layer: QuantizedLayer) -> torch.Tensor:
    """Return the model's own weight in the basis in which it is rounded, (N, K); it stays in its file if it does."""
    grid, weight = layer.weight_rounding, layer.layer.weight
    if not isinstance(weight, StoredTensor):
        return grid.base(weight).detach()
    shape = len(weight), weight.numel() // len(weight)
    return StoredTensor(shape, torch.float32, lambda: grid.base(weight.read()).detach())


def start_from(layer: QuantizedLayer, codes_NK: torch.Tensor, distance: float) -> None:
    """Train from the weight nearest to the model's own that is at most `distance` scales from these codes."""
    start_NK = _near(layer.weight_rounding, layer.layer.weight.detach(), codes_NK, distance)
    layer.weight_rounding.trained = TrainedWeight(start_NK)
    layer.cache.clear()


def trained_weight(layer: QuantizedLayer) -> TrainedWeight | None:
    """Return the trained weight of a layer; None if the layer has the model's own weight."""
    trained = layer.weight_rounding.trained
    return trained if isinstance(trained, TrainedWeight) else None


def learn_input(layer: QuantizedLayer, scales: InputScales) -> None:
    """Train the range of the layer's input from now on; layers that read the same input can share the scales."""
    assert layer.input_rounding is not None  # only rounded inputs learn
    layer.input_rounding.trained = scales.to(layer.layer.weight.device)


def input_scales(layer: QuantizedLayer) -> InputScales | None:
    """Return the trainable input scales of a layer, if it has any."""
    trained = None if layer.input_rounding is None else layer.input_rounding.trained
    return trained if isinstance(trained, InputScales) else None


@torch.no_grad()
def learnt(layer: QuantizedLayer, codes: torch.Tensor | None = None) -> LayerAdapter:
    """Return the trained values of a layer; `codes` are those that `start_from` was given."""
    grid, weight = layer.weight_rounding, trained_weight(layer)
    adapter = (None, None) if weight is None else (weight.a, weight.b)
    a, b, group = (None if p is None else p.detach() for p in (*adapter, grid.group))
    return LayerAdapter(grid.scale.detach(), a, b, group, _learnt_tables(layer), codes)


def load_learnt(grid: WeightRounding, weight: torch.Tensor, layer: LayerAdapter, distance: float) -> None:
    """Load trained values into the rounding of the model's `weight`, so that it rounds as the trained layer did."""
    start_NK = grid.base(weight)
    if layer.codes is not None:
        grid.fit(weight)  # the scales that the training began with
        start_NK = _near(grid, weight, layer.codes, distance)
    grid.trained = TrainedWeight(start_NK, layer.a, layer.b).requires_grad_(False)
    grid.set_scales(layer.scale_NG, layer.group_NG)


def _near(grid: WeightRounding, weight: torch.Tensor, codes_NK: torch.Tensor, distance: float) -> torch.Tensor:
    """Return the weight nearest to the model's own that is at most `distance` scales from these codes, (N, K)."""
    w_NK, scale_NG = grid.base(weight).detach(), grid.code_scale().detach()
    return rounding.rounds_to(codes_NK, w_NK, scale_NG, grid.rounded_form.grid, distance)


def _learnt_tables(layer: QuantizedLayer) -> LayerTables:
    """Return the trained tables, in the form that an exported layer has."""
    scheme, scales = layer.scheme, input_scales(layer)
    if scales is None or isinstance(scheme.input, Float):
        return LayerTables()
    steps = range(len(layer.clock.timesteps))
    if scheme.by_token:
        return LayerTables(factor_T=torch.stack([scales.factor(step) for step in steps]))
    assert layer.input_rounding is not None  # one scale for each step
    ranges = [layer.input_rounding.step_range(step) for step in steps]
    shifts = [shift for _, shift in ranges if shift is not None]
    return LayerTables(
        amax_T=torch.stack([amax for amax, _ in ranges]), shift_T=torch.stack(shifts) if shifts else None
    )
