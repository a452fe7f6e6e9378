"""Watch modules while a model is called. No hook outlives its `with`, whatever is raised inside."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

V = TypeVar("V")


class PerTensor(Generic[V]):
    """Table of values by tensor. A tensor that was changed after its value was set has none. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, V]] = {}

    def get(self, x: torch.Tensor) -> V | None:
        """Return the value of a tensor, None for a tensor without one."""
        known = self._known.get(id(x))
        if known is None or known[0]() is not x or known[1] != x._version:  # a new tensor can have the id of an old one
            return None
        return known[2]

    def set(self, x: torch.Tensor, value: V) -> None:
        """Set the value of a tensor, which holds until the tensor is changed."""
        self._known[id(x)] = weakref.ref(x), x._version, value


class Copies:
    """Copies of tensors that a model may change later. Readers share one copy of a tensor until it is changed."""

    def __init__(self) -> None:
        self._made: PerTensor[torch.Tensor] = PerTensor()

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return a copy of the tensor's present values, without gradient."""
        copy = self._made.get(x)
        if copy is None:
            copy = x.detach().clone()
            self._made.set(x, copy)
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
