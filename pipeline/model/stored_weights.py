"""Fill a model with weights that stay in its files, so that no more than one of them is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MIB, printable
from intaglio.pipeline.stored_tensors import StoredTensor, read_tensor

if TYPE_CHECKING:
    from intaglio.pipeline.model.model_files import Weights

LEAST_BYTES = MIB
"""Size in bytes, in float32, from which on a tensor stays in its file: smaller ones, such as biases, are kept."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Types of weights that are read, as safetensors names them."""


def check_fit(module: nn.Module, weights: Weights, origin: str) -> None:
    """Raise RecipeError, which names `origin`, if the files are not those of the module.

    That is so if a weight has another shape than the module's, if it is no float, or if it belongs to a block after
    the last one of the module. Other weights whose names the module lacks are not compared: diffusers may know how to
    convert them.
    """
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    common = [(place, state[place.name]) for place in weights.places if place.name in state]
    other = [(place, tuple(tensor.shape)) for place, tensor in common if place.shape != tuple(tensor.shape)]
    whole = [place for place, tensor in common if tensor.is_floating_point() and place.dtype not in FLOATS]
    problems = []
    if other:
        place, shape = other[0]
        problems.append(
            f"model: {origin}: {len(other)} of {len(common)} weights have another shape than its config.json makes,"
            f" such as {printable(place.name)}: {place.shape} in {place.file.name}, {shape} by the configuration: the"
            " two do not belong together: download the model again"
        )
    if whole:
        problems.append(
            f"model: {origin}: {len(whole)} of {len(common)} weights are no floats, such as"
            f" {printable(whole[0].name)}: {whole[0].dtype} in {whole[0].file.name}: they are codes of a quantized"
            " model: name the full-precision model that was quantized"
        )
    if blocks := _blocks_beyond(module, (place.name for place in weights.places if place.name not in state)):
        name, (made, stored) = min(blocks.items())
        problems.append(
            f"model: {origin}: its config.json makes {made} blocks in {printable(name)}, and the files have weights of"
            f" {stored}: the two do not belong together: download the model again, or save the smaller model with"
            " save_pretrained"
        )
    if problems:
        raise RecipeError(*problems)


def _blocks_beyond(module: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return each list of modules of which `names` has later entries -> its length, and the length by the names."""
    beyond: dict[str, tuple[int, int]] = {}
    for name in names:
        parent, parts = module, name.split(".")
        for depth, part in enumerate(parts):
            if isinstance(parent, nn.ModuleList) and part.isdecimal() and int(part) >= len(parent):
                listed, number = ".".join(parts[:depth]), int(part) + 1
                beyond[listed] = len(parent), max(number, beyond.get(listed, (0, 0))[1])
            if (child := parent._modules.get(part)) is None:
                break
            parent = child
    return beyond


def fill_(module: nn.Module, weights: Weights) -> bool:
    """Give a module on the meta device its weights in float32; larger ones are read each time that they are used.

    Returns False, and changes nothing, if the files do not have exactly one tensor for each of the module's, under the
    same name and in the same shape: then only diffusers knows how to convert them.
    """
    state: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    if not _matches(state, weights):
        return False
    for name, path, _, _ in weights.places:
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


def stored_count(module: nn.Module, weights: Weights) -> int:
    """Return how many parameters of a module on the meta device `fill_` leaves in their files."""
    if not _matches(module.state_dict(keep_vars=True), weights):
        return 0
    return sum(parameter.numel() for parameter in module.parameters() if _stays(parameter))


def _matches(state: Mapping[str, torch.Tensor], weights: Weights) -> bool:
    """Return True if the files have exactly one tensor for each of these, under the same name and in the same shape."""
    shapes = {place.name: place.shape for place in weights.places}
    shared = len({id(tensor) for tensor in state.values()}) < len(state)
    return not shared and all(shapes.get(name) == tuple(tensor.shape) for name, tensor in state.items())


def _stays(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and 4 * tensor.numel() >= LEAST_BYTES


def _placed(empty: torch.Tensor, path: Path, name: str, inside: Path) -> torch.Tensor:
    """Return the tensor of a file that takes the place of an empty one."""

    def read() -> torch.Tensor:
        tensor = read_tensor(path, name, inside=inside)
        return tensor.float() if tensor.is_floating_point() else tensor

    if _stays(empty):
        return StoredTensor(empty.shape, torch.float32, read)
    return read()
