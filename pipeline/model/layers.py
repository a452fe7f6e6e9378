"""List the layers of a model that can be quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.model.prepared import own_forward

if TYPE_CHECKING:
    from torch import nn


def layer_table(module: nn.Module) -> tuple[Layer, ...]:
    """List every Linear and every ungrouped Conv1d, Conv2d and Conv3d, in the model's order.

    A module that is registered several times has its first name.
    `unquantizable` names the layers with weights that are not in the table.
    """
    from torch import nn

    layers = []
    for name, child in module.named_modules():
        if own_forward(child) or (isinstance(child, nn.Linear) and not child.weight.numel()):
            continue
        match child:
            case nn.Linear():
                layers.append(
                    Layer(name=name, op="linear", shape=tuple(child.weight.shape), bias=child.bias is not None)
                )
            case (
                nn.Conv1d(groups=1, padding_mode="zeros")
                | nn.Conv2d(groups=1, padding_mode="zeros")
                | nn.Conv3d(groups=1, padding_mode="zeros")
            ):
                padded = any(child._reversed_padding_repeated_twice)
                shape, bias = tuple(child.weight.shape), child.bias is not None
                layers.append(Layer(name=name, op="conv", shape=shape, bias=bias, padded=padded))
    return tuple(layers)
