"""Reduce the error of rounding: train low-rank adapters so that the quantized denoiser follows the full-precision one.

Shapes: N out features, K in features, T denoising steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeAlias

from intaglio.passes.distill.options import DistillOptions
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from intaglio.passes.distill.drawn import DrawnSamples
    from intaglio.passes.distill.objective import Task
    from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError

    Trained: TypeAlias = tuple[tuple[float, ...], Mapping[int, float]]


ENOUGH = "no training is needed: the samples have %.1f dB at the start, and %g dB are enough (distill.enough_db)"


class Distill(DistillOptions, Pass):
    """Train the rounded weights Q(W0 + B A; s) and their scales on the guided output, along teacher trajectories.

    This is QALoRA (EfficientDM section 3.2). The learning rate of a layer's adapter is proportional to its mean weight
    scale. Inputs with one scale per step, and 4-bit inputs, learn one scale and one shift per step (TALSQ, section
    3.4). Each kind of tensor has its own learning rate, relative to its size at the start. EfficientDM multiplies the
    gradient by the scale (section 3.3), and LSQ also multiplies gradients of scales by a factor. Adam cancels constant
    factors on a gradient, so learning rates take the place of both here. The relative error of each step is weighted by
    its effect on the samples (`weighting`).

    At the start and at up to four checks during the updates, the model draws samples from noise that no update is
    trained on. The state whose samples are nearest to those of full precision is kept; the start is one of these
    states. So training never makes these samples worse. With scope `block`, every eighth sample of the trajectories is
    held out, each block keeps the state with the least output error on it, and the end is kept if its drawn samples are
    better than those of the start.

    Nothing is trained if the samples at the start have the PSNR `enough_db` already, and the training ends after two
    checks in a row without better samples.

    In calls with one sample, drawing takes 6 x drawn x steps and the updates take 3 x samples x updates. With the
    default options and 20 steps, drawing takes 17 % as many calls as the updates.
    """

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 12
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ADAPTER})
    random: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")
    efforts = ({"updates": 120}, {"updates": 0})

    def forward_rows(self, model: ModelCost) -> int:
        """Return the rows of all updates, roll-outs and drawn samples; a backward pass counts as two forward passes."""
        from intaglio.passes.distill.trainer import ROUND, checks

        rows = self.samples * model.rows_per_sample
        rolled = self.updates // ROUND * model.steps * rows if self.rollout else 0
        draws = 2 + (1 if self.scope == "block" else len(checks(self.updates))) if self.updates else 0
        drawn = draws * self.drawn * model.rows_per_sample * model.steps
        return round((3 + self.rollout) * self.updates * rows) + rolled + drawn

    def holds_weights(self) -> bool:
        """Return True for a training, unless it needs one block at a time."""
        return self.updates > 0 and not self.by_block

    def holds_blocks(self) -> bool:
        """Return True for a training that needs one block at a time."""
        return self.by_block

    def run(self, state: State, ctx: Context) -> Outputs:
        """Train adapters and scales. Raises RecipeError if there are more processes than samples to share."""
        from intaglio.passes.distill.drawn import DrawnSamples
        from intaglio.passes.distill.start import begin
        from intaglio.passes.distill.trainable import learnt
        from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
        from intaglio.pipeline.model.blocks import recomputed

        task, codes = begin(self, state[MODEL], state[PLAN], state[TRAJECTORY], ctx)
        loss: tuple[float, ...] = ()
        errors: tuple[DrawnError, ...] = ()
        if self.updates and not task.layers:
            ctx.log.info("no training is needed: the plan rounds no weights")
        elif self.updates:
            task.check_shares()
            samples = DrawnSamples(task)
            measured: Mapping[int, float] = {0: samples.error()}
            start_db = state[TRAJECTORY].samples.psnr_db(measured[0])
            if start_db >= self.enough_db:
                ctx.log.info(ENOUGH, start_db, self.enough_db)
            else:
                with recomputed(task.blocks.values() if self.recompute else (), task.clock):
                    train = train_blocks if self.scope == "block" else train_model
                    loss, measured = train(task, samples, measured[0])
            errors = tuple(DrawnError(*each) for each in measured.items())
        layers = {name: learnt(layer.cpu(), codes.get(name)) for name, layer in task.layers.items()}
        adapter = Adapter(layers, loss, self.distance, errors, state[TRAJECTORY].samples.peak)
        if loss:
            ctx.log.info("%s", samples_line(adapter))
        return {ADAPTER: adapter}


def samples_line(adapter: Adapter) -> str:
    """Return one line: the PSNR of the drawn samples at the start, and after the updates that are kept."""
    first, last, kept = adapter.drawn[0], adapter.drawn[-1], adapter.kept
    start = f"samples: {adapter.psnr_db(first):.1f} dB at the start"
    if kept == first:
        return f"{start}, which is kept; {adapter.psnr_db(last):.1f} dB after {last.update} updates"
    return f"{start}; {adapter.psnr_db(kept):.1f} dB after {kept.update} updates, which is kept"


def train_model(task: Task, samples: DrawnSamples, before: float) -> Trained:
    """Train all layers on the output of the denoiser. `before` is the error of the samples at the start."""
    from intaglio.passes.distill.objective import WholeOutput
    from intaglio.passes.distill.trainer import Trainer

    task.add_adapters(task.layers)
    trainer = Trainer(task.options, task.layers, WholeOutput(task), samples.error, task.ctx)
    trainer.errors[0] = before
    return trainer.train(), trainer.errors


def train_blocks(task: Task, samples: DrawnSamples, before: float) -> Trained:
    """Train the layers of each block on its output, in the order of the model, and compare the end with the start.

    `before` is the error of the samples at the start. Raises RecipeError if no block of the model has quantized layers.
    """
    from intaglio.passes.distill.blocks import BlockChain, BlockOutput
    from intaglio.passes.distill.trainer import Trainer

    parts = {b: {n: m for n, m in task.layers.items() if n.startswith(f"{b}.")} for b in task.blocks}
    if not any(parts.values()):
        raise RecipeError(
            "distill: the model has no lists of blocks with quantized layers: set distill.scope to `model`"
        )
    loss: list[float] = []
    trainers: list[Trainer] = []
    chain = BlockChain(task)
    for name in chain.order:
        layers, calls = parts[name], chain.calls(name)
        if layers and calls:
            task.add_adapters(layers)
            objective = BlockOutput(task, task.blocks[name], calls)
            trainers.append(Trainer(task.options, layers, objective, objective.held_out_error, task.ctx, name))
            loss += trainers[-1].train()
            errors = trainers[-1].errors
            task.ctx.log.info("%s: held-out relative error %.3e -> %.3e", name, errors[0], min(errors.values()))
            for layer in layers.values():
                layer.requires_grad_(False)
        if calls:
            chain.finish(name, calls)
    after = samples.error()
    if not after < before:
        for trainer in trainers:
            trainer.restore(trainer.start)
    return tuple(loss), {0: before, len(loss): after}
