"""Record what modules return in a call of a model, and replay it: they return their recorded outputs.

The model's own code runs as it is, so that residuals, skips and conditions need no rule of their own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils._pytree import tree_iter, tree_map_only

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@dataclass
class RecordedCall:
    """Record of one call: when each module first began and last ended, outputs of the kept modules, and the output."""

    began: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    returned: dict[str, list[object]] = field(default_factory=dict)
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def size_bytes(self) -> int:
        """Size in bytes of the kept outputs."""
        tensors = (leaf for leaf in tree_iter(self.returned) if isinstance(leaf, torch.Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Over(Exception):
    """The last module to record has ended: the rest of the model need not be computed."""


def record(
    modules: Mapping[str, nn.Module],
    call: Callable[[], torch.Tensor],
    kept: Collection[str],
    until: str | None = None,
) -> RecordedCall:
    """Record `call`, which calls these modules; `kept` names those whose outputs are kept.

    If `until` is given, the call stops when that module ends, and the recording has no output.
    """
    recording, ticks = RecordedCall(), itertools.count()

    def begin(_: nn.Module, __: object, name: str) -> None:
        recording.began.setdefault(name, next(ticks))

    def end(_: nn.Module, __: object, output: object, name: str) -> None:
        recording.ended[name] = next(ticks)
        if name in kept:
            recording.returned.setdefault(name, []).append(_copied(output))
        if name == until:
            raise _Over

    with contextlib.ExitStack() as hooks:
        for name, part in modules.items():
            hooks.enter_context(part.register_forward_pre_hook(partial(begin, name=name)))
            hooks.enter_context(part.register_forward_hook(partial(end, name=name)))
        with contextlib.suppress(_Over):
            recording.output = call()
    return recording


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
            part.forward = lambda *_, calls=calls, **__: _copied(next(calls))
        yield
    finally:
        for part, own in changed:
            if own is None:
                del part.forward  # the method of the class takes its place
            else:
                part.forward = own


def _copied(output: T) -> T:
    """Return the output with copies of its tensors: the model may write into a module's output later."""
    return tree_map_only(torch.Tensor, torch.clone, output)  # type: ignore[no-any-return]  # torch's pytree has no types
