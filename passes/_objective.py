"""What a distillation minimizes: errors of outputs against full precision, of the denoiser or of one block.

Shapes: T denoising steps, R rows of a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from intaglio.pipeline.denoiser import Call, clocked
from intaglio.pipeline.quant.modules import QuantizedLayer, full_precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from intaglio.passes.distill import Distill
    from intaglio.pipeline.context import Context
    from intaglio.pipeline.denoiser import Denoise, Inputs, Sampler
    from intaglio.pipeline.quant.modules import StepClock
    from intaglio.pipeline.trajectory import Trajectory


class Error(NamedTuple):
    """One term of a loss on this process's rows: weight * sum (y - y_ref)^2 / sum y_ref^2, the sums over all rows."""

    squared: torch.Tensor
    energy: torch.Tensor
    weight: float = 1.0


class Objective(Protocol):
    """Every process computes its share of an update's rows; all make the same draws."""

    def prepare(self, update: int) -> None:
        """Called now and then, before `update`."""

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Of one update, at a step and on samples drawn with `rng`."""

    def held_out(self) -> Iterator[Sequence[Error]]:
        """Of calls that no update sees."""


@dataclass(frozen=True)
class Split:
    """Which samples of the trajectories are trained on, and which are held out: every eighth."""

    training: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, count: int) -> Split:
        """A single sample is both."""
        held_out = tuple(range(7, count, 8)) or (0,)
        return cls(tuple(i for i in range(count) if i not in held_out) or (0,), held_out)


class WholeOutput:
    """The guided output at one step of the recorded trajectories, or in a state that the quantized model reached.

    (EfficientDM Eq. 7.) With `features`, the outputs of the blocks count too, each against full precision's.
    """

    def __init__(
        self,
        options: Distill,
        sampler: Sampler,
        denoise: Denoise,
        clock: StepClock,
        layers: Mapping[str, QuantizedLayer],
        trajectory: Trajectory,
        blocks: Mapping[str, nn.Module],
        ctx: Context,
    ) -> None:
        self.options, self.sampler, self.denoise, self.clock = options, sampler, denoise, clock
        self.layers, self.trajectory, self.ctx = layers, trajectory, ctx
        self.blocks = blocks if options.features else {}
        self.count = trajectory.outputs.shape[1] // sampler.rows_per_sample
        self.split = Split.of(self.count)
        self.weights = self._weights()
        self.rolled: list[Inputs] = []

    def _weights(self) -> list[float]:
        """By step, of the relative error: what the samples feel of it, 1 on average over the steps."""
        outputs = [self.sampler.guided(output) for output in self.trajectory.outputs]
        if self.options.weighting == "output":
            return [1.0] * len(outputs)
        x = self.trajectory.inputs[self.sampler.names.sample][0][: self.count]
        energies = [float(output.square().mean()) for output in outputs]
        felt = [i**2 * e for i, e in zip(self.sampler.influence(x, outputs), energies, strict=True)]
        return [weight * len(felt) / sum(felt) for weight in felt]

    def prepare(self, update: int) -> None:
        """The quantized model draws samples from new noise; its calls are what it will be corrected at."""
        if not self.options.rollout:
            return
        start = self.sampler.start(self.options.samples, self.ctx.torch_rng("roll-out", update))
        own = start.part(self.ctx.processes.share(self.options.samples))
        denoise = clocked(self.denoise, self.clock, self.sampler.names.timestep)
        self.rolled = [call.inputs for call in self.sampler.drive(denoise, own) if isinstance(call, Call)]

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Of one update."""
        step = int(rng.integers(len(self.trajectory.timesteps)))
        training = self.split.training
        picked = sorted(int(i) for i in rng.choice(training, min(self.options.samples, len(training)), replace=False))
        if rng.random() < self.options.rollout:
            return self._compare(step, self.rolled[step], None, self.blocks)
        return self._recorded(step, picked[self.ctx.processes.share(len(picked))], self.blocks)

    def held_out(self) -> Iterator[Sequence[Error]]:
        """Of every second step, of the output alone."""
        own = self.split.held_out[self.ctx.processes.share(len(self.split.held_out))]
        for step in range(0, len(self.trajectory.timesteps), 2):
            yield self._recorded(step, own, {})

    def _recorded(self, step: int, samples: Sequence[int], blocks: Mapping[str, nn.Module]) -> Sequence[Error]:
        rows = self.sampler.rows_of(samples, self.count)
        return self._compare(step, self.trajectory.call(step, rows), self.trajectory.outputs[step][rows], blocks)

    def _compare(
        self, step: int, inputs: Inputs, target: torch.Tensor | None, blocks: Mapping[str, nn.Module]
    ) -> Sequence[Error]:
        """`target` is full precision's output where it is known."""
        self.clock.step = step
        expected: dict[str, list[torch.Tensor]] = {}
        if target is None or blocks:
            with torch.no_grad(), full_precision(self.layers.values()), outputs_of(blocks, expected):
                target = self.denoise(inputs)
        found: dict[str, list[torch.Tensor]] = {}
        with outputs_of(blocks, found), mixed(self.options, self.ctx):
            output = self.denoise(inputs)
        weight = self.weights[step]
        pairs = [(found[name], expected[name], weight * self.options.features / len(found)) for name in found]
        whole = _error([self.sampler.guided(output.float())], [self.sampler.guided(target)], weight)
        return [whole, *(_error(*pair) for pair in pairs)]


class BlockOutput:
    """The output of one block behind blocks that are quantized already, against full precision's (BRECQ, Li 2021).

    The block alone is in memory for the backward pass. Its calls are recorded once, before it is trained.
    """

    def __init__(
        self,
        options: Distill,
        clock: StepClock,
        block: nn.Module,
        calls: Sequence[Sequence[BlockCall]],
        ctx: Context,
    ) -> None:
        """`calls`: by step; of each the training calls, and last the held-out one."""
        self.options, self.clock, self.block, self.calls, self.ctx = options, clock, block, calls, ctx

    def prepare(self, update: int) -> None:
        """All is recorded."""

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Of one update."""
        step = int(rng.integers(len(self.calls)))
        training = self.calls[step][:-1] or self.calls[step]
        return self._compare(step, training[int(rng.integers(len(training)))])

    def held_out(self) -> Iterator[Sequence[Error]]:
        """Of every second step."""
        for step in range(0, len(self.calls), 2):
            yield self._compare(step, self.calls[step][-1])

    def _compare(self, step: int, call: BlockCall) -> Sequence[Error]:
        self.clock.step = step
        with mixed(self.options, self.ctx):
            output = self.block(*call.args, **call.kwargs)
        return [_error(tensors(output), call.expected)]


class BlockCall(NamedTuple):
    """What enters a block behind quantized ones, and what leaves it in full precision."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    expected: Sequence[torch.Tensor]


def block_calls(
    block: nn.Module,
    denoise: Denoise,
    clock: StepClock,
    layers: Mapping[str, QuantizedLayer],
    trajectory: Trajectory,
    samples: Sequence[Sequence[int]],
    advance: Callable[[], None],
) -> list[list[BlockCall]]:
    """By step, a call for each of `samples` (rows). Empty where the denoiser never calls the block."""
    steps = []
    for step in range(len(trajectory.timesteps)):
        clock.step = step
        calls = []
        for rows in samples:
            inputs = trajectory.call(step, rows)
            with full_precision(layers.values()):
                teacher = _first_call(block, denoise, inputs)
            student = _first_call(block, denoise, inputs)
            if teacher is None or student is None:
                return []
            with torch.no_grad(), full_precision(layers.values()):
                expected = tensors(block(*teacher[0], **teacher[1]))
            calls.append(BlockCall(*student, expected))
        steps.append(calls)
        advance()
    return steps


class _Reached(Exception):
    """The block is called: what comes after it need not be computed."""


def _first_call(
    block: nn.Module, denoise: Denoise, inputs: Inputs
) -> tuple[tuple[object, ...], Mapping[str, object]] | None:
    seen: list[tuple[tuple[object, ...], Mapping[str, object]]] = []

    def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            denoise(inputs)
    finally:
        hook.remove()
    return seen[0] if seen else None


@contextlib.contextmanager
def outputs_of(blocks: Mapping[str, nn.Module], found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Fills `found` with the tensors that the blocks return."""
    hooks = [
        block.register_forward_hook(lambda _, __, y, name=name: found.__setitem__(name, tensors(y)))
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mixed(options: Distill, ctx: Context) -> contextlib.AbstractContextManager[object]:
    """Products in the precision that the student is trained in; codes and scales stay float32."""
    return torch.autocast(ctx.device, torch.bfloat16, enabled=options.precision == "bfloat16")


def tensors(output: object) -> list[torch.Tensor]:
    """The floating-point ones in whatever a module returns."""
    from torch.utils._pytree import tree_leaves

    leaves = tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _error(output: Iterable[torch.Tensor], target: Iterable[torch.Tensor], weight: float = 1.0) -> Error:
    pairs = list(zip(output, target, strict=True))
    squared = torch.stack([(y.float() - reference).square().sum() for y, reference in pairs]).sum()
    energy = torch.stack([reference.square().sum() for _, reference in pairs]).sum()
    return Error(squared.cpu(), energy.cpu(), weight)
