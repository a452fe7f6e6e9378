"""Define the layer that computes as the deployed graph does.

Shapes: N out features, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.formats.layer_tables import NO_TABLES, LayerTables
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.model.layer_types import LayerModule
from intaglio.pipeline.numerics import rounding
from intaglio.pipeline.numerics.straight_through import round_ste
from intaglio.pipeline.simulation.cache import WeightCache
from intaglio.pipeline.simulation.input import InputCodes, InputRounding, Zero
from intaglio.pipeline.simulation.weight import WeightRounding
from intaglio.pipeline.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.model.step_clock import StepClock
    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.low_rank import Branch


def channel_axis(layer: LayerModule) -> int:
    """Return the channel axis of a layer's input and output.

    It is the last axis of a Linear, or the axis before the spatial axes of a convolution.
    """
    return -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()


def of_channels(layer: LayerModule, values_N: torch.Tensor) -> torch.Tensor:
    """Return one value for each output channel in the shape that broadcasts over the layer's output."""
    return values_N.reshape(-1, *[1] * (-1 - channel_axis(layer)))


class QuantizedLayer(nn.Module):
    """A Linear or a convolution whose weight, input and output are rounded as its scheme says.

    Invariant: with the same input it makes the same integer codes as the exported node.
    `weight_rounding` and `input_rounding` round, and hold what is trained; `cache` keeps the rounded weight. This class
    computes the product and the product of the branch, and adds them and the bias.

    Attributes that this class does not define (`weight`, `bias`, `in_features`, `stride`) are those of the replaced
    layer. After `set_codes`, `weight` is the rounded weight in its basis; its type, shape and device stay the same.
    """

    def __init__(
        self,
        layer: LayerModule,
        scheme: LayerScheme,
        clock: StepClock,
        tables: LayerTables = NO_TABLES,
        *,
        balance: Balance | None = None,
        branch: Branch | None = None,
        weight: WeightRounding | None = None,
    ) -> None:
        """Fit the weight's scales, unless a rounding of the weight is given.

        Raises ValueError if a table that the scheme needs is missing, or if the layer cannot have the scheme.
        """
        super().__init__()
        rounded = not isinstance(scheme.output, Float)
        if rounded and isinstance(layer, nn.Linear):
            raise ValueError("only a convolution can have a rounded output")
        self.zeros = _padding(layer) if scheme.shifted and not rounded else ()
        needed = tables.needed_by(scheme, padded=bool(self.zeros))
        self.full_precision = False
        self.layer, self.scheme, self.clock, self.balance, self.branch = layer, scheme, clock, balance, branch
        self.weight_rounding = weight or WeightRounding.fitted(scheme.weight, layer.weight, balance, branch)
        self.input_rounding: InputRounding | None = None
        if not isinstance(scheme.input, Float):
            zero: Zero = "one" if rounded else "exact" if self.zeros else None
            self.input_rounding = InputRounding(scheme.input, needed, clock, zero=zero)
        self.output_amax_T: torch.Tensor
        self.output_share_N: torch.Tensor
        if needed.output_amax_T is not None:
            share_N = torch.ones(len(layer.weight)) if needed.output_share_N is None else needed.output_share_N
            self.register_buffer("output_amax_T", needed.output_amax_T.clone())
            self.register_buffer("output_share_N", share_N.clone())
        self.cache = WeightCache()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the replaced layer if this class has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # it is not set yet
                raise
            return getattr(self.layer, name)

    @property
    def tables(self) -> LayerTables:
        """The tables that the layer computes with, without what is trained."""
        if (entering := self.input_rounding) is None:
            return LayerTables()
        tables = LayerTables(entering.amax_T, entering.shift_T, factor_T=entering.factor_T)
        if isinstance(self.scheme.output, Float):
            return tables
        return replace(tables, output_amax_T=self.output_amax_T, output_share_N=self.output_share_N)

    def set_codes(self, codes_NK: torch.Tensor) -> None:
        """Compute with these codes from now on. They replace the float weight, whose memory is freed.

        Where both the weight and the codes stay in their files, the rounded weight is made each time that it is used.
        """
        weight = self.layer.weight

        def rounded() -> torch.Tensor:
            return self.weight_rounding.value(codes_NK).reshape(weight.shape)

        if isinstance(weight, StoredTensor) and isinstance(codes_NK, StoredTensor):
            self.layer.weight = StoredTensor(weight.shape, torch.float32, rounded).as_parameter()
        else:
            self.layer.weight = nn.Parameter(rounded(), requires_grad=False)
        self.cache.keep(self.layer.weight)

    def weight_codes(self) -> torch.Tensor:
        """Return the integer codes of the weight, int8 (N, K). Raises ValueError for a weight that stays in float."""
        return self.weight_rounding.codes(self.layer.weight)

    def rounded_weight(self) -> torch.Tensor:
        """Return the weight that the layer computes with, in the layer's own shape; cached while gradients are off."""
        return self.cache.get(lambda: self.weight_rounding(self.layer.weight))

    def balanced(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input in the basis in which it is rounded."""
        return x if self.balance is None else self.balance.input(x, channel_axis(self.layer))

    def input_codes(self, x: torch.Tensor) -> InputCodes:
        """Return the codes of an input, and of the zeros around it where a shifted input is padded.

        Raises ValueError for a layer whose input stays in float.
        """
        return self._codes(self.balanced(x))

    def _codes(self, x: torch.Tensor) -> InputCodes:
        """Return the codes of an input that is in its basis: a padded input is shifted with the zeros around it."""
        if self.input_rounding is None:
            raise ValueError("a float input has no codes")
        codes: InputCodes = self.input_rounding(functional.pad(x, self.zeros) if self.zeros else x)
        return codes

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rounded input that the codes of an input stand for; both are in the layer's basis.

        Raises ValueError for a layer whose input stays in float.
        """
        q, scale, amax, shift = self._codes(x)
        if shift is not None and not isinstance(self.scheme.output, Float):
            q, shift = q + rounding.shift_codes(amax, shift, self.scheme.input_bits), None
        rounded = q * scale * amax + (0.0 if shift is None else shift)
        if not self.zeros:
            return rounded
        return functional.pad(rounded, [-zeros for zeros in self.zeros])

    def rounded_output(self, y: torch.Tensor) -> torch.Tensor:
        """Round the product inside a float output `y` of the layer, and return the new output.

        The scheme must have a rounded output.
        """
        assert self.input_rounding is not None  # only the products of codes are rounded
        bias = 0.0 if self.layer.bias is None else of_channels(self.layer, self.layer.bias)
        amax, _ = self.input_rounding.step_range(self.clock.step)
        scale, share = rounding.output_scale(self.output_amax_T[self.clock.step], amax), self._share
        sums = (y - bias) / (amax * rounding.input_scale())
        return rounding.output_codes(sums, 1 / share, scale) * scale * (amax * share) + bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the rounded layer, or of the replaced one in full precision. `input` is torch's name."""
        if self.full_precision:
            y: torch.Tensor = self.layer(input)
            return y
        weight, x = self.rounded_weight(), self.balanced(input)
        shift = None
        if self.input_rounding is None:
            y = self._product(x, weight)
        else:
            q, scale, amax, shift = self._codes(x)
            if isinstance(self.scheme.output, Float):
                y = self._product(q * scale, weight, padded=bool(self.zeros)) * amax
            else:
                bits = self.scheme.input_bits
                q, shift = (q, None) if shift is None else (q + rounding.shift_codes(amax, shift, bits), None)
                y = self._rounded_product(q, weight, amax, bits) * (amax * self._share)
        if self.branch is not None:
            y = y + self._branched(x, self.branch)
        if shift is not None:
            y = y + shift * of_channels(self.layer, weight.flatten(1).sum(1))
        return y if self.layer.bias is None else y + of_channels(self.layer, self.layer.bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, *, padded: bool = False) -> torch.Tensor:
        """Return the product without its bias; `padded`: x already has the zeros around it."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight)
        if padded:
            conv = self.layer
            return _CONVOLVE[len(conv.stride)](x, weight, None, conv.stride, 0, conv.dilation, conv.groups)
        y: torch.Tensor = self.layer._conv_forward(x, weight, None)
        return y

    def _rounded_product(self, q: torch.Tensor, weight: torch.Tensor, amax: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the rounded product of the codes; each channel is divided by its share of the output's range.

        The caller multiplies by amax and the share, and adds the bias.
        """
        weight_scale = of_channels(self.layer, self.weight_rounding.scale)
        codes = round_ste(weight / weight_scale.unsqueeze(1))
        acc = self._product(q, codes)
        scale = rounding.output_scale(self.output_amax_T[self.clock.step], amax)
        return rounding.output_codes(acc, weight_scale / self._share, scale, bits) * scale

    @property
    def _share(self) -> torch.Tensor:
        """Share of each channel in the range of the output, in the shape that broadcasts over the output."""
        return of_channels(self.layer, self.output_share_N)

    def _branched(self, x: torch.Tensor, branch: Branch) -> torch.Tensor:
        """Return (x down^T) up^T, of an input in its basis."""
        down, up = branch.down_RK.to(x), branch.up_NR.to(x)
        low = self._product(x, down.reshape(-1, *self.layer.weight.shape[1:]))
        if isinstance(self.layer, nn.Linear):
            return low @ up.T
        return _CONVOLVE[len(self.layer.stride)](low, up.reshape(*up.shape, *[1] * len(self.layer.stride)))


_CONVOLVE: Mapping[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
"""Convolutions of torch, by the number of spatial axes."""


def _padding(layer: LayerModule) -> tuple[int, ...]:
    """Return the zeros that a layer adds around its input, before and after, the last axis first; () if none."""
    padding = () if isinstance(layer, nn.Linear) else layer._reversed_padding_repeated_twice
    return tuple(padding) if any(padding) else ()


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """List where each module is registered: the modules that hold it, and its name there."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places
