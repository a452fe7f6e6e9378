"""Find the blocks of a denoiser: the members of its module lists, such as transformer blocks and UNet stages."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.step_clock import StepClock


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost members of module lists, by module path, in the model's order."""
    from torch import nn

    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found |= {f"{name}.{index}": block for index, block in child.named_children()}
        else:
            found |= {f"{name}.{inner}": block for inner, block in find_blocks(child).items()}
    return found


def find_units(module: nn.Module) -> dict[str, nn.Module]:
    """Split the model into units, in order: each member of a module list, and each other module without a list."""
    from torch import nn

    found: dict[str, nn.Module] = {}

    def cut(name: str, part: nn.Module, listed: bool) -> None:
        container = isinstance(part, nn.ModuleList | nn.ModuleDict)
        if not container and (listed or not any(isinstance(inner, nn.ModuleList) for inner in part.modules())):
            found[name] = part
            return
        for child_name, child in part.named_children():
            cut(f"{name}.{child_name}" if name else child_name, child, container)

    for name, child in module.named_children():
        cut(name, child, False)
    return found


@contextlib.contextmanager
def recomputed(blocks: Iterable[nn.Module], clock: StepClock) -> Iterator[None]:
    """Compute the activations in these blocks again in the backward pass, instead of keeping them (Chen et al. 2016).

    They are computed again at the denoising step of the forward pass, so the clock must have a step during that pass.
    """
    from torch.utils.checkpoint import checkpoint

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), clock.at(clock.step)

    changed = list(blocks)
    for block in changed:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in changed:
            del block.forward  # the method of the class takes its place
