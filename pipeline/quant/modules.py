"""Layers that compute as the deployed graph does: the simulation, and what distillation trains.

Shapes: N out features, K in features, G scales a row, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, assert_never

import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.quant import affine
from intaglio.pipeline.quant.balance import Balance
from intaglio.pipeline.quant.spec import Float, IntInput, IntOutput, IntWeight, LayerScheme, PerStep, PerToken

if TYPE_CHECKING:
    from intaglio.pipeline.quantized import Quantized


class StepClock:
    """The denoising step that a call belongs to, found from its timestep and shared by all layers of a model.

    Indexed by timestep and never by counting calls: split guidance, second-order solvers and partial trajectories work.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self.timesteps = timesteps
        self.step = 0

    def index(self, timestep: float) -> int:
        """The step whose timestep is nearest."""
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))

    def set(self, timestep: float) -> None:
        """Every layer that reads this clock computes at the step nearest to `timestep` from now on."""
        self.step = self.index(timestep)


class QuantizedLayer(nn.Module):
    """A Linear or Conv2d whose weight, input and output are rounded as its scheme says.

    Invariant: with the same input it makes the same integer codes as the exported node.
    The product of `adapter_b` (N, rank) and `adapter_a` (rank, K) is added to the weight before it is rounded
    (QALoRA, EfficientDM Eq. 5). A balance puts input and weight into another basis before either is rounded; the
    adapter, and the input's ranges, are in that basis.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        scheme: LayerScheme,
        clock: StepClock,
        amax_T: torch.Tensor | None = None,
        output_amax_T: torch.Tensor | None = None,
        shift_T: torch.Tensor | None = None,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.amax_T: torch.Tensor
        self.shift_T: torch.Tensor
        self.output_amax_T: torch.Tensor
        self.layer, self.scheme, self.clock, self.balance = layer, scheme, clock, balance
        self.adapter_a: nn.Parameter | None = None
        self.adapter_b: nn.Parameter | None = None
        self.weight_group: nn.Parameter | None = None
        self._rounded: torch.Tensor | None = None
        if isinstance(scheme.weight, IntWeight):
            self._set_scales(*affine.fit(self.float_weight(), scheme.weight))
        if isinstance(scheme.input, IntInput) and isinstance(scheme.input.granularity, PerStep):
            if amax_T is None:
                raise ValueError("a scale for each step needs the calibrated input ranges")
            self.register_buffer("amax_T", amax_T.clone().clamp_min(affine.TOKEN_EPS))
        if isinstance(scheme.input, IntInput) and scheme.input.shifted:
            if isinstance(layer, nn.Conv2d) and any(layer._reversed_padding_repeated_twice):
                raise ValueError("zeros around a shifted input do not shift: it needs a convolution without padding")
            if isinstance(scheme.input.granularity, PerStep):
                if shift_T is None:
                    raise ValueError("a shifted input needs the middle of its range at each step")
                self.register_buffer("shift_T", shift_T.clone())
        if isinstance(scheme.output, IntOutput):
            if output_amax_T is None or not isinstance(layer, nn.Conv2d):
                raise ValueError("a rounded output needs the calibrated output ranges, and a convolution")
            self.register_buffer("output_amax_T", output_amax_T.clone())

    def _set_scales(self, scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> None:
        self.weight_scale = nn.Parameter(scale_NG.clone(), requires_grad=False)
        self.weight_group = None if group_NG is None else nn.Parameter(group_NG.float(), requires_grad=False)

    def code_scale(self) -> torch.Tensor:
        """What one code of the weight stands for, (N, G)."""
        return affine.product_scale(self.weight_scale, self.weight_group)

    def add_adapter(self, rank: int, generator: torch.Generator) -> None:
        """Trainable low-rank term B A, zero to begin with: A uniform, B zero (Hu et al. 2021)."""
        n, k = self.layer.weight.flatten(1).shape
        bound = (3 / k) ** 0.5
        self.adapter_a = nn.Parameter((torch.rand(rank, k, generator=generator) * 2 - 1) * bound)
        self.adapter_b = nn.Parameter(torch.zeros(n, rank))

    def float_weight(self) -> torch.Tensor:
        """The weight that is rounded, W0 + B A: (N, K)."""
        w = self.layer.weight if self.balance is None else self.balance.weight(self.layer.weight)
        w_NK = w.flatten(1)
        return w_NK if self.adapter_a is None or self.adapter_b is None else w_NK + self.adapter_b @ self.adapter_a

    def weight_codes(self) -> torch.Tensor:
        """Integer codes (N, K), int8. Raises ValueError for a float weight."""
        if not isinstance(self.scheme.weight, IntWeight):
            raise ValueError("a float weight has no codes")
        return affine.quantize(self.float_weight(), self.code_scale(), self.scheme.weight)

    def set_codes(self, q_NK: torch.Tensor, scale_NG: torch.Tensor, group_NG: torch.Tensor | None = None) -> None:
        """Compute with these codes from now on; the float weight and the adapter are not looked at any more."""
        if not isinstance(self.scheme.weight, IntWeight):
            raise ValueError("a float weight has no codes")
        self._set_scales(scale_NG, group_NG)
        rounded_NK = affine.dequantize(q_NK, self.code_scale().detach(), self.scheme.weight)
        self._rounded = rounded_NK.reshape(self.layer.weight.shape)

    def rounded_weight(self) -> torch.Tensor:
        """The weight as the layer computes with it, in the layer's own shape; cached while nothing trains."""
        match self.scheme.weight:
            case Float():
                return self.layer.weight
            case IntWeight() as form:
                if self._rounded is not None:
                    return self._rounded
                w = affine.fake_quantize(self.float_weight(), self.code_scale(), form).reshape(self.layer.weight.shape)
                if not torch.is_grad_enabled():
                    self._rounded = w
                return w
            case other:
                assert_never(other)

    def invalidate(self) -> None:
        """Forget the cached weight, after an optimizer moved what it is made of."""
        self._rounded = None

    def _apply_layer(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product without its bias."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight)
        y: torch.Tensor = self.layer._conv_forward(x, weight, None)
        return y

    def _balanced(self, x: torch.Tensor) -> torch.Tensor:
        """The input in the basis in which it is rounded."""
        return x if self.balance is None else self.balance.input(x, -1 if isinstance(self.layer, nn.Linear) else -3)

    def input_codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes of the input, as floats, the magnitude that its unit range stands for, (..., 1) or (), and the shift.

        The shift is that of the unit range's middle, like the magnitude; None where the range is symmetric.
        """
        if not isinstance(self.scheme.input, IntInput):
            raise ValueError("a float input has no codes")
        bits, shifted = self.scheme.input.bits, self.scheme.input.shifted
        x = self._balanced(x)
        match self.scheme.input.granularity:
            case PerToken():
                amax, shift = affine.token_range(x) if shifted else (affine.token_amax(x), None)
                return affine.input_codes((x if shift is None else x - shift) / amax, bits), amax, shift
            case PerStep():
                amax = self.amax_T[self.clock.step]
                shift = self.shift_T[self.clock.step] if shifted else None
                return affine.input_codes((x if shift is None else x - shift) * (1 / amax), bits), amax, shift
            case other:
                assert_never(other)

    def _rounded_product(self, q: torch.Tensor, weight: torch.Tensor, bits: int) -> torch.Tensor:
        """The product of the input's codes and the weight, rounded as it leaves the layer before amax and bias."""
        weight_scale = self.weight_scale.reshape(-1, 1, 1)
        acc = self._apply_layer(q, affine.round_ste(weight / weight_scale.unsqueeze(1)))
        scale = affine.output_scale(self.output_amax_T, self.amax_T)[self.clock.step]
        return affine.output_codes(acc, weight_scale, scale, bits) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounded_weight()
        if isinstance(self.scheme.input, IntInput):
            q, amax, shift = self.input_codes(x)
            if isinstance(self.scheme.output, IntOutput):
                y = self._rounded_product(q, weight, self.scheme.input.bits) * amax
            else:
                y = self._apply_layer(q * affine.input_scale(self.scheme.input.bits), weight) * amax
            if shift is not None:
                y = y + shift * self._of_channels(weight.flatten(1).sum(1))
        else:
            y = self._apply_layer(self._balanced(x), weight)
        return y if self.layer.bias is None else y + self._of_channels(self.layer.bias)

    def _of_channels(self, values_N: torch.Tensor) -> torch.Tensor:
        """In the shape in which the output takes them."""
        return values_N if isinstance(self.layer, nn.Linear) else values_N.reshape(-1, 1, 1)


def quantize_model(
    model: nn.Module,
    schemes: Mapping[str, LayerScheme],
    clock: StepClock,
    amax: Mapping[str, torch.Tensor],
    output_amax: Mapping[str, torch.Tensor] = MappingProxyType({}),
    shift: Mapping[str, torch.Tensor] = MappingProxyType({}),
    balance: Mapping[str, Balance] = MappingProxyType({}),
) -> dict[str, QuantizedLayer]:
    """Put a QuantizedLayer in the place of every layer that does not stay in float. Changes `model`.

    `amax`, `output_amax` and `shift` hold (T,) ranges by layer name, for the layers with a scale a step, those whose
    output is rounded and those whose input is shifted; `balance` the bases of those that are balanced:
    `Trajectory.ranges`. Returns the new layers by name.
    """
    replaced = {}
    for name in sorted(schemes):
        if schemes[name].name == "float":
            continue
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"{name} is a {type(layer).__name__}: only Linear and Conv2d can be quantized")
        parent, _, child = name.rpartition(".")
        replaced[name] = QuantizedLayer(
            layer, schemes[name], clock, amax.get(name), output_amax.get(name), shift.get(name), balance.get(name)
        )
        setattr(model.get_submodule(parent), child, replaced[name])
    return replaced


def simulate(model: nn.Module, quantized: Quantized) -> StepClock:
    """Turn `model` into what the deployed graph computes, from integer codes and scales alone. Changes `model`.

    Returns the clock that is set to a call's timestep before the call.
    """
    clock = StepClock(quantized.timesteps)
    amax = {name: data.amax_T for name, data in quantized.layers.items() if data.amax_T is not None}
    output_amax = {n: data.output_amax_T for n, data in quantized.layers.items() if data.output_amax_T is not None}
    shift = {name: data.shift_T for name, data in quantized.layers.items() if data.shift_T is not None}
    balance = {name: data.balance for name, data in quantized.layers.items() if data.balance is not None}
    schemes = {name: data.scheme for name, data in quantized.layers.items()}
    layers = quantize_model(model, schemes, clock, amax, output_amax, shift, balance)
    for name, layer in layers.items():
        if isinstance(layer.scheme.weight, IntWeight):
            data = quantized.layers[name]
            layer.set_codes(data.codes, data.scale_NG, data.group_NG)
    return clock
