"""Several processes that make one result together: those that `accelerate launch` or `torchrun` started.

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
"""How long a process waits for the others: as long as the longest step that the first one does alone."""


@dataclass(frozen=True)
class Processes:
    """This process among the others. Every method but the properties is called by all of them, in the same order."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    """Where tensors are while the processes exchange them."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """The part of a sequence that is this process's: in order of the processes, the parts are the sequence."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def agree(self, value: T) -> T:
        """What the first process says."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        said = [value if self.first else None]
        dist.broadcast_object_list(said, src=0)
        return said[0]  # type: ignore[return-value]  # the first one's value has taken its place

    def gather(self, value: T) -> list[T]:
        """What every process has, P values in their order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[T] = [value] * self.count
        dist.all_gather_object(found, value)
        return found

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Every tensor becomes the sum of those that the processes have in its place. Changes `tensors`."""
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
    """The processes of this run: one, unless a launcher started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device.type)
