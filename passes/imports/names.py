"""Rename the tensors of a file in a model's original layout as its diffusers module does, and move their rows.

Shapes: N rows of a weight, which are its out features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from intaglio.passes.imports.imported import some
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, printable
from intaglio.pipeline.model.lora_formats import quiet_diffusers

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes before the names of a denoiser in files that may hold a whole pipeline."""
WEIGHT = ".weight"
LARGE = re.compile(r"\d{5}")
"""Number in a name that is too large: a conversion would count up to it, block by block."""
Held = TypeVar("Held")


@dataclass(frozen=True)
class Stored:
    """A rounded weight as a file holds it: tensors with one entry for each row, (N, ...).

    `facts` hold for all rows; weights are joined into one layer only if their facts are equal.
    """

    rows: Mapping[str, torch.Tensor]
    facts: Any = None

    def __len__(self) -> int:
        return min((len(value) for value in self.rows.values()), default=0)


def denoiser_only(tensors: Mapping[str, Held]) -> dict[str, Held]:
    """Return the denoiser's tensors, under names without a prefix; text encoders and autoencoders are left out."""
    prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in tensors)), "")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def in_names_of(
    module: nn.Module, weights: Mapping[str, Stored], rest: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Stored], dict[str, torch.Tensor]]:
    """Return rounded weights, by layer, and all other tensors under the module's own names.

    If at least half of the names are the module's, all names stay. Otherwise the function that `from_single_file` of
    diffusers uses converts them. It is given the numbers of rows in place of rounded weights: where it puts a number,
    that row of the file belongs, even if the file has several layers in one weight.
    Raises RecipeError if diffusers has no conversion for the module, or if the conversion fails.
    """
    import torch

    named = rest.keys() | {f"{name}{WEIGHT}" for name in weights}
    if 2 * len(named & module.state_dict().keys()) >= len(named):
        return dict(weights), dict(rest)
    if large := [name for name in named if LARGE.search(name)]:
        raise RecipeError(f"{some(large)}: has a number of five digits or more, which no block of a model has")
    if numbers := [name for name, value in rest.items() if value.dtype == torch.int64]:
        raise RecipeError(f"{some(numbers)}: in int64, which cannot be converted to the names of diffusers")
    convert, first, places = _conversion(module, [*weights, *rest]), 0, {}
    given = dict(rest)
    for name, stored in weights.items():
        given[f"{name}{WEIGHT}"] = torch.arange(first, first + len(stored)).reshape(-1, 1)
        places[first] = name
        first += len(stored)
    try:
        with quiet_diffusers():
            converted = convert(checkpoint=given, config=dict(getattr(module, "config", {})))
    except (*DAMAGE, AssertionError, NameError, RuntimeError) as error:
        said = printable(f"{type(error).__name__}: {error}")[:200]
        raise RecipeError(
            f"its names are not those of the {type(module).__name__}, and diffusers cannot convert them: {said}"
        ) from error
    moved = {name: value for name, value in converted.items() if value.dtype == torch.int64}
    starts, names = torch.tensor([*places]), list(places.values())
    found = {
        name.removesuffix(WEIGHT): _gathered(name, ids.flatten(), starts, [weights[each] for each in names])
        for name, ids in moved.items()
    }
    return found, {name: value for name, value in converted.items() if name not in moved}


def _conversion(module: nn.Module, names: list[str]) -> Callable[..., dict[str, Any]]:
    """Return diffusers' conversion of a checkpoint for the module's class."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    classes = [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES]
    if not classes:
        raise RecipeError(
            f"its names ({some(names)}) are not those of the {type(module).__name__}, and diffusers has no conversion"
            " of single files for it: save the weights under the names of the diffusers model"
        )
    found: Callable[..., dict[str, Any]] = SINGLE_FILE_LOADABLE_CLASSES[classes[0]]["checkpoint_mapping_fn"]
    return found


def _gathered(name: str, ids: torch.Tensor, starts: torch.Tensor, stored: list[Stored]) -> Stored:
    """Return the rows with the numbers `ids`; `starts` are the numbers of each stored weight's first row."""
    import torch

    owners = torch.searchsorted(starts, ids, right=True) - 1
    sources = {owner: stored[owner] for owner in dict.fromkeys(owners.tolist())}
    first = next(iter(sources.values()))
    forms = {(each.facts, *((n, v.dtype, v.shape[1:]) for n, v in each.rows.items())) for each in sources.values()}
    if len(forms) != 1:
        raise RecipeError(f"{printable(name)[:120]} joins weights in different formats, which cannot be one layer")
    rows = {part: value.new_empty(len(ids), *value.shape[1:]) for part, value in first.rows.items()}
    for owner, whole in sources.items():
        here = owners == owner
        for part, value in whole.rows.items():
            rows[part][here] = value[ids[here] - starts[owner]]
    return Stored(rows, first.facts)
