"""Define the objective of a distillation: the denoiser's output error against full precision.

Shapes: T denoising steps, R rows of a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from intaglio.passes.distill.trainable import add_adapter
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import clocked
from intaglio.pipeline.model.hooks import after_calls
from intaglio.pipeline.model.sampler import Call
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import full_precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from intaglio.passes.distill.options import DistillOptions
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.contract.processes import Processes
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.step_clock import StepClock
    from intaglio.pipeline.model.types import Denoise, Inputs


class Error(NamedTuple):
    """One term of a loss on this process's rows: weight * sum (y - y_ref)^2 / sum y_ref^2, the sums over all rows."""

    squared: torch.Tensor
    energy: torch.Tensor
    weight: float = 1.0


class Objective(Protocol):
    """Loss of a distillation. Every process computes its share of an update's rows; all make the same draws."""

    def prepare(self, update: int) -> None:
        """Prepare for the next updates. Called every ROUND updates, before `update`."""

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Return the loss terms of one update, at a step and on samples drawn with `rng`."""


def total_loss(errors: Sequence[Error], processes: Processes) -> torch.Tensor:
    """Return this process's part of a loss: the sum of weight * squared / energy over the terms."""
    energies = [error.energy.clone() for error in errors]
    processes.add(energies)
    terms = [error.weight * error.squared / energy for error, energy in zip(errors, energies, strict=True)]
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class Split:
    """Samples of the trajectories to train blocks on, and every eighth sample, which is held out from the training."""

    training: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, count: int) -> Split:
        """Split `count` samples. The first of fewer than eight is held out; a single one is trained on too."""
        held_out = tuple(range(7, count, 8)) or (0,)
        return cls(tuple(i for i in range(count) if i not in held_out) or (0,), held_out)


@dataclass(frozen=True)
class Task:
    """Everything that an objective needs: the options, the model with its quantized layers, and the trajectories."""

    options: DistillOptions
    sampler: Sampler
    denoise: Denoise
    clock: StepClock
    layers: Mapping[str, QuantizedLayer]
    trajectory: Trajectory
    blocks: Mapping[str, nn.Module]
    ctx: Context

    @property
    def count(self) -> int:
        """Number of samples in the trajectories."""
        return self.trajectory.outputs.shape[1] // self.sampler.rows_per_sample

    @property
    def split(self) -> Split:
        """Samples to train on, and held-out samples."""
        return Split.of(self.count)

    @property
    def training(self) -> Sequence[int]:
        """Recorded samples that updates draw from. Only the training of blocks holds some of them out."""
        return self.split.training if self.options.scope == "block" else range(self.count)

    @property
    def size(self) -> int:
        """Number of samples in one update."""
        return min(self.options.samples, len(self.training))

    def own_rows(self, samples: Sequence[int]) -> list[int]:
        """Return the recorded rows of this process's share of the samples."""
        return self.sampler.rows_of(samples[self.ctx.processes.share(len(samples))], self.count)

    def add_adapters(self, layers: Mapping[str, QuantizedLayer]) -> None:
        """Make the weights of `layers` trainable. Changes `layers`."""
        for name, layer in layers.items():
            add_adapter(layer, self.options.rank, self.ctx.torch_rng("adapter", name))

    def check_shares(self) -> None:
        """Raise RecipeError if a process would get no sample of an update, or no held-out sample of a block."""
        processes, held_out = self.ctx.processes.count, len(self.split.held_out)
        if processes > self.size:
            raise RecipeError(
                f"distill: {processes} processes share {self.size} samples an update: use fewer processes, or raise"
                " distill.samples and calibrate.samples"
            )
        if self.options.scope == "block" and processes > held_out:
            raise RecipeError(
                f"distill: {processes} processes share {held_out} held-out samples: use fewer processes, or raise"
                " calibrate.samples, of which an eighth is held out"
            )

    def mixed(self) -> contextlib.AbstractContextManager[object]:
        """Compute products inside the context in the training precision; codes and scales stay float32."""
        return torch.autocast(self.ctx.device, torch.bfloat16, enabled=self.options.precision == "bfloat16")


class WholeOutput:
    """Compare the guided output with full precision's, at one step of recorded or of rolled-out trajectories.

    The loss is Eq. 7 of EfficientDM. The quantized model itself draws the rolled-out trajectories. With `features`, the
    outputs of the blocks are compared too.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.blocks = task.blocks if task.options.features else {}
        self.weights = self._weights()
        self.rolled: list[Inputs] = []

    def _weights(self) -> list[float]:
        """Return the weight of each step's relative error: 1, or its effect on the samples, scaled to a mean of 1."""
        sampler, trajectory = self.task.sampler, self.task.trajectory
        if self.task.options.weighting == "output":
            return [1.0] * len(trajectory.timesteps)
        outputs = [sampler.guided(output) for output in trajectory.outputs]
        x = trajectory.inputs[sampler.names.sample][0][: self.task.count]
        energies = [float(output.square().mean()) for output in outputs]
        felt = [i**2 * e for i, e in zip(sampler.influence(x, outputs), energies, strict=True)]
        mean = sum(felt) / len(felt)
        return [weight / mean for weight in felt] if mean > 0 else [1.0] * len(felt)

    def prepare(self, update: int) -> None:
        """Draw samples from new noise with the quantized model, and keep its inputs for the next updates."""
        task, samples = self.task, self.task.options.samples
        if not task.options.rollout:
            return
        start = task.sampler.start(samples, task.ctx.torch_rng("roll-out", update))
        own = start.part(task.ctx.processes.share(samples))
        denoise = clocked(task.denoise, task.clock, task.sampler.names.timestep)
        self.rolled = [call.inputs for call in task.sampler.drive(denoise, own) if isinstance(call, Call)]

    def errors(self, rng: np.random.Generator) -> Sequence[Error]:
        """Return the loss terms of one update."""
        step = int(rng.integers(len(self.task.trajectory.timesteps)))
        picked = sorted(int(i) for i in rng.choice(self.task.training, self.task.size, replace=False))
        if rng.random() < self.task.options.rollout:
            return self._compare(step, self.rolled[step], None, self.blocks)
        return self._recorded(step, picked, self.blocks)

    def _recorded(self, step: int, samples: Sequence[int], blocks: Mapping[str, nn.Module]) -> Sequence[Error]:
        rows, trajectory = self.task.own_rows(samples), self.task.trajectory
        return self._compare(step, trajectory.call(step, rows), trajectory.outputs[step][rows], blocks)

    def _compare(
        self, step: int, inputs: Inputs, target: torch.Tensor | None, blocks: Mapping[str, nn.Module]
    ) -> Sequence[Error]:
        """Return the errors at a step; `target` is the output of full precision, None if it is not recorded."""
        with self.task.clock.at(step):
            return self._errors_of(inputs, target, blocks, self.weights[step])

    def _errors_of(
        self, inputs: Inputs, target: torch.Tensor | None, blocks: Mapping[str, nn.Module], weight: float
    ) -> Sequence[Error]:
        """Return the errors of the output and of these blocks' outputs, at the clock's step."""
        task = self.task
        expected: dict[str, list[torch.Tensor]] = {}
        if target is None or blocks:
            with torch.no_grad(), full_precision(task.layers.values()), outputs_of(blocks, expected):
                target = task.denoise(inputs)
        found: dict[str, list[torch.Tensor]] = {}
        with outputs_of(blocks, found), task.mixed():
            output = task.denoise(inputs)
        pairs = [(found[name], expected[name], weight * task.options.features / len(found)) for name in found]
        whole = relative_error([task.sampler.guided(output.float())], [task.sampler.guided(target)], weight)
        return [whole, *(relative_error(*pair) for pair in pairs)]


@contextlib.contextmanager
def outputs_of(blocks: Mapping[str, nn.Module], found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Fill `found` with the tensors that the blocks return, as they are before the model changes them."""

    def note(name: str, _: tuple[object, ...], output: object) -> None:
        found[name] = [each.clone() for each in tensors(output)]

    with after_calls(blocks, note):
        yield


def tensors(output: object) -> list[torch.Tensor]:
    """Return the floating-point tensors in the output of a module, whatever its type."""
    from torch.utils._pytree import tree_leaves

    leaves = tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def relative_error(output: Iterable[torch.Tensor], target: Iterable[torch.Tensor], weight: float = 1.0) -> Error:
    """Return the error of tensors, relative to the energy of their targets."""
    pairs = list(zip(output, target, strict=True))
    squared = torch.stack([(y.float() - reference).square().sum() for y, reference in pairs]).sum()
    energy = torch.stack([reference.square().sum() for _, reference in pairs]).sum()
    return Error(squared.cpu(), energy.cpu(), weight)
