"""Train the blocks of a denoiser one after the other: repeat recorded calls from each block on, compare its outputs.

A block's input comes from blocks that are already trained (BRECQ, Li 2021).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from intaglio.passes.distill.objective import Error, relative_error, tensors, total_loss
from intaglio.pipeline.model.hooks import before_calls
from intaglio.pipeline.model.recorded_call import record, replayed
from intaglio.pipeline.simulation.model import full_precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from intaglio.passes.distill.objective import Task


T = TypeVar("T")
_Arguments: TypeAlias = tuple[tuple[object, ...], Mapping[str, object]]


class BlockOutput:
    """Compare the output of one block, whose predecessors are quantized, with full precision's (BRECQ, Li 2021).

    The backward pass needs the memory of this block alone. The block's calls are recorded once, before the training.
    """

    def __init__(self, task: Task, block: nn.Module, calls: Sequence[Sequence[BlockCall]]) -> None:
        """Keep the recorded calls. `calls` has for each step the training calls, and the held-out call last."""
        self.task, self.block, self.calls = task, block, calls

    def prepare(self, update: int) -> None:
        """Do nothing: all calls are already recorded."""

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Return the loss terms of one update."""
        step = int(rng.integers(len(self.calls)))
        training = self.calls[step][:-1]
        return self._compare(step, training[int(rng.integers(len(training)))])

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Return the relative squared error of the held-out call, the mean over every second step."""
        calls = (self._compare(step, self.calls[step][-1]) for step in range(0, len(self.calls), 2))
        losses = torch.stack([total_loss(errors, self.task.ctx.processes) for errors in calls])
        self.task.ctx.processes.add([losses])
        return float(losses.mean())

    def _compare(self, step: int, call: BlockCall) -> Sequence[Error]:
        with self.task.clock.at(step), self.task.mixed():
            output = self.block(*call.args, **call.kwargs)
        return [relative_error(tensors(output), call.expected)]


class BlockCall(NamedTuple):
    """Input of a block from trained predecessors, and the block's output in the full-precision model."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    expected: Sequence[torch.Tensor]


@dataclass
class _Run:
    """One recorded call of the denoiser, and what its finished blocks returned, by name."""

    step: int
    rows: Sequence[int]
    teacher: dict[str, list[object]] = field(default_factory=dict)
    """Outputs in full precision."""
    student: dict[str, list[object]] = field(default_factory=dict)
    """Outputs as trained, from the outputs of trained predecessors."""


class BlockChain:
    """Calls of the blocks, in their order. Blocks that are finished return recorded outputs: none is computed again.

    An output is kept until the last block has run that reads it. A block that a call of the denoiser calls more than
    once is trained on its first call, and always computed.
    """

    def __init__(self, task: Task) -> None:
        """Find the blocks that the denoiser calls, and which of them read the outputs of which."""
        self.task, split, size = task, task.split, task.size
        training = [task.training[i : i + size] for i in range(0, len(task.training) - size + 1, size)]
        self.runs = [
            [_Run(step, task.own_rows(samples)) for samples in (*training, split.held_out)]
            for step in range(len(task.trajectory.timesteps))
        ]
        self.order, self.last_reader = self._readers(self.runs[0][-1])
        """Blocks in the order of their calls; and, for each that is called once, the last block that reads its output.
        """

    def calls(self, name: str) -> list[list[BlockCall]]:
        """Return the block's calls at each step, on this process's rows; the held-out call comes last.

        Returns an empty list if some recorded call of the denoiser does not call the block.
        """
        steps = []
        with self.task.ctx.progress(f"calls of {name}", len(self.runs)) as advance:
            for runs in self.runs:
                calls = [self._call(name, run) for run in runs]
                known = [call for call in calls if call is not None]
                if len(known) < len(calls):
                    return []
                steps.append(known)
                advance()
        return steps

    @torch.no_grad()
    def finish(self, name: str, calls: Sequence[Sequence[BlockCall]]) -> None:
        """Record what the block returns as it is now, and drop outputs that no later block reads."""
        later = self.order[self.order.index(name) + 1 :]
        for runs, step_calls in zip(self.runs, calls, strict=True):
            for run, call in zip(runs, step_calls, strict=True):
                if self.last_reader.get(name) in later:
                    with self.task.clock.at(run.step):
                        run.student[name] = [self.task.blocks[name](*call.args, **call.kwargs)]
                elif name in self.last_reader:
                    run.student[name] = run.teacher[name]  # nothing reads it
                for outputs in (run.teacher, run.student):
                    for done in [each for each in outputs if self.last_reader[each] not in later]:
                        outputs[done] = _filled(outputs[done], 0.0)

    def _call(self, name: str, run: _Run) -> BlockCall | None:
        """Return the block's first call in a call of the denoiser; None if it has none."""
        block, given = self.task.blocks[name], list[_Arguments]()

        def begin(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given.append((args, kwargs))
            raise _Reached

        with full_precision(self.task.layers.values()):
            returned = record({name: block}, partial(self._repeat, run, run.teacher), {name}, until=name).returned
        with block.register_forward_pre_hook(begin, with_kwargs=True), contextlib.suppress(_Reached):
            self._repeat(run, run.student)
        if not (given and returned):
            return None
        if name in self.last_reader:
            run.teacher |= returned
        return BlockCall(*given[0], tensors(returned[name]))

    @torch.no_grad()
    def _repeat(self, run: _Run, returned: Mapping[str, list[object]]) -> torch.Tensor:
        """Repeat a call of the denoiser with these outputs of blocks."""
        task = self.task
        with task.clock.at(run.step), replayed(task.blocks, returned):
            return task.denoise(task.trajectory.call(run.step, run.rows))

    def _readers(self, run: _Run) -> tuple[list[str], dict[str, str]]:
        """Return the blocks in the order of their calls, and the last one that reads each block's output.

        The latter are found by replaying the output of one block with NaN in it: as all others replay theirs, only
        blocks that read it are given NaN. Blocks that are called more than once have no entry.
        """
        blocks = self.task.blocks
        with full_precision(self.task.layers.values()):
            recording = record(blocks, partial(self._repeat, run, {}), blocks)
        returned, order = recording.returned, sorted(recording.began, key=recording.began.__getitem__)
        once = {name: outputs for name, outputs in returned.items() if len(outputs) == 1}
        last = {}
        for name in once:
            readers = [name]

            def read(reader: str, args: tuple[Any, ...], readers: list[str] = readers) -> None:
                if any(bool(x.isnan().any()) for x in tensors(args)):
                    readers.append(reader)

            with before_calls(blocks, read):
                self._repeat(run, once | {name: _filled(once[name], math.nan)})
            last[name] = max(readers, key=order.index)
        return order, last


class _Reached(Exception):
    """The rest of the denoiser need not be computed."""


def _filled(outputs: T, value: float) -> T:
    """Return the outputs with tensors of the same shapes that hold one value, and take no memory."""

    def fill(x: torch.Tensor) -> torch.Tensor:
        return torch.full((), value if x.is_floating_point() else 0, dtype=x.dtype, device=x.device).expand(x.shape)

    return tree_map_only(torch.Tensor, fill, outputs)  # type: ignore[no-any-return]  # torch's pytree has no types
