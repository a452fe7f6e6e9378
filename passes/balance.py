"""Bring layers into a basis of their input in which rounding costs less: scaled channels, rotated blocks.

Shapes: C input channels (the K in features of a linear layer), N out features, T denoising steps, S of them compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from pydantic import Field

from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.formats.schemes import Float, LayerScheme, RoundedWeight
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.numerics.basis import Balance, LayerBalance
    from intaglio.pipeline.numerics.low_rank import Branch

Parts: TypeAlias = "Mapping[str, tuple[nn.Linear | nn.Conv2d, LayerScheme]]"
"""Layers on one input, and their schemes, by name."""
Inputs: TypeAlias = "Sequence[torch.Tensor]"
"""Tensors that layers read in one call of the model."""

SMALLEST_BLOCK = 16
"""Below this a rotation mixes too few channels to even them out."""


class BalanceLayers(Pass):
    """In exact numbers every layer computes what it did; its basis is the one in which its output is nearest to that.

    Channels are scaled first and rotated then, weights are rounded once, after both (ViDiT-Q section 4.2: the scale
    evens out what is static, the rotation what changes). Layers that read the same input share a basis. On request a
    part of low rank is taken off 4-bit weights first, and added in float (SVDQuant, Li et al. 2025).
    """

    name: ClassVar[str] = "balance"
    version: ClassVar[int] = 3
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "scipy")

    exponents: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7), description="shares of a channel's magnitude that move into the weight; all are compared"
    )
    block: int = Field(128, ge=1, le=4096, description="channels that are rotated together, at most; 1 rotates none")
    branch: int = Field(
        0,
        ge=0,
        description="rank of what stays in float16 of each 4-bit weight, its largest singular directions; 0: nothing."
        " Weights with less than four times as many channels, in or out, have none",
    )
    gain_db: float = Field(0.5, ge=0, description="least gain in SQNR that is worth the work in front of a layer")
    steps: int = Field(4, ge=1, description="timesteps at which bases are compared")
    rows: int = Field(4, ge=1, description="rows of a recorded call that are used")
    tokens: int = Field(512, ge=1, description="tokens of a linear layer's input that are used, at each timestep")

    def forward_rows(self, model: ModelCost) -> int:
        """The compared timesteps, and every timestep for the ranges in the new basis."""
        return (1 + self.steps) * self.rows + model.steps * self.rows

    def run(self, state: State, ctx: Context) -> Outputs:
        """Choose a balance for each layer where it lowers the rounding error."""
        from torch.nn import Conv2d, Linear

        from intaglio.passes.layer_inputs import layer_inputs, siblings
        from intaglio.pipeline.model.calls import denoise_with

        model, plan, trajectory = state[MODEL].open(), state[PLAN], state[TRAJECTORY]
        schemes = {n: s for n, s in trajectory.called(plan.schemes).items() if isinstance(s.weight, RoundedWeight)}
        layers = {n: m for n, m in model.module.named_modules() if n in schemes and isinstance(m, Linear | Conv2d)}
        denoise = denoise_with(model.module, model)
        rows = trajectory.some_rows(self.rows)
        count = len(trajectory.timesteps)
        compared = tuple(dict.fromkeys((2 * i + 1) * count // (2 * self.steps) for i in range(self.steps)))
        groups: list[_Group] = []
        with ctx.progress("inputs", len(compared)) as advance:
            for step in compared:
                inputs = layer_inputs(layers, denoise, trajectory.call(step, rows))
                known = {name for group in groups for name in group.names}
                groups += [_Group(names, []) for names in siblings(inputs) if known.isdisjoint(names)]
                for group in groups:
                    if (name := group.names[0]) in inputs:
                        group.x.append(self._sample(_distinct(inputs, group.names), layers[name], ctx, name, step))
                advance()
        chosen: dict[str, tuple[Balance, float]] = {}
        with ctx.progress("balance", len(groups)) as advance:
            for group in groups:
                parts = {name: (layers[name], schemes[name]) for name in group.names}
                if (best := self._choose(parts, group.x, ctx)) is not None:
                    chosen |= dict.fromkeys(group.names, best)
                advance()
        balances = self._with_ranges(
            chosen, layers, (layer_inputs(layers, denoise, trajectory.call(step, rows)) for step in range(count))
        )
        branches = {
            name: branch
            for name, scheme in schemes.items()
            if (branch := _branch(layers[name], scheme, chosen[name][0] if name in chosen else None, self.branch))
            is not None
        }
        gains = [gain for _, gain in chosen.values()]
        ctx.log.info(
            "%d of %d layers are balanced, %.1f dB gained on average",
            len(gains),
            len(layers),
            sum(gains) / max(1, len(gains)),
        )
        if branches:
            ctx.log.info("%d have a branch of rank %d", len(branches), self.branch)
        return {PLAN: plan.balanced(balances, branches)}

    def _sample(
        self, inputs: Sequence[torch.Tensor], layer: nn.Linear | nn.Conv2d, ctx: Context, name: str, step: int
    ) -> Inputs:
        """Some tokens of a linear layer's inputs, one (tokens, C); all places of a convolution's."""
        import torch

        from intaglio.pipeline.simulation.layer import channel_axis

        if channel_axis(layer) != -1:
            return inputs
        tokens = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
        picked = torch.randperm(len(tokens), generator=ctx.torch_rng("tokens", name, step))[: self.tokens]
        return [tokens[picked]]

    def _choose(self, parts: Parts, x: Sequence[Inputs], ctx: Context) -> tuple[Balance, float] | None:
        """The basis with the least error of the outputs, and what it gains in dB; None where that is too little."""
        plain = _error(parts, x, None, self.branch)
        bases = list(self._bases(parts, x, ctx))
        if plain == 0 or not bases:
            return None
        errors = [_error(parts, x, basis, self.branch) for basis in bases]
        best = min(range(len(bases)), key=errors.__getitem__)
        gain = 10 * math.log10(plain / max(errors[best], 1e-30))
        return (bases[best], gain) if gain > self.gain_db else None

    def _bases(self, parts: Parts, x: Sequence[Inputs], ctx: Context) -> Iterator[Balance]:
        """Every scale of channels, each without and with a rotation behind it; never the basis that is there.

        d = max|w|^(1 - a) / max|x|^a, its geometric mean 1 (SmoothQuant Eq. 4, inverted), for each exponent a.
        """
        import torch

        from intaglio.pipeline.numerics.basis import Balance

        axis = _axis_of(parts)
        x_C = torch.stack([_largest(part, axis) for inputs in x for part in inputs]).amax(0)
        w_C = torch.stack([_largest(layer.get_parameter("weight").detach(), 1) for layer, _ in parts.values()]).amax(0)
        channels = len(x_C)
        block = math.gcd(channels, 1 << (self.block.bit_length() - 1))
        rotates = block >= SMALLEST_BLOCK
        flat = torch.ones(channels)
        for exponent in (None, *self.exponents):
            scale = flat if exponent is None else w_C ** (1 - exponent) / x_C**exponent
            scale = scale / scale.log().mean().exp()
            if exponent is not None:
                yield Balance(scale)
            if rotates:
                yield Balance.rotated(scale, block, ctx.torch_rng("signs", *parts))

    def _with_ranges(
        self,
        chosen: Mapping[str, tuple[Balance, float]],
        layers: Mapping[str, nn.Linear | nn.Conv2d],
        calls: Iterator[Mapping[str, Inputs]],
    ) -> dict[str, LayerBalance]:
        """The bases with the ends of the inputs in them, at every step: over all calls of a layer at the step."""
        from intaglio.pipeline.numerics.basis import LayerBalance
        from intaglio.pipeline.numerics.step_tables import where_known
        from intaglio.pipeline.simulation.layer import channel_axis

        low: dict[str, list[float | None]] = {name: [] for name in chosen}
        high: dict[str, list[float | None]] = {name: [] for name in chosen}
        for inputs in calls:
            for name, (basis, _) in chosen.items():
                moved = [basis.input(x, channel_axis(layers[name])) for x in inputs.get(name, ())]
                low[name].append(min((x.min().item() for x in moved), default=None))
                high[name].append(max((x.max().item() for x in moved), default=None))
        return {
            n: LayerBalance(basis, where_known(low[n], min), where_known(high[n], max), gain)
            for n, (basis, gain) in chosen.items()
        }


@dataclass
class _Group:
    """Layers that read the same input, and samples of it, for each compared timestep.

    Where a layer is called several times, they are samples of all that the group's layers read.
    """

    names: tuple[str, ...]
    x: list[Inputs]


def _distinct(inputs: Mapping[str, Inputs], names: Sequence[str]) -> Inputs:
    """Every tensor that these layers read, once."""
    return list({id(x): x for name in names for x in inputs.get(name, ())}.values())


def _axis_of(parts: Parts) -> int:
    """The channels' axis of the input that layers share."""
    from intaglio.pipeline.simulation.layer import channel_axis

    layer, _ = next(iter(parts.values()))
    return channel_axis(layer)


def _largest(values: torch.Tensor, axis: int) -> torch.Tensor:
    """The largest magnitude of each channel, at least 1e-5: a channel that is never used has a finite scale."""
    return values.abs().movedim(axis, 0).flatten(1).amax(1).clamp_min(1e-5)


def _branch(layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, basis: Balance | None, rank: int) -> Branch | None:
    """Of a weight of fewer than 8 bits that is large enough."""
    from intaglio.pipeline.numerics.low_rank import Branch

    if not rank or scheme.weight_bits >= 8 or min(layer.weight.flatten(1).shape) < 4 * rank:
        return None
    w = layer.weight if basis is None else basis.weight(layer.weight)
    return Branch.of(w.flatten(1), rank)


def _error(parts: Parts, x: Sequence[Inputs], basis: Balance | None, rank: int = 0) -> float:
    """Squared error of the layers' outputs relative to them, all rounded in the basis; the mean over S timesteps."""
    import torch

    from intaglio.pipeline.model.step_clock import StepClock
    from intaglio.pipeline.numerics.rounding import half_range
    from intaglio.pipeline.simulation.layer import QuantizedLayer

    clock = StepClock(tuple(float(i) for i in range(len(x))))
    axis = _axis_of(parts)
    moved = [[part if basis is None else basis.input(part, axis) for part in inputs] for inputs in x]
    low_S = torch.stack([torch.stack([part.amin() for part in inputs]).amin() for inputs in moved])
    high_S = torch.stack([torch.stack([part.amax() for part in inputs]).amax() for inputs in moved])
    total = 0.0
    with torch.no_grad():
        for layer, scheme in parts.values():
            amax_S, shift_S = torch.maximum(-low_S, high_S), None
            if scheme.shifted:
                amax_S, shift_S = half_range(low_S, high_S)
            plain = scheme.model_copy(update={"output": Float()})
            branch = _branch(layer, scheme, basis, rank)
            rounded = QuantizedLayer(layer, plain, clock, amax_S, None, shift_S, basis, branch=branch)
            for clock.step, inputs in enumerate(x):
                y = [layer(part) for part in inputs]
                energy = torch.stack([each.square().sum() for each in y]).sum()
                error = torch.stack(
                    [(rounded(p) - each).square().sum() for p, each in zip(inputs, y, strict=True)]
                ).sum()
                total += float(error / energy.clamp_min(1e-30))
    return total / (len(x) * len(parts))
