"""Replace the user's own layer classes by layers of torch where both compute the same.

Examples are a linear layer written as `x @ self.weight.T`, a convolution whose weight is standardized in each call, and
layers whose weight is scaled to its number of inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from intaglio.pipeline.model.layer_types import Conv, LayerModule
from intaglio.pipeline.model.prepared import own_forward
from intaglio.pipeline.numerics.quality import rel_l2

SAME = 1e-5
"""Relative L2 distance up to which the layer of torch computes the same: the order of float32 sums."""
PLACES = 9
"""Size of each axis of the noise that a convolution is called with; larger for larger kernels."""
_CONV: Mapping[int, Callable[..., Conv]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CONVOLVE = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d}
_MULTIPLY = {torch.matmul, torch.mm, torch.addmm, torch.einsum, F.linear}
_MULTIPLY |= {torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}
_SETTINGS = ("stride", "padding", "dilation", "groups")
"""Settings of a convolution, in the order in which torch's functions take them after the bias."""


def plain_layers_(module: nn.Module) -> tuple[str, ...]:
    """Replace own layers by those of torch that compute the same. Changes `module`; returns the names of these layers.

    An own layer has a weight and no modules, takes one tensor, and computes one matrix multiplication or convolution.
    It is called with noise. The layer of torch gets the weight that was multiplied by, and takes the place of the own
    layer if it computes the same for other noise. Layers with hooks stay as they are.
    """
    found = []
    for name, part in module.named_modules():
        if _may_be_layer(part) and (layer := _layer_of(part)) is not None:
            kept = {key: value for key, value in vars(part).items() if key not in vars(layer)}
            part.__class__ = type(layer)
            part.__dict__ = kept | vars(layer)
            found.append(name)
    return tuple(found)


def _may_be_layer(part: nn.Module) -> bool:
    weight = part._parameters.get("weight")
    if weight is None or weight.dim() < 2 or not weight.numel() or part._modules:
        return False
    if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
        return False
    if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return own_forward(part) and _takes_one(part)
    return not type(part).__module__.startswith("torch.") and _takes_one(part)


def _takes_one(part: nn.Module) -> bool:
    """Return True if `forward` has one parameter besides `self`: calls with more would fail after the replacement."""
    parameters = list(inspect.signature(type(part).forward).parameters.values())
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@torch.no_grad()
def _layer_of(part: nn.Module) -> LayerModule | None:
    """Return a layer of torch that computes what an own layer does; None if there is none."""
    generator = torch.Generator().manual_seed(0)
    for shape in _shapes(part):
        products = _Products()
        try:
            with products:
                part(torch.randn(2, *shape, generator=generator))
            of_zeros = part(torch.zeros(1, *shape))[0]
            found = [layer for layer in _candidates(products.seen, of_zeros) if _agree(part, layer, shape, generator)]
        except Exception:  # the module's own code runs, and the shape may not be its own
            continue
        if found:
            return found[0]
    return None


def _agree(part: nn.Module, layer: LayerModule, shape: Sequence[int], generator: torch.Generator) -> bool:
    """Return True if both compute the same for noise of other sizes and of three times the magnitude."""
    more = (2, 5, *shape) if isinstance(layer, nn.Linear) else (2, shape[0], *(size + 2 for size in shape[1:]))
    for noise in (3 * torch.randn(*sizes, generator=generator) for sizes in ((3, *shape), more)):
        expected, found = part(noise), layer(noise)
        if found.shape != expected.shape or not rel_l2(found, expected) < SAME:
            return False
    return True


def _shapes(part: nn.Module) -> Iterator[Sequence[int]]:
    """Yield shapes of one row that the layer may take."""
    weight = part._parameters["weight"]
    assert weight is not None  # `_may_be_layer` checked it
    if weight.dim() == 2:
        yield from ((size,) for size in dict.fromkeys((weight.shape[1], weight.shape[0])))
    elif weight.dim() in _CONV:
        groups = getattr(part, "groups", 1) if isinstance(part, _ConvNd) else 1
        yield weight.shape[1] * groups, *(max(PLACES, 3 * size) for size in weight.shape[2:])


class _Products(TorchFunctionMode):
    """Notes the products that are computed with torch, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CONVOLVE or func in _MULTIPLY:
            self.seen.append((func, tuple(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _candidates(seen: Sequence[Any], of_zeros: torch.Tensor) -> Iterator[LayerModule]:
    """If there was one product, yield layers of torch with its weight, and with the output for zeros as their bias."""
    if len(seen) != 1:
        return
    func, args, given = seen[0]
    if func in _CONVOLVE:
        how = dict(zip(_SETTINGS, args[3:], strict=False)) | {name: given[name] for name in _SETTINGS if name in given}
        bias = of_zeros.flatten(1)[:, of_zeros[0].numel() // 2]  # in the middle, away from the padding
        yield _convolution(args[1], bias, how)
        return
    operands = args[1] if func is torch.einsum and isinstance(args[1], list | tuple) else args
    weight = operands[1] if func is F.linear else operands[-1]
    for turned in (weight, weight.mT):
        layer = nn.Linear(turned.shape[1], turned.shape[0], bias=bool(of_zeros.any()), device="meta")
        if len(of_zeros) == len(turned):
            yield _filled(layer, turned, of_zeros)


def _convolution(weight: torch.Tensor, bias: torch.Tensor, how: dict[str, Any]) -> LayerModule:
    inputs, outputs = weight.shape[1] * how.get("groups", 1), weight.shape[0]
    kind, kernel = _CONV[weight.dim()], tuple(weight.shape[2:])
    return _filled(kind(inputs, outputs, kernel, bias=bool(bias.any()), device="meta", **how), weight, bias)


def _filled(layer: LayerModule, weight: torch.Tensor, bias: torch.Tensor) -> LayerModule:
    layer.weight = nn.Parameter(weight.detach().clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.eval()
