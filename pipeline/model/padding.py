"""Split a convolution with unusual padding into the padding and a convolution without padding.

The graph pads the tensor in front of such a convolution, so its input is the padded tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from intaglio.pipeline.model.layer_types import Conv


class PaddedConv(nn.Module):
    """The padding of a convolution, and the convolution. `split_padding_` makes it from a convolution of torch."""

    conv: Conv
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the convolution, for code that reads it instead of calling the module."""
        return self.conv.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the convolution, or None."""
        return self.conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (B, N, ...) for x (B, C, ...)."""
        if any(around := self._reversed_padding_repeated_twice):
            x = F.pad(x, around, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        y: torch.Tensor = self.conv(x)
        return y


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def split_padding_(module: nn.Module) -> tuple[str, ...]:
    """Split convolutions unless both sides are padded with equally many zeros. Changes `module`; returns their names.

    Such convolutions pad with values of the tensor (`padding_mode` circular, reflect or replicate), or with
    `padding="same"` around a kernel of an even size. Subclasses stay as they are.
    """
    found = {name: part for name, part in module.named_modules() if type(part) in CONVOLUTIONS and _is_split(part)}
    for part in found.values():
        _split_(part)
    return tuple(found)


def _is_split(part: Any) -> bool:  # torch's classes do not tell the type of this attribute
    around: list[int] = part._reversed_padding_repeated_twice
    equal = around[::2] == around[1::2]
    return part.padding_mode != "zeros" or not equal


def _split_(part: Any) -> None:
    """Change torch's module into a PaddedConv, in its place."""
    weight, bias = part._parameters.pop("weight"), part._parameters.pop("bias")
    shape = part.in_channels, part.out_channels, part.kernel_size, part.stride
    conv = type(part)(*shape, dilation=part.dilation, groups=part.groups, bias=bias is not None, device="meta")
    conv.weight, conv.bias = weight, bias
    part.__class__ = PaddedConv
    part.register_module("conv", conv.train(part.training))
