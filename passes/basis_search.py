"""Find the basis of an input in which rounding changes the output of its layers least.

Shapes: C input channels (the K in features of a linear layer), N out features, T denoising steps, S of them compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from intaglio.passes.layer_inputs import layer_inputs, siblings
from intaglio.passes.layer_ranges import expected_ends
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import FEW_BITS, Float, LayerScheme
from intaglio.pipeline.model.hooks import before_calls
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance, LayerBalance, in_groups
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.numerics.quality import decibels
from intaglio.pipeline.numerics.rounding import half_range
from intaglio.pipeline.numerics.step_tables import where_known
from intaglio.pipeline.simulation.layer import QuantizedLayer, channel_axis

if TYPE_CHECKING:
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.layer_types import LayerModule
    from intaglio.pipeline.model.types import Denoise
    from intaglio.pipeline.model.types import Inputs as DenoiserInputs

Parts: TypeAlias = "Mapping[str, tuple[LayerModule, LayerScheme]]"
"""Layers on one input, and their schemes, by name."""
Inputs: TypeAlias = "Sequence[torch.Tensor]"
"""Tensors that layers read in one call of the model."""


class Amounts(NamedTuple):
    """Numbers of timesteps, of rows of a call, and of tokens of a linear layer's input that are used."""

    steps: int
    rows: int
    tokens: int


SMALLEST_BLOCK = 16
"""Smallest number of channels that are rotated together: rotating fewer does not even them out."""


def some_tokens(inputs: Inputs, layer: LayerModule, tokens: int, generator: torch.Generator) -> Inputs:
    """Return one tensor (tokens, C) with some tokens of a linear layer's inputs; a convolution's inputs unchanged."""
    if channel_axis(layer) != -1:
        return inputs
    every = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    return [every[torch.randperm(len(every), generator=generator)[:tokens]]]


def candidates(
    parts: Parts, x: Sequence[Inputs], exponents: Sequence[float], block: int, ctx: Context
) -> Iterator[Balance]:
    """Yield every scaling of the channels, without and with a rotation after it, but not the present basis.

    d = max|w|^(1 - a) / max|x|^a, its geometric mean 1 (SmoothQuant Eq. 4, inverted), for each exponent a.
    """
    axis = _axis_of(parts)
    x_C = torch.stack([_largest(part, axis) for inputs in x for part in inputs]).amax(0)
    weights = [layer.weight.detach() for layer, _ in parts.values()]
    channels = len(x_C)
    w_C = torch.stack([_largest(in_groups(w, channels).transpose(1, 2).flatten(0, 1), 0) for w in weights]).amax(0)
    rotated = math.gcd(*(w.shape[1] for w in weights), 1 << (block.bit_length() - 1))
    flat = torch.ones(channels)
    for exponent in (None, *exponents):
        scale = flat if exponent is None else w_C ** (1 - exponent) / x_C**exponent
        scale = scale / scale.log().mean().exp()
        if exponent is not None:
            yield Balance(scale)
        if rotated >= SMALLEST_BLOCK:
            yield Balance.rotated(scale, rotated, ctx.torch_rng("signs", *parts))


def nearest(parts: Parts, x: Sequence[Inputs], bases: Sequence[Balance], rank: int = 0) -> tuple[Balance, float] | None:
    """Return the basis with the least error of the outputs, and its gain in dB; None if nothing can be gained."""
    plain = output_error(parts, x, None, rank)
    if plain == 0 or not bases:
        return None
    errors = [output_error(parts, x, basis, rank) for basis in bases]
    best = min(range(len(bases)), key=errors.__getitem__)
    return bases[best], decibels(plain / max(errors[best], 1e-30))


def with_ranges(
    chosen: Sequence[Mapping[str, tuple[Balance, float]]],
    layers: Mapping[str, LayerModule],
    denoise: Denoise,
    calls: Iterable[DenoiserInputs],
) -> list[dict[str, LayerBalance]]:
    """Return each basis with the range that the layer's input has in it at every step.

    If a layer is called several times in one step, its range covers all these calls.

    `chosen` has the basis and its gain for each layer, once or several times; `calls` are the inputs of the denoiser,
    one call for each step. The range of a few rows is widened, as calibration does it.
    """
    ends: list[dict[str, list[tuple[float, float] | None]]] = [{name: [] for name in each} for each in chosen]

    def note(name: str, args: tuple[torch.Tensor, ...]) -> None:
        for bases, found in zip(chosen, ends, strict=True):
            if name in bases:
                low, high = expected_ends(bases[name][0].input(args[0].detach(), channel_axis(layers[name])))
                before = found[name][-1] or (low, high)
                found[name][-1] = min(low, before[0]), max(high, before[1])

    read = {name: layers[name] for name in {name for each in chosen for name in each}}
    with before_calls(read, note), torch.no_grad():
        for call in calls:
            for found in ends:
                for each in found.values():
                    each.append(None)
            denoise(call)
    return [
        {n: LayerBalance(basis, *_ends(found[n]), gain) for n, (basis, gain) in bases.items()}
        for bases, found in zip(chosen, ends, strict=True)
    ]


def _ends(found: Sequence[tuple[float, float] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest values (T,); a step without calls has the widest range of the other steps."""
    low, high = ([None if each is None else each[end] for each in found] for end in (0, 1))
    return where_known(low, min), where_known(high, max)


@dataclass
class Group:
    """Layers that read the same input, and samples of it, for each compared timestep.

    If layers are called several times, the samples come from all inputs of the group's layers.
    """

    names: tuple[str, ...]
    x: list[Inputs]


def groups_of(
    layers: Mapping[str, LayerModule],
    denoise: Denoise,
    trajectory: Trajectory,
    amounts: Amounts,
    ctx: Context,
) -> list[Group]:
    """Return the layers that read the same input, together, with samples of it at the compared timesteps."""
    count, rows = len(trajectory.timesteps), trajectory.some_rows(amounts.rows)
    compared = tuple(dict.fromkeys((2 * i + 1) * count // (2 * amounts.steps) for i in range(amounts.steps)))
    groups: list[Group] = []
    with ctx.progress("inputs", len(compared)) as advance:
        for step in compared:
            inputs = layer_inputs(layers, denoise, trajectory.call(step, rows))
            known = {name for group in groups for name in group.names}
            groups += [Group(names, []) for names in siblings(inputs) if known.isdisjoint(names)]
            for group in groups:
                if (name := group.names[0]) in inputs:
                    generator = ctx.torch_rng("tokens", name, step)
                    read = _distinct(inputs, group.names)
                    group.x.append(some_tokens(read, layers[name], amounts.tokens, generator))
            advance()
    return groups


def _distinct(inputs: Mapping[str, Sequence[torch.Tensor]], names: Sequence[str]) -> list[torch.Tensor]:
    """Return every tensor that these layers read, once."""
    return list({id(x): x for name in names for x in inputs.get(name, ())}.values())


def _axis_of(parts: Parts) -> int:
    """Return the channel axis of the input that layers share."""
    layer, _ = next(iter(parts.values()))
    return channel_axis(layer)


def _largest(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the largest magnitude of each channel, at least 1e-5: a channel that is never used has a finite scale."""
    return values.abs().movedim(axis, 0).flatten(1).amax(1).clamp_min(1e-5)


def branch_of(layer: LayerModule, scheme: LayerScheme, basis: Balance | None, rank: int) -> Branch | None:
    """Return the branch of a weight in its basis, or None.

    A weight has none if it has more than FEW_BITS bits, is small, or belongs to a convolution in groups.
    """
    if not rank or scheme.weight_bits > FEW_BITS or min(layer.weight.flatten(1).shape) < 4 * rank:
        return None
    if getattr(layer, "groups", 1) > 1:
        return None
    w = layer.weight if basis is None else basis.weight(layer.weight)
    return Branch.of(w.flatten(1), rank)


def output_error(parts: Parts, x: Sequence[Inputs], basis: Balance | None, rank: int = 0) -> float:
    """Return the relative squared error of the layers' outputs, all rounded in the basis: the mean over S timesteps."""
    clock = StepClock(tuple(float(i) for i in range(len(x))))
    axis = _axis_of(parts)
    moved = [[part if basis is None else basis.input(part, axis) for part in inputs] for inputs in x]
    low_S = torch.stack([torch.stack([part.amin() for part in inputs]).amin() for inputs in moved])
    high_S = torch.stack([torch.stack([part.amax() for part in inputs]).amax() for inputs in moved])
    total = 0.0
    with torch.no_grad():
        for layer, scheme in parts.values():
            tables = LayerTables(torch.maximum(-low_S, high_S))
            if scheme.shifted:
                tables = LayerTables(*half_range(low_S, high_S))
            plain = scheme.model_copy(update={"output": Float()})
            branch = branch_of(layer, scheme, basis, rank)
            rounded = QuantizedLayer(layer, plain, clock, tables, balance=basis, branch=branch)
            for step, inputs in enumerate(x):
                y = [layer(part) for part in inputs]
                with clock.at(step):
                    errors = [(rounded(part) - each).square().sum() for part, each in zip(inputs, y, strict=True)]
                energy = torch.stack([each.square().sum() for each in y]).sum()
                error = torch.stack(errors).sum()
                total += float(error / energy.clamp_min(1e-30))
    return total / (len(x) * len(parts))
