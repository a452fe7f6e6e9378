"""Run the updates of a distillation, save checkpoints, and keep the state with the least error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from intaglio.passes.distill.objective import total_loss
from intaglio.passes.distill.trainable import input_scales, trained_weight
from intaglio.passes.imports.torch_file import load_torch_file
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE

if TYPE_CHECKING:
    from intaglio.passes.distill.objective import Objective
    from intaglio.passes.distill.options import DistillOptions
    from intaglio.passes.distill.trainable import InputScales, TrainedWeight
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.simulation.layer import QuantizedLayer

ROUND = 20
"""Number of updates between two checkpoints. At each, the quantized model draws new trajectories (`rollout`)."""
CHECKS = 4
"""Number of times, at most, that the error is measured after the start."""
PATIENCE = 2
"""Number of checks in a row without a smaller error after which the training ends."""


def checks(updates: int) -> tuple[int, ...]:
    """Return the numbers of updates after which the error is measured: evenly spread ends of rounds, and all updates.

    >>> checks(120), checks(40), checks(5)
    ((40, 60, 100, 120), (20, 40), (5,))
    """
    rounds = math.ceil(updates / ROUND)
    return tuple(sorted({min(math.ceil(rounds * k / CHECKS) * ROUND, updates) for k in range(1, CHECKS + 1)}))


class Trainer:
    """Trains some layers on one objective. `error` measures the state that they are in.

    A resumed run reads its state from the checkpoint; its random draws depend on the number of the update alone. Each
    process computes a share of an update's rows; the summed gradients equal those of one process, up to the order of
    float32 sums.
    """

    def __init__(
        self,
        options: DistillOptions,
        layers: Mapping[str, QuantizedLayer],
        objective: Objective,
        error: Callable[[], float],
        ctx: Context,
        name: str = "distill",
    ) -> None:
        self.options, self.layers, self.objective, self.error, self.ctx = options, layers, objective, error, ctx
        self.name = name
        self.errors: dict[int, float] = {}
        """Error at the start, which is update 0, and at each check so far."""
        # gradients of a good start are as small as 1e-8: an epsilon of that size would shrink the updates
        self.optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.99), eps=1e-15)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.training_state = ctx.scratch / f"{name}.pt"
        self.tensors = {
            f"{name}:{key}": p for name, part in layers.items() for key, p in part.named_parameters() if p.requires_grad
        }
        """The trained parameters by name."""
        self.start = self._state()

    def _groups(self) -> list[dict[str, object]]:
        """Return the parameters and their learning rates. Input scales that an earlier training froze stay fixed."""
        options = self.options
        code_scale = {
            name: layer.weight_rounding.code_scale().detach().mean().item() for name, layer in self.layers.items()
        }
        mean = sum(code_scale.values()) / len(code_scale)
        groups: list[dict[str, object]] = []
        self.gradient_scales: list[tuple[torch.nn.Parameter, float]] = []
        self.sizes: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        """Scales of weights, with their elements relative to the mean at the start."""
        seen: set[InputScales] = set()
        for name, layer in self.layers.items():
            grid, weight = layer.weight_rounding, trained_weight(layer)
            own = code_scale[name] if options.scale_aware == "rate" else mean
            if weight is not None and weight.a is not None and weight.b is not None:
                groups.append({"params": [weight.a], "lr": options.rate * own * _relative_size(weight.a, weight, own)})
                groups.append({"params": [weight.b], "lr": options.rate * own})
                if options.scale_aware == "gradient":
                    self.gradient_scales += [(p, code_scale[name]) for p in (weight.a, weight.b)]
            for scale in (grid.scale, grid.group):
                if scale is not None:
                    size = scale.detach().mean()
                    scale.requires_grad_(True)
                    self.sizes.append((scale, scale.detach() / size))
                    groups.append({"params": [scale], "lr": options.scale_rate * size.item()})
            if (scales := input_scales(layer)) is not None and scales not in seen:
                seen.add(scales)
                if parameters := [p for p in scales.parameters() if p.requires_grad]:
                    groups.append({"params": parameters, "lr": options.input_rate})
        return groups

    def train(self) -> tuple[float, ...]:
        """Train the layers, and leave the state with the least error in them. Returns the loss of every update.

        The training ends before the last update if the error has stopped falling.
        """
        loss: list[float] = []
        best = self.start
        ctx, updates = self.ctx, self.options.updates
        saved = self._saved()
        if saved is None:
            if 0 not in self.errors:
                self._measure(0)
        else:
            self.restore(saved["state"])
            self.optimizer.load_state_dict(saved["optimizer"])
            loss, self.errors, best = saved["loss"], saved["errors"], saved["best"]
        with ctx.progress(self.name, updates) as advance:
            advance(len(loss))
            for update in range(len(loss), updates):
                if self.stalled:
                    break
                if update % ROUND == 0:
                    self.objective.prepare(update)
                    self._invalidate()
                loss.append(self._update(update))
                advance()
                if update + 1 in checks(updates):
                    self._measure(update + 1)
                    if self.kept == update + 1:
                        best = self._state()
                if (update + 1) % ROUND == 0 or update + 1 == updates:
                    self._save({"loss": loss, "errors": self.errors, "best": best})
        self.restore(best)
        return tuple(loss)

    def _measure(self, update: int) -> None:
        self.errors[update] = self.error()
        self._invalidate()  # drops the weights that were rounded without gradients

    @property
    def kept(self) -> int:
        """Number of updates with the least error so far, the smallest of equal ones."""
        return min(self.errors, key=self.errors.__getitem__)

    @property
    def stalled(self) -> bool:
        """True if the last PATIENCE checks found no error smaller than those before them."""
        errors = list(self.errors.values())
        return len(errors) > PATIENCE and min(errors[-PATIENCE:]) >= min(errors[:-PATIENCE])

    def _update(self, update: int) -> float:
        processes = self.ctx.processes
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - update / self.options.updates)
        self.optimizer.zero_grad(set_to_none=True)
        loss = total_loss(self.objective.errors(self.ctx.rng("update", update)), processes)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
        # input scales of other steps have no gradient, in all processes alike
        moved = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = loss.detach()
        processes.add([p.grad for p in moved] + [total])
        for parameter, scale in self.gradient_scales:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        before = [p.detach().clone() for p, _ in self.sizes]
        self.optimizer.step()
        for (parameter, size), start in zip(self.sizes, before, strict=True):
            parameter.data = torch.lerp(start, parameter.data, size)
        self._invalidate()
        return float(total)

    def _invalidate(self) -> None:
        for layer in self.layers.values():
            layer.cache.clear()

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.tensors.items()}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put this state into the layers."""
        for name, parameter in self.tensors.items():
            parameter.data.copy_(saved[name])
        self._invalidate()

    def _saved(self) -> dict[str, Any] | None:
        """Return the checkpoint of a stopped run; None if it is missing, damaged or from another run."""
        if not self.ctx.processes.agree(self.training_state.exists()):
            return None
        reason = f"{self.training_state.name} belongs to another run"
        try:
            saved = load_torch_file(self.training_state)
            if self._fits(saved):
                return saved
        except RecipeError as error:
            reason = str(error)
        except DAMAGE:  # the file does not have the content that this training saves
            pass
        self.ctx.log.warning("%s: training starts again: %s", self.name, reason)
        return None

    def _fits(self, saved: Any) -> TypeGuard[dict[str, Any]]:
        """Return True if a checkpoint fits this training: its parameters, optimizer and number of updates match."""
        own = {name: parameter.shape for name, parameter in self.tensors.items()}
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        state, groups = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
        moments = [(i, each[part].shape) for i, each in state.items() for part in ("exp_avg", "exp_avg_sq")]
        counts = [len(group["params"]) for group in self.optimizer.param_groups]
        return (
            all({name: value.shape for name, value in saved[part].items()} == own for part in ("state", "best"))
            and all(value.isfinite().all() for part in ("state", "best") for value in saved[part].values())
            and [len(group["params"]) for group in groups] == counts
            and all(shape == parameters[index].shape for index, shape in moments)
            and all(type(each) is float for each in (*saved["loss"], *saved["errors"].values()))
            and 0 < len(saved["loss"]) <= self.options.updates
            and list(saved["errors"]) == [0, *(n for n in checks(self.options.updates) if n <= len(saved["loss"]))]
        )

    def _save(self, progress: Mapping[str, object]) -> None:
        if not self.ctx.processes.first:
            return
        part = self.training_state.with_suffix(".part")
        torch.save({**progress, "state": self._state(), "optimizer": self.optimizer.state_dict()}, part)
        os.replace(part, self.training_state)


def _relative_size(a: torch.Tensor, weight: TrainedWeight, code_scale: float) -> float:
    """Return the ratio of the size of A to the size of the weight that B A is added to.

    The learning rate of A is multiplied by it, so that A changes by the same share per update in every layer. A weight
    smaller than one scale counts as one scale. The result is near 1 for weights of the usual size, 1 / sqrt(K).
    """
    rms_a, rms_w = (float(each.detach().square().mean().sqrt()) for each in (a, weight.start_NK))
    return rms_a / max(rms_w, code_scale)
