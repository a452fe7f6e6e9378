"""Watch modules while a model is called, or replay them. No hook outlives its `with`, whatever is raised inside."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
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


@contextlib.contextmanager
def replayed(modules: Mapping[str, nn.Module], returned: Mapping[str, Sequence[object]]) -> Iterator[None]:
    """Make modules return recorded outputs, call by call, in the one call inside the context.

    `returned` has the outputs of some of these modules, by name.
    """
    changed: list[tuple[nn.Module, Callable[..., object] | None]] = []
    try:
        for name, outputs in returned.items():
            part = modules[name]
            changed.append((part, vars(part).get("forward")))
            calls = iter(outputs)
            part.forward = lambda *_, calls=calls, **__: copied(next(calls))
        yield
    finally:
        for part, own in changed:
            if own is None:
                del part.forward  # the method of the class takes its place
            else:
                part.forward = own


def copied(output: T) -> T:
    """Return the output with copies of its tensors: the model may write into a module's output later."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, torch.clone, output)  # type: ignore[no-any-return]  # torch's pytree has no types
