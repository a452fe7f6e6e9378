"""Name the classes of torch's layers that can be quantized."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
LayerModule: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
