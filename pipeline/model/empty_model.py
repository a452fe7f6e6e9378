"""Makes a model of diffusers from its configuration without weights, and no larger than its weights can be.

A configuration of a few bytes can ask for more memory and time than there is. What it makes is counted while it is
made, before memory is taken, and held against the tensors that there are weights for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.model_files import ModelSize, blamed

ANY_MODEL = ModelSize(tensors=20_000, elements=10**11)
"""More than any model of diffusers has: the bound where there are no weights to compare with."""
CALLS_PER_TENSOR = 40
"""Calls of torch while a model is made, by tensor of its weights: 4 to 8 in models of diffusers."""
LEAST_CALLS = 20_000
TABLE = 1 << 23
"""Numbers in a table that every model may compute, such as one of positions."""
LARGEST_TABLE = 1 << 27
"""Numbers in one that only a model with as many weights may compute: SD3.5 has one of 9e7."""


def empty_model(kind: Any, config: Mapping[str, Any], size: ModelSize, origin: str) -> nn.Module:
    """Make a diffusers model of the class `kind` on torch's meta device; its buffers are computed.

    Raises RecipeError that names `origin` where the class does not take the configuration, or where the model has
    more than about twice `size`.
    """
    with blamed(origin), bounded(size, origin):
        module: nn.Module = kind.from_config(config)
    return module


@contextmanager
def bounded(size: ModelSize, origin: str) -> Iterator[None]:
    """Modules made in this thread have their parameters on the meta device. Raises as `empty_model` does."""
    import accelerate

    with accelerate.init_empty_weights(), _Bounded(size, origin):
        yield


class _Bounded(TorchFunctionMode):
    """Asks of every call of torch, on the meta device, how large its result will be, and then makes it."""

    def __init__(self, size: ModelSize, origin: str) -> None:
        super().__init__()
        self.size, self.origin = size, origin
        self._calls, self._elements = 0, 0
        self._most_calls = CALLS_PER_TENSOR * size.tensors + LEAST_CALLS
        self._most_elements = 2 * size.elements + TABLE
        self._most_computed = min(self._most_elements, LARGEST_TABLE)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        self._calls += 1
        if self._calls > self._most_calls:
            raise self._too_large("tensors", self.size.tensors)
        made = _made(func, args, given)
        if func is torch.empty:  # takes no memory before it is written to, as parameters never are
            self._elements += made
            if self._elements > self._most_elements:
                raise self._too_large("numbers", self.size.elements)
        elif made > self._most_computed:
            raise self._too_large("numbers", self.size.elements)
        return func(*args, **given)

    def _too_large(self, what: str, there: int) -> RecipeError:
        return RecipeError(
            f"model: {self.origin}: its configuration makes a model much larger than its weights, which have"
            f" {there:,} {what}: the two do not belong together: get the model again"
        )


def _made(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> int:
    """How many numbers the call's result will have; 0 where it takes no memory, or where only the call itself tells."""
    leaves = list(tree_iter((args, given)))
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    if (tensors and all(each.is_meta for each in tensors)) or any(
        isinstance(each, str | torch.device) and str(each) == "meta" for each in leaves
    ):
        return 0
    there, named = tree_map_only(torch.Tensor, lambda each: each.detach().to("meta"), (args, dict(given)))
    if named.get("device") is not None:
        named["device"] = "meta"
    try:
        with torch.device("meta"):
            made = func(*there, **named)
    except Exception:  # it needs values, or is wrong: the call itself says so
        return 0
    return max((each.numel() for each in tree_iter(made) if isinstance(each, torch.Tensor)), default=0)
