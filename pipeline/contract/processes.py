"""Let several processes, started by `accelerate launch` or `torchrun`, make one result together.

They share a store on one file system. Shapes: P processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""Longest time that a process waits for others: the first one may do a long step alone."""


@dataclass(frozen=True)
class Processes:
    """One of the processes that share a run.

    All of them must call the same methods in the same order; properties can be read at any time.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Device of tensors while the processes exchange them."""

    @property
    def first(self) -> bool:
        """True for the process that writes files and logs."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """Return this process's part of a sequence; the parts, in the order of processes, make up the sequence."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def agree(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        said = [value if self.first else None]
        dist.broadcast_object_list(said, src=0)
        return said[0]  # type: ignore[return-value]  # the value of the first process has replaced it

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, P values in their order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[T] = [value] * self.count
        dist.all_gather_object(found, value)
        return found

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the processes. Changes `tensors`."""
        if self.count == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):  # type: ignore[no-untyped-call]  # torch
            tensor.copy_(summed.reshape(tensor.shape))


@cache
def processes() -> Processes:
    """Return the processes of this run: one, unless a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device.type)
