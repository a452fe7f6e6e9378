"""Calls a denoiser again from where one layer begins: modules that were done before return what they returned then.

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
from torch.utils._pytree import tree_iter, tree_map

from intaglio.pipeline.model.blocks import find_units

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.types import Denoise, Inputs

T = TypeVar("T")


@dataclass
class Recording:
    """One call: when each module first began and last ended, what those of interest returned, and the output."""

    began: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    returned: dict[str, list[object]] = field(default_factory=dict)
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def size_bytes(self) -> int:
        """Of what the modules returned."""
        tensors = (leaf for leaf in tree_iter(self.returned) if isinstance(leaf, torch.Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Over(Exception):
    """The last module of interest has ended: what comes after it need not be computed."""


def record(
    module: nn.Module, call: Callable[[], torch.Tensor], kept: Collection[str], until: str | None = None
) -> Recording:
    """Of `call`, which calls the module; `kept` names the modules whose outputs are of interest.

    It ends with the module `until`, without an output, if one is named.
    """
    recording, ticks = Recording(), itertools.count()

    def begin(_: nn.Module, __: object, name: str) -> None:
        recording.began.setdefault(name, next(ticks))

    def end(_: nn.Module, __: object, output: object, name: str) -> None:
        recording.ended[name] = next(ticks)
        if name in kept:
            recording.returned.setdefault(name, []).append(_copied(output))
        if name == until:
            raise _Over

    with contextlib.ExitStack() as hooks:
        for name, part in module.named_modules():
            hooks.enter_context(part.register_forward_pre_hook(partial(begin, name=name)))
            hooks.enter_context(part.register_forward_hook(partial(end, name=name)))
        with contextlib.suppress(_Over):
            recording.output = call()
    return recording


@contextlib.contextmanager
def replayed(module: nn.Module, returned: Mapping[str, Sequence[object]]) -> Iterator[None]:
    """In the one call inside, these modules compute nothing and return what they returned, call by call."""
    changed: list[tuple[nn.Module, Callable[..., object] | None]] = []
    try:
        for name, outputs in returned.items():
            part = module.get_submodule(name)
            changed.append((part, vars(part).get("forward")))
            calls = iter(outputs)
            part.forward = lambda *_, calls=calls, **__: _copied(next(calls))
        yield
    finally:
        for part, own in changed:
            if own is None:
                del part.forward  # the class's own is behind it
            else:
                part.forward = own


class Replay:
    """Calls with one layer changed, computed from that layer on. Equal, bit for bit, to calls of the whole model.

    Two levels: outputs of units (blocks) are kept as long as this object lives, those of the modules inside one unit
    while `unit` is open. In full precision a replayed call has to repeat the recorded output; where it does not, as
    with modules that act on more than what they return, that unit's layers are computed whole.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, denoise: Denoise, inputs: Inputs, *, reuse: bool = True) -> None:
        """Makes the recorded call. Without `reuse` every call computes all."""
        self.module, self.denoise, self.inputs, self.reuse = module, denoise, inputs, reuse
        self.units = find_units(module)
        self.whole = record(module, partial(denoise, inputs), self.units if reuse else ())
        self._inner: dict[str, list[object]] = {}
        self._unit = ""

    @property
    def output(self) -> torch.Tensor:
        """Of the recorded call."""
        return self.whole.output

    @contextlib.contextmanager
    def unit(self, name: str, layers: Sequence[str], *, check: bool = True) -> Iterator[bool]:
        """For these layers of a unit. Yields whether anything is replayed.

        Without `check` the replayed call ends with the unit, and is taken to repeat the recorded one.
        """
        known = [layer for layer in layers if layer in self.whole.began]
        if not (self.reuse and known):
            yield False
            return
        kept = {inner for layer in known for inner in self._inside(name, layer)}
        before = self._before(min(known, key=self.whole.began.__getitem__), name)
        with torch.no_grad(), replayed(self.module, before):
            again = record(self.module, partial(self.denoise, self.inputs), kept, None if check else name)
        exact = not check or torch.equal(again.output, self.output)
        self._unit, self._inner = (name, again.returned) if exact else ("", {})
        try:
            yield exact
        finally:
            self._unit, self._inner = "", {}

    @torch.no_grad()
    def call(self, layer: str) -> torch.Tensor:
        """The output with the layer as it is now, all else being as it was recorded."""
        if not self._unit or layer not in self.whole.began:
            return self.denoise(self.inputs)
        inside = {name: self._inner[name] for name in self._inside(self._unit, layer) if name in self._inner}
        with replayed(self.module, self._before(layer, self._unit) | inside):
            return self.denoise(self.inputs)

    def _done(self, name: str, layer: str) -> bool:
        """Whether all calls of a module were over when the layer was first called."""
        return self.whole.ended.get(name, self.whole.began[layer]) < self.whole.began[layer]

    def _before(self, layer: str, unit: str) -> dict[str, list[object]]:
        return {n: outputs for n, outputs in self.whole.returned.items() if n != unit and self._done(n, layer)}

    def _inside(self, unit: str, layer: str) -> list[str]:
        """The outermost modules inside the unit that were done before the layer."""

        def outermost(name: str, part: nn.Module) -> Iterator[str]:
            for child_name, child in part.named_children():
                path = f"{name}.{child_name}"
                if self._done(path, layer):
                    yield path
                else:
                    yield from outermost(path, child)

        return list(outermost(unit, self.units[unit]))


def _copied(output: T) -> T:
    """With tensors of its own: a model may go on to write into what a module returned."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)  # type: ignore[no-any-return]  # torch's pytree has no types
