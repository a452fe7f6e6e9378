"""Fill a model with weights that stay in its files, so that no more than one of them is in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from intaglio.pipeline.files import MIB
from intaglio.pipeline.stored_tensors import StoredTensor, read_tensor

if TYPE_CHECKING:
    from intaglio.pipeline.model.model_files import Weights

LEAST_BYTES = MIB
"""Size in bytes, in float32, from which on a tensor stays in its file: smaller ones, such as biases, are kept."""


def fill_(module: nn.Module, weights: Weights) -> bool:
    """Give a module on the meta device its weights in float32; larger ones are read each time that they are used.

    Returns False, and changes nothing, if the files do not have exactly one tensor for each of the module's, under the
    same name and in the same shape: then only diffusers knows how to convert them.
    """
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    shapes = {name: shape for name, _, shape in weights.places}
    shared = len({id(tensor) for tensor in state.values()}) < len(state)
    if shared or len(shapes) < len(weights.places) or any(shapes.get(n) != tuple(t.shape) for n, t in state.items()):
        return False
    for name, path, _ in weights.places:
        if name not in state:
            continue
        owner, _, key = name.rpartition(".")
        part, tensor = module.get_submodule(owner), _placed(state[name], path, name, weights.inside)
        if key in part._buffers:
            setattr(part, key, tensor)
        elif isinstance(tensor, StoredTensor):
            setattr(part, key, tensor.as_parameter())
        else:
            setattr(part, key, nn.Parameter(tensor, requires_grad=False))
    return True


def _placed(empty: torch.Tensor, path: Path, name: str, inside: Path) -> torch.Tensor:
    """Return the tensor of a file that takes the place of an empty one."""

    def read() -> torch.Tensor:
        tensor = read_tensor(path, name, inside=inside)
        return tensor.float() if tensor.is_floating_point() else tensor

    if empty.is_floating_point() and 4 * empty.numel() >= LEAST_BYTES:
        return StoredTensor(empty.shape, torch.float32, read)
    return read()
