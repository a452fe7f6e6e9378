"""Estimate the memory that a run needs, and measure the memory that each step takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.machine import machine_bytes

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.contract.pass_base import Pass
    from intaglio.pipeline.model.checkpoint import Checkpoint

PER_PARAMETER = 4 * 1.2
"""Bytes per float32 parameter that the largest steps hold; `samples/benchmarks/full_size.py` measures them."""
PER_LAYER = 4 * 4
"""Bytes per parameter of the largest tensor that a step holds where weights stay in their files: the tensor as it is
read, and what is computed from it."""
PER_BLOCK = 4 * 9
"""Bytes per parameter of the largest block that a step holds which trains one block at a time."""
INTERPRETER = 500_000_000
"""Bytes that Python needs with torch and ONNX Runtime."""
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def least_bytes(parameters: int) -> int:
    """Return the least memory in bytes that training a denoiser of this size and measuring its layers need."""
    return INTERPRETER + int(PER_PARAMETER * parameters)


def least_stored_bytes(largest: int) -> int:
    """Return the least memory in bytes for steps that read one weight at a time; `largest` has so many parameters."""
    return INTERPRETER + PER_LAYER * largest


class WeightSizes(NamedTuple):
    """Numbers of values: of all weights, of the largest block and of the largest weight."""

    whole: int
    block: int
    largest: int

    @classmethod
    def of(cls, module: nn.Module) -> WeightSizes:
        """Count the weights of a module, which may be on the meta device."""
        from intaglio.pipeline.model.blocks import find_blocks

        def values(part: nn.Module) -> list[int]:
            return [parameter.numel() for parameter in part.parameters()]

        blocks = [sum(values(block)) for block in find_blocks(module).values()]
        return cls(sum(values(module)), max(blocks, default=0), max(values(module), default=0))


def held_bytes(step: Pass, sizes: WeightSizes) -> int:
    """Return the least memory in bytes that a step needs for a model whose weights can stay in its files."""
    if step.holds_weights():
        return least_bytes(sizes.whole)
    layer = least_stored_bytes(sizes.largest)
    return max(layer, INTERPRETER + PER_BLOCK * sizes.block) if step.holds_blocks() else layer


def estimated_bytes(step: Pass, sizes: WeightSizes, *, large: bool) -> int | None:
    """Return about how much memory in bytes a step needs for a model's weights; None if it does not read the model.

    `large`: the weights stay in their files, except in steps that hold them all.
    """
    from intaglio.pipeline.artifacts.keys import MODEL

    if MODEL not in step.requires:
        return None
    if large or step.holds_weights():
        return held_bytes(step, sizes)
    return INTERPRETER + 4 * sizes.whole


def check_memory(model: Checkpoint, steps: Iterable[Pass]) -> None:
    """Raise RecipeError if the model needs more memory for these steps than the machine has.

    Weights of a folder stay in their files, except in steps that hold them; a factory makes them all.
    """
    sizes = WeightSizes.of(model.empty())
    least = least_bytes(sizes.whole) if model.entry else max(held_bytes(step, sizes) for step in steps)
    there = machine_bytes()
    if least > there:
        raise RecipeError(
            f"the denoiser has {sizes.whole:,} parameters, {4 * sizes.whole / 1e9:.1f} GB in float32: compiling it"
            f" takes at least {least / 1e9:.1f} GB, and there are {there / 1e9:.1f} GB here: run it on a larger machine"
        )


def forget_peak() -> int | None:
    """Reset the peak of this process and return its resident bytes; None on systems other than Linux."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return None
    return resident_bytes("VmRSS")


def resident_bytes(field: Literal["VmRSS", "VmHWM", "RssAnon"]) -> int:
    """Return a memory figure of this process in bytes: VmRSS now, VmHWM at most since the start or a reset.

    RssAnon is the part of VmRSS that is no file: the system cannot drop it when it needs the memory.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
