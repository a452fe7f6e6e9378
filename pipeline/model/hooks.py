"""Watch modules while a model is called. No hook outlives its `with`, whatever is raised inside."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class Copies:
    """Copies of tensors that a model may change later, one for each tensor as it is: its readers share a copy."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return a copy of the tensor's present values, without gradient."""
        source, version, copy = self._known.get(id(x), (None, 0, None))
        if copy is None or source is None or source() is not x or version != x._version:
            copy = x.detach().clone()
            self._known[id(x)] = weakref.ref(x), x._version, copy
        return copy


@contextlib.contextmanager
def before_calls(modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Call `note` before each call of a module, with its name and its arguments, positional ones first.

    The first argument becomes what `note` returns, if that is not None.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        if (first := note(name, (*args, *kwargs.values()))) is None:
            return None
        if args:
            return (first, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): first}

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name=name), with_kwargs=True))
        yield


@contextlib.contextmanager
def after_calls(modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """Call `note` after each call of a module, with its name, its arguments and its output.

    The output becomes what `note` returns, if that is not None.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str) -> Any:
        return note(name, (*args, *kwargs.values()), output)

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name=name), with_kwargs=True))
        yield
