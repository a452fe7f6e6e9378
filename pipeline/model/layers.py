"""List the layers of a model that can be quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.model.prepared import own_forward

if TYPE_CHECKING:
    from torch import nn


def layer_table(module: nn.Module) -> tuple[Layer, ...]:
    """List every Linear and every Conv1d, Conv2d and Conv3d, in the model's order.

    A module that is registered several times has its first name.
    `unquantizable` names the layers with weights that are not in the table.
    """
    from torch import nn

    layers = []
    for name, child in module.named_modules():
        if own_forward(child):
            continue
        match child:
            case nn.Linear() if child.weight.numel():
                layers.append(
                    Layer(name=name, op="linear", shape=tuple(child.weight.shape), bias=child.bias is not None)
                )
            case (
                nn.Conv1d(padding_mode="zeros") | nn.Conv2d(padding_mode="zeros") | nn.Conv3d(padding_mode="zeros")
            ) if child.weight.numel():
                padded = any(child._reversed_padding_repeated_twice)
                shape, bias = tuple(child.weight.shape), child.bias is not None
                layers.append(Layer(name=name, op="conv", shape=shape, bias=bias, padded=padded, groups=child.groups))
    return tuple(layers)
