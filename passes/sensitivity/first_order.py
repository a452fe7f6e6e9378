"""Predict to first order how a layer's rounding changes a number, from gradients at the layer's input and output.

Shapes: x input, y output, N out features, K in features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.model.layer_types import Conv
from intaglio.pipeline.simulation.layer import channel_axis

if TYPE_CHECKING:
    from collections.abc import Hashable

    from intaglio.passes.sensitivity.forms import Form
    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.simulation.layer import QuantizedLayer

T = TypeVar("T")
_BY_WEIGHT: Mapping[int, Callable[..., torch.Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
"""Functions that compute the gradient with respect to a convolution's weight, by its number of spatial axes."""


class Call(NamedTuple):
    """Input and output of one call of a layer, and the gradients of the predicted number with respect to both.

    The output is None where no form rounds it.
    """

    x: torch.Tensor
    y: torch.Tensor | None
    by_y: torch.Tensor
    by_x: torch.Tensor


def products_of(rounded: RoundedLayers, name: str, forms: Mapping[str, Form], call: Call) -> dict[str, float]:
    """Return g^T (rounded(x) - y), by the label of the form, where g is the gradient with respect to y.

    W' x' - W x = (W' - W) x + W (x' - x) + (W' - W) (x' - x). The first term is the product of W' - W with the gradient
    with respect to the weight, the second is that of x' - x with the gradient with respect to the input. The third is
    left out, because it is a product of two rounding errors. So one matrix product, for the gradient of the weight, is
    enough for any number of forms; each further format only adds passes over the elements of the weight, input or
    output.
    """
    parts = _Parts(rounded, name, call)
    return {label: parts.product(form) for label, form in forms.items()}


class _Parts:
    """The parts of the products of one call. Forms share the parts of equal formats."""

    def __init__(self, rounded: RoundedLayers, name: str, call: Call) -> None:
        self.rounded, self.name, self.call = rounded, name, call
        self._made: dict[Hashable, object] = {}

    def product(self, form: Form) -> float:
        scheme, basis = form
        total = 0.0
        if not isinstance(scheme.weight, Float):
            total += self._once(("weight", scheme.weight, basis), lambda: self._of_weight(form))
        if not isinstance(scheme.input, Float):
            ends = None if isinstance(scheme.output, Float) else scheme.output
            total += self._once(("input", scheme.input, ends, basis), lambda: self._of_input(form))
            if ends is not None:
                total += self._once(("output", scheme.input, ends, basis), lambda: self._of_output(form))
        return total

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]  # type: ignore[assignment]  # keys and types belong together
        return made

    def _of_weight(self, form: Form) -> float:
        gradient = self._once("by weight", self._by_weight)
        layer = self.rounded.layer(self.name, form)
        plain = layer.layer.weight
        if (basis := layer.balance) is not None:
            plain, by_weight = basis.weight(plain), gradient
            gradient = self._once(("by weight", form.basis), lambda: basis.by_weight(by_weight))
        return _dot(gradient, self.rounded.weight(self.name, form) - plain)

    def _by_weight(self) -> torch.Tensor:
        """Return the gradient with respect to the weight, in the layer's shape."""
        layer, g, x = self.rounded.module.get_submodule(self.name), self.call.by_y, self.call.x
        if isinstance(layer, nn.Linear):
            return g.flatten(0, -2).T @ x.flatten(0, -2) if g.dim() > 1 else torch.outer(g, x)
        assert isinstance(layer, Conv)  # only these types have forms
        padded = functional.pad(x, layer._reversed_padding_repeated_twice)
        if padded.dim() < layer.weight.dim():
            padded, g = padded[None], g[None]
        by_weight = _BY_WEIGHT[len(layer.stride)]
        return by_weight(padded, layer.weight.shape, g, layer.stride, 0, layer.dilation, layer.groups)

    def _of_input(self, form: Form) -> float:
        layer = self.rounded.layer(self.name, form)
        x = self._once(("x", form.basis), lambda: layer.balanced(self.call.x))
        return _dot(self._once(("by x", form.basis), lambda: self._by_input(layer)), layer.rounded_input(x) - x)

    def _by_input(self, layer: QuantizedLayer) -> torch.Tensor:
        by_x = self.call.by_x
        return by_x if layer.balance is None else layer.balance.by_input(by_x, channel_axis(layer.layer))

    def _of_output(self, form: Form) -> float:
        y = self.call.y
        assert y is not None  # a call records y if a form rounds it
        return _dot(self.call.by_y, self.rounded.layer(self.name, form).rounded_output(y) - y)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum())
