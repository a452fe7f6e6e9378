"""Heal the loss: train low-rank adapters so that the quantized denoiser follows the full-precision one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.estimate import ModelCost
from intaglio.pipeline.keys import ADAPTER, MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.quant.spec import IntWeight

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.denoiser import Denoise, Sampler
    from intaglio.pipeline.quant.modules import QuantizedLayer, StepClock
    from intaglio.pipeline.trajectory import Trajectory

CHECKPOINT_EVERY = 20


class Distill(Pass):
    """QALoRA (EfficientDM section 3.2): Q(W0 + B A; s) is trained, on the guided output, along teacher trajectories.

    The learning rate of a layer's adapter is proportional to its mean weight scale (section 3.3 as a rate: under Adam a
    constant factor on the gradient would cancel). Every eighth sample of the trajectories is held out; the state with
    the least error there is kept, the starting point included, so that training never makes a plan worse on it.
    """

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 2
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({ADAPTER})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    updates: int = Field(120, ge=0, description="optimizer updates; 0 keeps the rounded weights as they are")
    samples: int = Field(8, ge=1, description="samples an update, each with its conditional and its null row")
    rank: int = Field(16, ge=1, description="rank of the adapters")
    rate: float = Field(0.02, gt=0, description="learning rate of the adapters, in weight scales an update")
    scale_rate: float = Field(0.001, ge=0, description="learning rate of the weight scales, relative to themselves")

    def forward_rows(self, model: ModelCost) -> int:
        """A forward and a backward pass, which costs two more, for every sample of an update."""
        return 3 * self.updates * self.samples * model.rows_per_sample

    def run(self, state: State, ctx: Context) -> Outputs:
        import torch

        from intaglio.pipeline.denoiser import Sampler, denoise_with
        from intaglio.pipeline.quant.modules import StepClock, quantize_model
        from intaglio.pipeline.quantized import Adapter, LayerAdapter

        checkpoint, trajectory = state[MODEL], state[TRAJECTORY]
        model = checkpoint.open()
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        model.module.requires_grad_(False)
        clock = StepClock(trajectory.timesteps)
        schemes = state[PLAN].schemes
        ranges = trajectory.ranges(schemes, state[PLAN].balances)
        replaced = quantize_model(model.module, schemes, clock, *ranges)
        layers = {name: layer for name, layer in replaced.items() if isinstance(layer.scheme.weight, IntWeight)}
        loss: tuple[float, ...] = ()
        if self.updates and layers:
            for name, layer in layers.items():
                layer.add_adapter(self.rank, ctx.torch_rng("adapter", name))
            trainer = _Trainer(self, sampler, denoise_with(model.module, model), clock, layers, trajectory, ctx)
            loss = trainer.train()
        learnt = {}
        with torch.no_grad():
            for name, layer in layers.items():
                a, b, group = layer.adapter_a, layer.adapter_b, layer.weight_group
                learnt[name] = LayerAdapter(
                    layer.weight_scale.detach(),
                    a.detach() if a is not None else None,
                    b.detach() if b is not None else None,
                    group.detach() if group is not None else None,
                )
        return {ADAPTER: Adapter(learnt, loss)}


class _Trainer:
    """One distillation. What a resumed run needs is in the checkpoint or a function of the update's number."""

    def __init__(
        self,
        options: Distill,
        sampler: Sampler,
        denoise: Denoise,
        clock: StepClock,
        layers: Mapping[str, QuantizedLayer],
        trajectory: Trajectory,
        ctx: Context,
    ) -> None:
        import torch

        self.options, self.sampler, self.denoise, self.clock = options, sampler, denoise, clock
        self.layers, self.trajectory, self.ctx = layers, trajectory, ctx
        count = trajectory.outputs.shape[1] // (2 if sampler.guidance != 1.0 else 1)
        self.held_out = tuple(range(7, count, 8)) or (0,)
        self.training = tuple(i for i in range(count) if i not in self.held_out) or (0,)
        self.rows_offset = count
        groups = []
        for layer in layers.values():
            code_scale = layer.code_scale().detach().mean().item()
            groups.append({"params": [layer.adapter_a, layer.adapter_b], "lr": options.rate * code_scale})
            for scale in (layer.weight_scale, layer.weight_group):
                if scale is not None:
                    scale.requires_grad_(True)
                    groups.append({"params": [scale], "lr": options.scale_rate * scale.detach().mean().item()})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.checkpoint = ctx.scratch / "distill.pt"

    def train(self) -> tuple[float, ...]:
        """Loss of every update. Leaves the best held-out state in the layers."""
        import torch

        loss: list[float] = []
        best_error, best = self._held_out_error(), self._state()
        ctx, updates = self.ctx, self.options.updates
        first_error = best_error
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            self._restore(saved["state"])
            self.optimizer.load_state_dict(saved["optimizer"])
            loss, best_error, best = saved["loss"], saved["best_error"], saved["best"]
        with ctx.progress("distill", updates) as advance:
            advance(len(loss))
            for update in range(len(loss), updates):
                loss.append(self._update(update))
                advance()
                if (update + 1) % CHECKPOINT_EVERY == 0 or update + 1 == updates:
                    error = self._held_out_error()
                    if error < best_error:
                        best_error, best = error, self._state()
                    self._save({"loss": loss, "best_error": best_error, "best": best})
        self._restore(best)
        ctx.log.info("held-out relative error %.3e -> %.3e", first_error, best_error)
        return tuple(loss)

    def _update(self, update: int) -> float:
        rng = self.ctx.rng("update", update)
        step = int(rng.integers(len(self.trajectory.timesteps)))
        picked = rng.choice(self.training, size=min(self.options.samples, len(self.training)), replace=False)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - update / self.options.updates)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._error(step, sorted(int(i) for i in picked))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
        self.optimizer.step()
        for layer in self.layers.values():
            layer.invalidate()
        return float(loss.detach())

    def _error(self, step: int, samples: list[int] | tuple[int, ...]) -> torch.Tensor:
        """Relative squared error of the guided output against the teacher's (EfficientDM Eq. 7), at one step."""
        rows = list(samples) + ([i + self.rows_offset for i in samples] if self.sampler.guidance != 1.0 else [])
        self.clock.step = step
        inputs = self.trajectory.call(step, rows)
        target = self.sampler.guided(self.trajectory.outputs[step][rows])
        output = self.sampler.guided(self.denoise(inputs))
        return (output - target).square().sum() / target.square().sum()

    def _held_out_error(self) -> float:
        import torch

        steps = range(0, len(self.trajectory.timesteps), 2)
        with torch.no_grad():
            error = sum(float(self._error(step, self.held_out)) for step in steps) / len(steps)
        for layer in self.layers.values():
            layer.invalidate()
        return error

    def _tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}:{key}": p for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        return found

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._tensors().items()}

    def _restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._tensors().items():
            parameter.data.copy_(saved[name])
        for layer in self.layers.values():
            layer.invalidate()

    def _save(self, progress: Mapping[str, object]) -> None:
        import torch

        part = self.checkpoint.with_suffix(".part")
        torch.save({**progress, "state": self._state(), "optimizer": self.optimizer.state_dict()}, part)
        os.replace(part, self.checkpoint)
