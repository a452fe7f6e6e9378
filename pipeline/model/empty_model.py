"""Make a diffusers model from its configuration, without weights and within a bound on its size.

A configuration of a few bytes can ask for more memory and time than there is. Its tensors are counted before their
memory is allocated, and compared with the tensors that the weight files hold.
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
"""Larger than any model of diffusers: the bound for a model without weight files."""
CALLS_PER_TENSOR = 40
"""Largest number of torch calls per weight tensor while a model is made; diffusers models need 4 to 8."""
LEAST_CALLS = 20_000
TABLE = 1 << 23
"""Largest number of values in a table that any model may compute, such as positions."""
LARGEST_TABLE = 1 << 27
"""Largest table for a model with at least as many weights: SD3.5 has one of 9e7 values."""


def empty_model(kind: Any, config: Mapping[str, Any], size: ModelSize, origin: str) -> nn.Module:
    """Make a diffusers model of the class `kind` on torch's meta device; its buffers are computed.

    Raises RecipeError, which names `origin`, if the class does not accept the configuration or if the model has more
    than about twice `size`.
    """
    with blamed(origin), bounded(size, origin):
        module: nn.Module = kind.from_config(config)
    return module


@contextmanager
def bounded(size: ModelSize, origin: str) -> Iterator[None]:
    """Put the parameters of modules made in this thread on the meta device. Raises as `empty_model` does."""
    import accelerate

    with accelerate.init_empty_weights(), _Bounded(size, origin):
        yield


class _Bounded(TorchFunctionMode):
    """Compute the result size of every torch call on the meta device before the call is made."""

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
        if func is torch.empty:  # an empty tensor takes no memory until it is written, and parameters are not
            self._elements += made
            if self._elements > self._most_elements:
                raise self._too_large("numbers", self.size.elements)
        elif made > self._most_computed:
            raise self._too_large("numbers", self.size.elements)
        return func(*args, **given)

    def _too_large(self, what: str, there: int) -> RecipeError:
        return RecipeError(
            f"model: {self.origin}: its configuration makes a model much larger than its weights, which have"
            f" {there:,} {what}: the two do not belong together: download the model again"
        )


def _made(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> int:
    """Return the number of values in the call's result; 0 if it takes no memory or its size is unknown."""
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
    except Exception:  # the function needs values or fails: then the call itself raises
        return 0
    return max((each.numel() for each in tree_iter(made) if isinstance(each, torch.Tensor)), default=0)
