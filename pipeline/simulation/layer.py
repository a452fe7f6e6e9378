"""Layers that compute as the deployed graph does: the simulation, and what distillation trains.

Shapes: N out features, K in features, G scales a row, T denoising steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.formats.schemes import Float, LayerScheme, PerStep, PerToken, RoundedWeight
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.numerics.low_rank import Branch

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.quantized import LayerAdapter


class InputScales(nn.Module):
    """One trainable scale and shift a denoising step (TALSQ, EfficientDM section 3.4), relative to what was calibrated.

    The magnitude of the input is multiplied by exp(log_factor), so it stays positive; the middle of its range moves by
    `offset` magnitudes. Every step has a parameter of its own: an optimizer leaves those without a gradient alone, in
    value and in momentum.
    """

    def __init__(self, factor_T: torch.Tensor) -> None:
        super().__init__()
        self.log_factor = nn.ParameterList([nn.Parameter(f.log()) for f in factor_T])
        self.offset = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in factor_T])


class LearntInput(NamedTuple):
    """Tables of an input after training, (T,): magnitude and shift of one with a scale a step, or factors of tokens."""

    amax_T: torch.Tensor | None = None
    shift_T: torch.Tensor | None = None
    factor_T: torch.Tensor | None = None


def channel_axis(layer: nn.Linear | nn.Conv2d) -> int:
    """Of what enters and leaves a layer: by the layer, as a linear one takes images too, with their channels last."""
    return -1 if isinstance(layer, nn.Linear) else -3


class QuantizedLayer(nn.Module):
    """A Linear or Conv2d whose weight, input and output are rounded as its scheme says.

    Invariant: with the same input it makes the same integer codes as the exported node.
    The product of `adapter_b` (N, rank) and `adapter_a` (rank, K) is added to the weight before it is rounded
    (QALoRA, EfficientDM Eq. 5). A balance puts input and weight into another basis before either is rounded; the
    adapter, the input's ranges and the branch are in that basis; what the branch computes is no part of the weight.
    `factor_T` multiplies the magnitude that a token is divided by.

    Whoever asks for an attribute of the replaced layer (`weight.dtype`, `bias`, `in_features`, `stride`) gets that
    layer's. Only type, shape and device of `weight` hold: `set_codes` puts the rounded weight there, in its basis.
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
        factor_T: torch.Tensor | None = None,
        branch: Branch | None = None,
        *,
        fit: bool = True,
    ) -> None:
        """`fit` is False where `set_codes` brings the weight scales."""
        super().__init__()
        self.amax_T: torch.Tensor
        self.shift_T: torch.Tensor
        self.output_amax_T: torch.Tensor
        self.factor_T: torch.Tensor | None
        self.input_scales: InputScales | None = None
        self.full_precision = False
        self.layer, self.scheme, self.clock, self.balance, self.branch = layer, scheme, clock, balance, branch
        self.adapter_a: nn.Parameter | None = None
        self.adapter_b: nn.Parameter | None = None
        self._base_NK: torch.Tensor | None = None
        self.weight_group: nn.Parameter | None = None
        self._rounded: torch.Tensor | None = None
        if isinstance(scheme.weight, RoundedWeight) and fit:
            self._set_scales(*scheme.weight.fit(self.float_weight()))
        if scheme.by_step:
            if amax_T is None:
                raise ValueError("a scale for each step needs the calibrated input ranges")
            self.register_buffer("amax_T", amax_T.clone().clamp_min(affine.TOKEN_EPS))
        self.register_buffer("factor_T", None if factor_T is None else factor_T.clone())
        if scheme.shifted:
            if isinstance(layer, nn.Conv2d) and any(layer._reversed_padding_repeated_twice):
                raise ValueError("zeros around a shifted input do not shift: it needs a convolution without padding")
            if scheme.by_step:
                if shift_T is None:
                    raise ValueError("a shifted input needs the middle of its range at each step")
                self.register_buffer("shift_T", shift_T.clone())
        if not isinstance(scheme.output, Float):
            if output_amax_T is None or not isinstance(layer, nn.Conv2d):
                raise ValueError("a rounded output needs the calibrated output ranges, and a convolution")
            self.register_buffer("output_amax_T", output_amax_T.clone())

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the replaced layer where this one has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # not there yet
                raise
            return getattr(self.layer, name)

    def _set_scales(self, scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> None:
        self.weight_scale = nn.Parameter(scale_NG.clone(), requires_grad=False)
        self.weight_group = None if group_NG is None else nn.Parameter(group_NG.float(), requires_grad=False)

    def code_scale(self) -> torch.Tensor:
        """What one code of the weight stands for, (N, G)."""
        return affine.product_scale(self.weight_scale, self.weight_group)

    def add_adapter(self, rank: int, generator: torch.Generator) -> None:
        """Trainable low-rank term B A, zero to begin with: A uniform, B zero (Hu et al. 2021).

        The weight that it is added to stays as it is from now on.
        """
        if self._base_NK is None:
            self._base_NK = self.base_weight().detach()
        n, k = self.layer.weight.flatten(1).shape
        bound = (3 / k) ** 0.5
        device = self.layer.weight.device
        self.adapter_a = nn.Parameter(((torch.rand(rank, k, generator=generator) * 2 - 1) * bound).to(device))
        self.adapter_b = nn.Parameter(torch.zeros(n, rank, device=device))

    def float_weight(self) -> torch.Tensor:
        """The weight that is rounded, W0 + B A: (N, K)."""
        w_NK = self.base_weight() if self._base_NK is None else self._base_NK
        return w_NK if self.adapter_a is None or self.adapter_b is None else w_NK + self.adapter_b @ self.adapter_a

    def base_weight(self) -> torch.Tensor:
        """The model's own weight, in the basis in which it is rounded, without its branch: (N, K)."""
        w = self.layer.weight if self.balance is None else self.balance.weight(self.layer.weight)
        return w.flatten(1) if self.branch is None else self.branch.rest(w.flatten(1))

    def start_from(self, q_NK: torch.Tensor, distance: float) -> None:
        """Train from the weight nearest to the model's own that is at most `distance` scales from these codes."""
        if not isinstance(self.scheme.weight, RoundedWeight):
            raise ValueError("a float weight has no codes")
        scale, w_NK = self.code_scale().detach(), self.base_weight().detach()
        self._base_NK = affine.rounds_to(q_NK, w_NK, scale, self.scheme.weight.grid, distance)
        self.invalidate()

    def learnt(self, codes: torch.Tensor | None = None) -> LayerAdapter:
        """What was trained; `codes` are those that `start_from` was given."""
        from intaglio.pipeline.artifacts.quantized import LayerAdapter

        a, b, group = (None if p is None else p.detach() for p in (self.adapter_a, self.adapter_b, self.weight_group))
        return LayerAdapter(self.weight_scale.detach(), a, b, group, *self.learnt_input(), codes)

    def weight_codes(self) -> torch.Tensor:
        """Integer codes (N, K), int8. Raises ValueError for a float weight."""
        if not isinstance(self.scheme.weight, RoundedWeight):
            raise ValueError("a float weight has no codes")
        return self.scheme.weight.quantize(self.float_weight(), self.code_scale())

    def set_codes(self, q_NK: torch.Tensor, scale_NG: torch.Tensor, group_NG: torch.Tensor | None = None) -> None:
        """Compute with these codes from now on, which take the place of the float weight and the adapter."""
        if not isinstance(self.scheme.weight, RoundedWeight):
            raise ValueError("a float weight has no codes")
        self._set_scales(scale_NG, group_NG)
        rounded_NK = self.scheme.weight.dequantize(q_NK, self.code_scale().detach())
        rounded = rounded_NK.reshape(self.layer.weight.shape)
        self.layer.weight = nn.Parameter(rounded, requires_grad=False)  # the float one is free
        self._rounded = self.layer.weight

    def rounded_weight(self) -> torch.Tensor:
        """The weight as the layer computes with it, in the layer's own shape; cached while nothing trains."""
        match self.scheme.weight:
            case Float():
                return self.base_weight().reshape(self.layer.weight.shape)
            case RoundedWeight() as form:
                if self._rounded is not None:
                    return self._rounded
                w = form.fake_quantize(self.float_weight(), self.code_scale()).reshape(self.layer.weight.shape)
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

    def balanced(self, x: torch.Tensor) -> torch.Tensor:
        """The input in the basis in which it is rounded."""
        return x if self.balance is None else self.balance.input(x, channel_axis(self.layer))

    def _branched(self, x: torch.Tensor, branch: Branch) -> torch.Tensor:
        """(x down^T) up^T, of an input in its basis."""
        down, up = branch.down_RK.to(x), branch.up_NR.to(x)
        low = self._apply_layer(x, down.reshape(-1, *self.layer.weight.shape[1:]))
        return low @ up.T if isinstance(self.layer, nn.Linear) else functional.conv2d(low, up[..., None, None])

    def input_codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes of the input, as floats, the magnitude that its unit range stands for, (..., 1) or (), and the shift.

        The shift is that of the unit range's middle, like the magnitude; None where the range is symmetric.
        """
        return self.balanced_codes(self.balanced(x))

    def balanced_codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `input_codes`, of an input that is in the basis already."""
        if isinstance(self.scheme.input, Float):
            raise ValueError("a float input has no codes")
        bits, shifted = self.scheme.input.bits, self.scheme.input.shifted
        match self.scheme.input.granularity:
            case PerToken():
                amax, shift = affine.token_range(x) if shifted else (affine.token_amax(x), None)
                if (factor := self._factor()) is not None:
                    amax = amax * factor
                return affine.input_codes((x if shift is None else x - shift) / amax, bits), amax, shift
            case PerStep():
                amax, shift = self._range(shifted)
                return affine.input_codes((x if shift is None else x - shift) * (1 / amax), bits), amax, shift
            case other:
                assert_never(other)

    def _factor(self) -> torch.Tensor | None:
        """What the magnitude of a token is multiplied by, (), at the clock's step."""
        step, learnt = self.clock.step, self.input_scales
        if learnt is None:
            return None if self.factor_T is None else self.factor_T[step]
        factor: torch.Tensor = learnt.log_factor[step].exp()
        return factor

    def _range(self, shifted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Magnitude and shift of the input, both (), at the clock's step."""
        step, learnt = self.clock.step, self.input_scales
        amax = self.amax_T[step]
        shift = self.shift_T[step] if shifted else None
        if learnt is not None:
            shift = None if shift is None else shift + learnt.offset[step] * amax
            amax = amax * learnt.log_factor[step].exp()
        return amax, shift

    def learn_input(self, scales: InputScales) -> None:
        """Compute with these from now on; layers that read the same input can share them."""
        self.input_scales = scales.to(self.layer.weight.device)

    def learnt_input(self) -> LearntInput:
        """The tables that `learn_input` trained, as an exported layer has them."""
        learnt = self.input_scales
        if learnt is None or isinstance(self.scheme.input, Float):
            return LearntInput()
        with torch.no_grad():
            factor_T = torch.stack([p.exp() for p in learnt.log_factor])
            if isinstance(self.scheme.input.granularity, PerToken):
                return LearntInput(factor_T=factor_T)
            offset_T = torch.stack(list(learnt.offset))
            shift_T = self.shift_T + offset_T * self.amax_T if self.scheme.input.shifted else None
            return LearntInput(self.amax_T * factor_T, shift_T)

    def _rounded_product(self, q: torch.Tensor, weight: torch.Tensor, amax: torch.Tensor, bits: int) -> torch.Tensor:
        """The product of the input's codes and the weight, rounded as it leaves the layer before amax and bias."""
        weight_scale = self.weight_scale.reshape(-1, 1, 1)
        acc = self._apply_layer(q, affine.round_ste(weight / weight_scale.unsqueeze(1)))
        scale = affine.output_scale(self.output_amax_T[self.clock.step], amax)
        return affine.output_codes(acc, weight_scale, scale, bits) * scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output of the rounded layer, or of the model's own in full precision. `input` is torch's name."""
        if self.full_precision:
            y: torch.Tensor = self.layer(input)
            return y
        weight, x = self.rounded_weight(), self.balanced(input)
        shift = None
        if not isinstance(self.scheme.input, Float):
            q, amax, shift = self.balanced_codes(x)
            if not isinstance(self.scheme.output, Float):
                y = self._rounded_product(q, weight, amax, self.scheme.input.bits) * amax
            else:
                y = self._apply_layer(q * affine.input_scale(self.scheme.input.bits), weight) * amax
        else:
            y = self._apply_layer(x, weight)
        if self.branch is not None:
            y = y + self._branched(x, self.branch)
        if shift is not None:
            y = y + shift * self._of_channels(weight.flatten(1).sum(1))
        return y if self.layer.bias is None else y + self._of_channels(self.layer.bias)

    def _of_channels(self, values_N: torch.Tensor) -> torch.Tensor:
        """In the shape in which the output takes them."""
        return values_N if isinstance(self.layer, nn.Linear) else values_N.reshape(-1, 1, 1)


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """List where each module is registered: the modules that hold it, and its name there."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places
