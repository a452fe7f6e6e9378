"""Three trainings by CPU seconds: ours, and all weights, on two objectives.

`ours` trains adapters by distillation; `qat` trains all weights of the quantized layers on the denoiser's own
objective and data (min-SNR weights), as its makers would, from the nearest codes; `qat on our loss` trains them as
ours are, from where ours start. All train weight scales and input scales too, with the same optimizer, on calls of as
many rows, at the timesteps that are sampled.
"""

import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intaglio import Context, Recipe, Store, compile
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.drawn import DrawnSamples
from intaglio.passes.distill.objective import Error, WholeOutput
from intaglio.passes.distill.start import begin
from intaglio.passes.distill.trainable import TrainedWeight
from intaglio.passes.distill.trainer import ROUND, Trainer
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.model.calls import clocked
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.model.types import Denoise
from intaglio.pipeline.runs.memory import resident_bytes

if TYPE_CHECKING:
    import numpy as np

OURS, QAT, QAT_OWN_LOSS = "ours", "qat", "qat on our loss"
QAT_EVERY = 5
"""Checks between two points of its curve, which has many: a ratio of time is too large by less than such a step."""
Curve = Sequence[tuple[int, float, float]]
"""Update, CPU seconds since the first one, held-out error; in order."""


@dataclass(frozen=True)
class Training:
    """Training in one process. `recipe` ends before the distillation, whose options are `distill`."""

    kind: str
    recipe: Recipe
    base: Path
    store: Path
    distill: Distill
    data: Path


def run(training: Training, held_out: Trajectory, scratch: Path) -> dict[str, Any]:
    """The curve, and what training needs: a killed run goes on from `scratch`."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("intaglio").setLevel(logging.INFO)
    began = time.process_time()
    (done,) = compile(training.recipe, Store(training.store), base=training.base).values()
    scratch.mkdir(exist_ok=True)
    ctx = Context(scratch, training.recipe.seed)
    task, _ = begin(training.distill, done[MODEL], done[PLAN], done[TRAJECTORY], ctx)
    started_s = time.process_time() - began
    options, sampler, denoise, clock = task.options, task.sampler, task.denoise, task.clock
    objective: Any = WholeOutput(task)
    if training.kind == QAT:
        objective = Denoising(sampler, denoise, clock, training.data, options.samples * sampler.rows_per_sample)
    trained: type[Timed] = Timed if training.kind == OURS else AllWeights
    if training.kind == OURS:
        task.add_adapters(task.layers)
    guard = (lambda: 0.0) if training.kind == QAT else DrawnSamples(task).error  # the best of the curve is its result
    trainer = trained(options, task.layers, objective, guard, ctx)
    if training.kind == QAT:
        trainer.every = QAT_EVERY
    at_its_step = clocked(denoise, clock, sampler.names.timestep)
    trainer.probe = lambda: output_error(at_its_step, sampler, held_out)
    trainer.train()
    return {
        "curve": [(update, *point) for update, point in sorted(trainer.curve.items())],
        "started_cpu_s": started_s,
        "training_bytes": trainer.training_bytes(),
        "peak_bytes": resident_bytes("VmHWM"),
    }


def preparation_cpu_s(recipe: Recipe, base: Path) -> float:
    """Return the CPU seconds of all steps before the distillation, which are computed again."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as store:
        compile(recipe, Store(Path(store)), base=base)
    return time.process_time() - began


def output_error(denoise: Denoise, sampler: Sampler, trajectory: Trajectory) -> float:
    """Mean squared error of the guided output along recorded trajectories."""
    total = 0.0
    for step in range(len(trajectory.timesteps)):
        with torch.no_grad():
            output, target = sampler.guided(denoise(trajectory.call(step))), sampler.guided(trajectory.outputs[step])
        total += float((output - target).square().mean())
    return total / len(trajectory.timesteps)


class Timed(Trainer):
    """Notes the held-out error against the CPU seconds of training, its own checks and roll-outs included.

    At every `every`-th of its checks, the first and the last among them.
    """

    probe: Callable[[], float]
    every = 1

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        there = self.checkpoint.exists()
        self.curve = torch.load(self.checkpoint, weights_only=True)["curve"] if there else {}
        self.spent_s = max((spent for spent, _ in self.curve.values()), default=0.0)
        self.done = 0
        self.mark = time.process_time()

    def _update(self, update: int) -> float:
        self.done = update + 1
        return super()._update(update)

    def _measure(self, update: int) -> None:
        super()._measure(update)
        if update == 0:
            self._note()

    def _note(self) -> None:
        """Add a point to the curve, if there is none for these updates."""
        if self.done not in self.curve:
            self.spent_s += time.process_time() - self.mark
            check, left = divmod(self.done, ROUND)
            if left or self.done == self.options.updates or not check % self.every:
                self.curve[self.done] = (self.spent_s, self.probe())
                self._invalidate()
        self.mark = time.process_time()

    def _save(self, progress: Mapping[str, object]) -> None:
        self._note()
        super()._save({**progress, "curve": self.curve})
        self.mark = time.process_time()

    def training_bytes(self) -> int:
        """Return the bytes of the gradients and the optimizer's state."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [value for each in self.optimizer.state.values() for value in each.values()]
        return sum(t.nbytes for t in [*(p.grad for p in trained if p.grad is not None), *state])


class AllWeights(Timed):
    """Every weight that is rounded is trained itself, at the rate, in weight scales an update, that adapters have."""

    def _groups(self) -> list[dict[str, object]]:
        groups = super()._groups()
        for layer in self.layers.values():
            grid = layer.weight_rounding
            weight = torch.nn.Parameter(grid.float_weight(layer.layer.weight).detach().clone())
            grid.trained = TrainedWeight(weight)
            groups.append({"params": [weight], "lr": self.options.rate * grid.code_scale().detach().mean().item()})
        return groups


class Denoising:
    """The predicted noise of noised images, with the null class in a tenth of the rows, as the models were trained.

    No state is chosen: its result is the least error of the curve, which flatters it.
    """

    def __init__(self, sampler: Sampler, denoise: Denoise, clock: StepClock, data: Path, rows: int) -> None:
        sys.path.append(str(Path(__file__).parents[1]))
        from train_emoji import load_emoji

        images, self.labels, names = load_emoji(data)
        if len(names) != sampler.model.classes:
            raise ValueError(f"{data} has {len(names)} classes, the model {sampler.model.classes}")
        self.images = images.float() / 127.5 - 1
        self.sampler, self.denoise, self.clock, self.rows = sampler, denoise, clock, rows
        self.scheduler: Any = sampler.model.scheduler

    def prepare(self, update: int) -> None:
        """Nothing."""

    def errors(self, rng: "np.random.Generator") -> Sequence[Error]:
        """Return the errors of one update, at one of the sampler's timesteps.

        They have min-SNR weights: Hang et al. 2023, Eq. 7, gamma = 5.
        """
        step = int(rng.integers(len(self.clock.timesteps)))
        t = torch.tensor(int(self.clock.timesteps[step])).expand(self.rows)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        picked = torch.randint(len(self.images), (self.rows,), generator=generator)
        noise = torch.randn(self.rows, *self.images.shape[1:], generator=generator)
        dropped = torch.rand(self.rows, generator=generator) < 0.1
        labels = torch.where(dropped, self.sampler.model.classes or 0, self.labels[picked])
        noised = self.scheduler.add_noise(self.images[picked], noise, t)
        names = self.sampler.names
        with self.clock.at(step):
            output = self.denoise({names.sample: noised, names.timestep or "timestep": t, "class_labels": labels})
        kept = float(self.scheduler.alphas_cumprod[t[0]])
        snr = kept / (1 - kept)
        return [Error((output - noise).square().sum(), torch.tensor(float(noise.numel())), min(snr, 5) / snr)]


def first_at(curve: Curve, error: float) -> float:
    """CPU seconds at which the error is first that small; infinity where it never is."""
    return next((spent for _, spent, found in curve if found <= error), math.inf)


def time_ratios(ours: Curve, ours_start_s: float, qat: Curve, qat_start_s: float) -> dict[str, float | bool]:
    """CPU seconds of `qat` relative to ours, what each does before its first update included.

    `ratio`: to the first error of ours, where its whole time is its start, or to the least error of `qat` if that is
    less; a lower bound where `qat` never reaches it. `ratio_to_our_best`: to the least error of ours, likewise.
    """
    our_best, qat_best = (min(error for _, _, error in curve) for curve in (ours, qat))
    budget_s = qat_start_s + qat[-1][1]

    def ratio(error: float) -> tuple[float, bool]:
        reached = qat_start_s + first_at(qat, error)
        never = math.isinf(reached)
        return (budget_s if never else reached) / (ours_start_s + first_at(ours, error)), never

    first, first_is_bound = ratio(max(our_best, min(qat_best, ours[0][2])))
    best, best_is_bound = ratio(our_best)
    return {
        "ratio": first,
        "ratio_is_bound": first_is_bound,
        "ratio_to_our_best": best,
        "ratio_to_our_best_is_bound": best_is_bound,
        "error_at_start": qat[0][2],
        "least_error_ours": our_best,
        "least_error": qat_best,
        "budget_cpu_s": budget_s,
    }
