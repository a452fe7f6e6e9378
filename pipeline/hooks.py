"""Looks at what enters modules while a model is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def before_calls(modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """`note` gets the name and the arguments of each of these modules whenever it is called."""

    def hook(_: nn.Module, args: tuple[Any, ...], name: str) -> None:
        note(name, args)

    hooks = [module.register_forward_pre_hook(partial(hook, name=name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
