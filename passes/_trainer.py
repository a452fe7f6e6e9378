"""One distillation: where the layers start, and how they are trained.

Shapes: N out features, K in features, T denoising steps, R rows of a call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from intaglio.passes._gptq import gptq, second_moment
from intaglio.passes._layer_inputs import layer_inputs, siblings
from intaglio.pipeline.denoiser import Call, clocked
from intaglio.pipeline.quant import affine
from intaglio.pipeline.quant.modules import InputScales, QuantizedLayer, full_precision
from intaglio.pipeline.quant.spec import IntInput, IntWeight

if TYPE_CHECKING:
    from intaglio.passes.distill import Distill
    from intaglio.pipeline.context import Context
    from intaglio.pipeline.denoiser import Denoise, Inputs, Sampler
    from intaglio.pipeline.quant.modules import StepClock
    from intaglio.pipeline.trajectory import Trajectory

ROUND = 20
"""Updates between two checkpoints, after each of which the held-out error is measured and new states are rolled out."""
CLIPPING = tuple(1.0 - 0.05 * i for i in range(11))
"""Shares of an input's range that are compared as its first scale."""
START_ROWS = 8
"""Rows of a recorded call from which layers start."""


def start_inputs(layers: Mapping[str, QuantizedLayer], denoise: Denoise, trajectory: Trajectory, ctx: Context) -> None:
    """Give layers trainable input scales; siblings share them.

    At 4 bits the first are those of least squared error of the inputs, at 8 bits those that were calibrated.
    """
    rows = trajectory.some_rows(START_ROWS)
    four = {name: layer for name, layer in layers.items() if _input_bits(layer) == 4}
    steps = range(len(trajectory.timesteps) if four else 1)
    groups: list[tuple[str, ...]] = []
    factors: dict[tuple[str, ...], list[float]] = {}
    with full_precision(layers.values()), ctx.progress("input scales", len(steps)) as advance:
        for step in steps:
            seen = layer_inputs(four if groups else layers, denoise, trajectory.call(step, rows))
            groups = groups or [tuple(names) for group in siblings(seen) for names in _alike(group, layers)]
            for names in groups:
                if names[0] in four:
                    layer = layers[names[0]]
                    layer.clock.step = step
                    errors = [_input_error(layer, seen[names[0]], share) for share in CLIPPING]
                    factors.setdefault(names, []).append(CLIPPING[min(range(len(errors)), key=errors.__getitem__)])
            advance()
    for names in groups:
        scales = InputScales(torch.tensor(factors.get(names) or [1.0] * len(trajectory.timesteps)))
        for name in names:
            layers[name].learn_input(scales)


def _alike(group: Sequence[str], layers: Mapping[str, QuantizedLayer]) -> Iterator[list[str]]:
    """Those of a group that round their input in the same way."""
    kinds: dict[object, list[str]] = {}
    for name in group:
        layer = layers[name]
        basis = None if layer.balance is None else layer.balance.key
        kinds.setdefault((layer.scheme.input, basis), []).append(name)
    yield from kinds.values()


def _input_error(layer: QuantizedLayer, x: torch.Tensor, share: float) -> float:
    """Squared error of the input when its range is cut to this share."""
    layer.learn_input(InputScales(torch.full((len(layer.clock.timesteps),), share)))
    with torch.no_grad():
        q, amax, shift = layer.input_codes(x)
        rounded = q * affine.input_scale(_input_bits(layer)) * amax + (0 if shift is None else shift)
        return float((rounded - layer.balanced(x)).square().sum())


def _input_bits(layer: QuantizedLayer) -> Literal[4, 8]:
    assert isinstance(layer.scheme.input, IntInput)  # those that learn have rounded inputs
    return layer.scheme.input.bits


def start_weights(
    layers: Mapping[str, QuantizedLayer],
    denoise: Denoise,
    trajectory: Trajectory,
    start: Literal["round", "gptq"],
    distance: float,
    ctx: Context,
) -> dict[str, torch.Tensor]:
    """Move the layers to where training begins, at most `distance` scales from their codes.

    Returns these codes, (N, K), of the layers that do not begin at the model's weight.
    """
    if start == "round" and distance > 0:
        return {}
    codes = {}
    moments: dict[str, torch.Tensor] = {}
    if start == "gptq":
        rows = trajectory.some_rows(START_ROWS)
        four = {n: m for n, m in layers.items() if isinstance(m.scheme.weight, IntWeight) and m.scheme.weight.bits == 4}
        steps = range(0, len(trajectory.timesteps), max(1, len(trajectory.timesteps) // 5))
        with ctx.progress("second moments", len(steps)) as advance, full_precision(layers.values()):
            for step in steps:
                for name, x in layer_inputs(four, denoise, trajectory.call(step, rows)).items():
                    layer = layers[name]
                    moment = second_moment(layer.layer, layer.balanced(x))
                    moments[name] = moments.get(name, torch.zeros(())) + moment
                advance()
    with ctx.progress("start of the weights", len(layers)) as advance:
        for name, layer in layers.items():
            form = layer.scheme.weight
            assert isinstance(form, IntWeight)  # `layers` are those
            codes[name] = layer.weight_codes()
            if name in moments:
                codes[name] = gptq(layer.base_weight(), layer.code_scale(), form, moments[name])
            layer.start_from(codes[name], distance)
            advance()
    return codes


class Trainer:
    """What a resumed run needs is in the checkpoint or a function of the update's number."""

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
        self.options, self.sampler, self.denoise, self.clock = options, sampler, denoise, clock
        self.layers, self.trajectory, self.ctx = layers, trajectory, ctx
        count = trajectory.outputs.shape[1] // (2 if sampler.guidance != 1.0 else 1)
        self.held_out = tuple(range(7, count, 8)) or (0,)
        self.training = tuple(i for i in range(count) if i not in self.held_out) or (0,)
        self.rows_offset = count
        # gradients of a good start are as small as 1e-8: an epsilon of that size would be a learning rate of its own
        self.optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.99), eps=1e-15)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.checkpoint = ctx.scratch / "distill.pt"
        self.rolled: list[Inputs] = []

    def _groups(self) -> list[dict[str, object]]:
        """Parameters and their learning rates."""
        options = self.options
        code_scale = {name: layer.code_scale().detach().mean().item() for name, layer in self.layers.items()}
        mean = sum(code_scale.values()) / len(code_scale)
        groups: list[dict[str, object]] = []
        self.gradient_scales: list[tuple[torch.nn.Parameter, float]] = []
        seen: set[InputScales] = set()
        for name, layer in self.layers.items():
            adapter = [p for p in (layer.adapter_a, layer.adapter_b) if p is not None]
            own = code_scale[name] if options.scale_aware == "rate" else mean
            groups.append({"params": adapter, "lr": options.rate * own})
            if options.scale_aware == "gradient":
                self.gradient_scales += [(p, code_scale[name]) for p in adapter]
            for scale in (layer.weight_scale, layer.weight_group):
                if scale is not None:
                    scale.requires_grad_(True)
                    groups.append({"params": [scale], "lr": options.scale_rate * scale.detach().mean().item()})
            if (scales := layer.input_scales) is not None and scales not in seen:
                seen.add(scales)
                groups.append({"params": list(scales.parameters()), "lr": options.input_rate})
        return groups

    def train(self) -> tuple[float, ...]:
        """Loss of every update. Leaves the best held-out state in the layers."""
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
                if update % ROUND == 0 and self.options.rollout:
                    self._roll_out(update)
                loss.append(self._update(update))
                advance()
                if (update + 1) % ROUND == 0 or update + 1 == updates:
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
        if rng.random() < self.options.rollout:
            loss = self._rolled_error(step)
        else:
            loss = self._error(step, sorted(int(i) for i in picked))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
        for parameter, scale in self.gradient_scales:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.optimizer.step()
        self._invalidate()
        return float(loss.detach())

    def _roll_out(self, update: int) -> None:
        """The quantized model draws samples from new noise; its calls are what it will be corrected at."""
        start = self.sampler.start(self.options.samples, self.ctx.torch_rng("roll-out", update))
        denoise = clocked(self.denoise, self.clock, self.sampler.names.timestep)
        self.rolled = [call.inputs for call in self.sampler.drive(denoise, start) if isinstance(call, Call)]
        self._invalidate()

    def _rolled_error(self, step: int) -> torch.Tensor:
        """As `_error`, in a state that the quantized model reached."""
        self.clock.step = step
        inputs = self.rolled[step]
        with torch.no_grad(), full_precision(self.layers.values()):
            target = self.sampler.guided(self.denoise(inputs))
        return _relative(self.sampler.guided(self.denoise(inputs)), target)

    def _error(self, step: int, samples: Sequence[int]) -> torch.Tensor:
        """Relative squared error of the guided output against the teacher's (EfficientDM Eq. 7), at one step."""
        rows = list(samples) + ([i + self.rows_offset for i in samples] if self.sampler.guidance != 1.0 else [])
        self.clock.step = step
        target = self.sampler.guided(self.trajectory.outputs[step][rows])
        return _relative(self.sampler.guided(self.denoise(self.trajectory.call(step, rows))), target)

    def _held_out_error(self) -> float:
        steps = range(0, len(self.trajectory.timesteps), 2)
        with torch.no_grad():
            error = sum(float(self._error(step, self.held_out)) for step in steps) / len(steps)
        self._invalidate()
        return error

    def _invalidate(self) -> None:
        for layer in self.layers.values():
            layer.invalidate()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, by name."""
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}:{key}": p for key, p in layer.named_parameters() if p.requires_grad}
        return found

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._tensors().items()}

    def _restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._tensors().items():
            parameter.data.copy_(saved[name])
        self._invalidate()

    def _save(self, progress: Mapping[str, object]) -> None:
        part = self.checkpoint.with_suffix(".part")
        torch.save({**progress, "state": self._state(), "optimizer": self.optimizer.state_dict()}, part)
        os.replace(part, self.checkpoint)


def _relative(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """sum (y - y_ref)^2 / sum y_ref^2"""
    return (output - target).square().sum() / target.square().sum()
