"""Repeat a call of a denoiser from one layer on: modules that ended before it return their recorded outputs.

The model's own code runs as it is, so that residuals, skips and conditions need no rule of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.blocks import find_units
from intaglio.pipeline.model.recorded_call import record, replayed

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.types import Denoise, Inputs


class Replay:
    """Repeat a call with one layer changed, computed from that layer on; the result equals that of the whole model.

    The results are equal bit for bit. Outputs of units (blocks) are kept as long as this object lives, and those of the
    modules inside one unit while `unit` is open. In full precision a replayed call must repeat the recorded output. If
    it does not, as with modules that have side effects, the whole model is computed for the layers of that unit.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, denoise: Denoise, inputs: Inputs, *, reuse: bool = True) -> None:
        """Make the recorded call. Without `reuse` every call computes the whole model."""
        self.module, self.denoise, self.inputs, self.reuse = module, denoise, inputs, reuse
        self.modules = dict(module.named_modules())
        self.units = find_units(module)
        self.whole = record(self.modules, partial(denoise, inputs), self.units if reuse else ())
        self._inner: dict[str, list[object]] = {}
        self._unit = ""

    @property
    def output(self) -> torch.Tensor:
        """Output of the recorded call."""
        return self.whole.output

    @contextlib.contextmanager
    def unit(self, name: str, layers: Sequence[str], *, check: bool = True) -> Iterator[bool]:
        """Prepare `call` for these layers of a unit. Yields True if their calls reuse recorded outputs.

        Without `check` the replayed call stops at the end of the unit, and is assumed to repeat the recorded one.
        """
        known = [layer for layer in layers if layer in self.whole.began]
        if not (self.reuse and known):
            yield False
            return
        kept = {inner for layer in known for inner in self._inside(name, layer)}
        before = self._before(min(known, key=self.whole.began.__getitem__), name)
        with torch.no_grad(), replayed(self.modules, before):
            again = record(self.modules, partial(self.denoise, self.inputs), kept, None if check else name)
        exact = not check or torch.equal(again.output, self.output)
        self._unit, self._inner = (name, again.returned) if exact else ("", {})
        try:
            yield exact
        finally:
            self._unit, self._inner = "", {}

    @torch.no_grad()
    def call(self, layer: str) -> torch.Tensor:
        """Return the output with the layer as it is now, and everything else as recorded."""
        if not self._unit or layer not in self.whole.began:
            return self.denoise(self.inputs)
        inside = {name: self._inner[name] for name in self._inside(self._unit, layer) if name in self._inner}
        with replayed(self.modules, self._before(layer, self._unit) | inside):
            return self.denoise(self.inputs)

    def _done(self, name: str, layer: str) -> bool:
        """Return True if all calls of a module ended before the layer was first called."""
        return self.whole.ended.get(name, self.whole.began[layer]) < self.whole.began[layer]

    def _before(self, layer: str, unit: str) -> dict[str, list[object]]:
        return {n: outputs for n, outputs in self.whole.returned.items() if n != unit and self._done(n, layer)}

    def _inside(self, unit: str, layer: str) -> list[str]:
        """Return the outermost modules inside the unit that ended before the layer began."""

        def outermost(name: str, part: nn.Module) -> Iterator[str]:
            for child_name, child in part.named_children():
                path = f"{name}.{child_name}"
                if self._done(path, layer):
                    yield path
                else:
                    yield from outermost(path, child)

        return list(outermost(unit, self.units[unit]))
