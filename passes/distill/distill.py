"""Heal the loss: train low-rank adapters so that the quantized denoiser follows the full-precision one.

Shapes: N out features, K in features, T denoising steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from intaglio.passes.distill.options import DistillOptions
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    from intaglio.passes.distill.objective import Task


class Distill(DistillOptions, Pass):
    """Train the rounded weights Q(W0 + B A; s) and their scales on the guided output, along teacher trajectories.

    This is QALoRA (EfficientDM section 3.2). The learning rate of a layer's adapter is proportional to its mean weight
    scale (section 3.3; as a rate, because Adam cancels a constant factor on the gradient). Inputs with one scale per
    step, and 4-bit inputs, learn one scale and one shift per step (TALSQ, section 3.4). Each kind of tensor has its own
    learning rate, in place of LSQ's factor on the gradient of scales, which Adam cancels too. Every eighth sample of
    the trajectories is held out. The state with the least error on these samples is kept, the start included, so that
    training never makes a plan worse on them.
    """

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 6
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ADAPTER})
    random: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    def forward_rows(self, model: ModelCost) -> int:
        """Return the rows of all updates and of the roll-outs; a backward pass counts as two forward passes."""
        from intaglio.passes.distill.trainer import ROUND

        rows = self.samples * model.rows_per_sample
        rolled = self.updates // ROUND * model.steps * rows if self.rollout else 0
        return round((3 + self.rollout) * self.updates * rows) + rolled

    def run(self, state: State, ctx: Context) -> Outputs:
        """Train adapters and scales. Raises RecipeError if there are more processes than samples to share."""
        from intaglio.passes.distill.start import begin
        from intaglio.passes.distill.trainable import learnt
        from intaglio.pipeline.artifacts.quantized import Adapter
        from intaglio.pipeline.model.blocks import recomputed

        task, codes = begin(self, state[MODEL], state[PLAN], state[TRAJECTORY], ctx)
        loss: tuple[float, ...] = ()
        if self.updates and task.layers:
            with recomputed(task.blocks.values() if self.recompute else (), task.clock):
                loss = train_blocks(task) if self.scope == "block" else train_model(task)
        layers = {name: learnt(layer.cpu(), codes.get(name)) for name, layer in task.layers.items()}
        return {ADAPTER: Adapter(layers, loss, self.distance)}


def train_model(task: Task) -> tuple[float, ...]:
    """Train all layers on the output of the denoiser. Returns the loss of every update."""
    from intaglio.passes.distill.objective import WholeOutput
    from intaglio.passes.distill.trainer import Trainer

    task.check_shares()
    task.add_adapters(task.layers)
    return Trainer(task.options, task.layers, WholeOutput(task), task.ctx).train()


def train_blocks(task: Task) -> tuple[float, ...]:
    """Train the layers of each block on its output, in the order of the model. Returns the loss of every update.

    Raises RecipeError if no block of the model has quantized layers.
    """
    from intaglio.passes.distill.objective import BlockOutput, block_calls
    from intaglio.passes.distill.trainer import Trainer

    task.check_shares()
    parts = {b: {n: m for n, m in task.layers.items() if n.startswith(f"{b}.")} for b in task.blocks}
    if not any(parts.values()):
        raise RecipeError("distill: the model has no lists of blocks with quantized layers: use scope model")
    loss: list[float] = []
    for name, layers in parts.items():
        if layers and (calls := block_calls(task, name)):
            task.add_adapters(layers)
            objective = BlockOutput(task, task.blocks[name], calls)
            loss += Trainer(task.options, layers, objective, task.ctx, name).train()
            for layer in layers.values():
                layer.requires_grad_(False)
    return tuple(loss)
