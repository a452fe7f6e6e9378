"""Prepare a distillation: choose the first input scales, and the codes that the weights start from.

Shapes: N out features, K in features, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from intaglio.passes.distill.gptq import gptq, second_moment
from intaglio.passes.distill.objective import Task
from intaglio.passes.distill.trainable import InputScales, learn_input, start_from
from intaglio.passes.layer_inputs import layer_inputs, siblings
from intaglio.pipeline.formats.schemes import FEW_BITS, LayerScheme, RoundedInput, RoundedWeight
from intaglio.pipeline.model.blocks import find_blocks
from intaglio.pipeline.model.calls import denoise_with, on_device
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import bases_of
from intaglio.pipeline.simulation.model import full_precision, quantize_model
from intaglio.pipeline.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from intaglio.passes.distill.options import DistillOptions
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.types import Denoise
    from intaglio.pipeline.simulation.layer import QuantizedLayer

CLIPPING = tuple(1.0 - 0.05 * i for i in range(11))
"""Shares of an input's range that are compared to choose its first scale."""
START_ROWS = 8
"""Number of rows of a recorded call that the start is computed from."""


def begin(
    options: DistillOptions, checkpoint: Checkpoint, plan: QuantPlan, trajectory: Trajectory, ctx: Context
) -> tuple[Task, dict[str, torch.Tensor]]:
    """Return the quantized model at the start of the training, and the codes that `start_weights` returns."""
    # without updates, each weight is read once, for its scales; blocks are trained one at a time
    model = checkpoint.open(stored=None if options.by_block else not options.updates)
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    model.module.requires_grad_(False)
    clock = StepClock(trajectory.timesteps)
    schemes = trajectory.called(plan.schemes)
    tables = trajectory.tables(schemes, plan.balances)
    replaced = quantize_model(model.module, schemes, clock, tables, bases_of(plan.balances), plan.branches)
    model.module.to(ctx.device)
    for layer in replaced.values():
        layer.cache.keeps = options.updates > 0 and not isinstance(layer.layer.weight, StoredTensor)
    layers = {name: layer for name, layer in replaced.items() if isinstance(layer.scheme.weight, RoundedWeight)}
    denoise = on_device(denoise_with(model.module, model), ctx.device)
    if layers and options.input_rate:
        start_inputs(layers, denoise, trajectory, ctx)
    codes = start_weights(layers, denoise, trajectory, options.start, options.distance, ctx)
    return Task(options, sampler, denoise, clock, layers, trajectory, find_blocks(model.module), ctx), codes


def learns_input(scheme: LayerScheme) -> bool:
    """Return True if a layer's input gets trainable scales.

    8-bit inputs with a scale for each token do not get them, nor do inputs with one scale for all calls, nor those with
    headroom, whose accuracy does not depend on the range.
    """
    if isinstance(scheme.input, RoundedInput) and scheme.input.headroom > 1:
        return False
    return scheme.by_step or (scheme.by_token and scheme.input_bits < 8)


def start_inputs(every: Mapping[str, QuantizedLayer], denoise: Denoise, trajectory: Trajectory, ctx: Context) -> None:
    """Give layers trainable input scales, if their schemes learn them; siblings share them.

    Inputs below 8 bits start from the scales with the least squared error, inputs of 8 bits from the calibrated ones.
    """
    layers = {name: layer for name, layer in every.items() if learns_input(layer.scheme)}
    exact = [layer for layer in every.values() if learns_input(layer.scheme) or layer.scheme.by_step]
    rows = trajectory.some_rows(START_ROWS)
    few = {name: layer for name, layer in layers.items() if layer.scheme.input_bits < 8}
    steps = range(len(trajectory.timesteps) if few else 1)
    groups: list[tuple[str, ...]] = []
    factors: dict[tuple[str, ...], list[float]] = {}
    with full_precision(exact), ctx.progress("input scales", len(steps)) as advance:
        for step in steps:
            seen = layer_inputs(few if groups else layers, denoise, trajectory.call(step, rows))
            groups = groups or [tuple(names) for group in siblings(seen) for names in _alike(group, layers)]
            for names in groups:
                if names[0] in few:
                    layer = layers[names[0]]
                    inputs = [layer.balanced(x) for x in seen.get(names[0], ())]
                    with layer.clock.at(step):
                        errors = [sum(_input_error(layer, x, share) for x in inputs) for share in CLIPPING]
                    factors.setdefault(names, []).append(CLIPPING[min(range(len(errors)), key=errors.__getitem__)])
            advance()
    for names in groups:
        scales = InputScales(torch.tensor(factors.get(names) or [1.0] * len(trajectory.timesteps)))
        for name in names:
            learn_input(layers[name], scales)


def _alike(group: Sequence[str], layers: Mapping[str, QuantizedLayer]) -> Iterator[list[str]]:
    """Yield the layers of a group that round their input in the same way, together."""
    kinds: dict[object, list[str]] = {}
    for name in group:
        layer = layers[name]
        basis = None if layer.balance is None else layer.balance.key
        kinds.setdefault((layer.scheme.input, basis), []).append(name)
    yield from kinds.values()


def _input_error(layer: QuantizedLayer, x: torch.Tensor, share: float) -> float:
    """Return the squared error of the input, in its basis, when its range is cut to this share."""
    learn_input(layer, InputScales(torch.full((len(layer.clock.timesteps),), share)))
    assert layer.input_rounding is not None  # only rounded inputs learn
    with torch.no_grad():
        q, scale, amax, shift = layer.input_rounding(x)
        rounded = q * scale * amax + (0 if shift is None else shift)
        return float((rounded - x).square().sum())


def start_weights(
    layers: Mapping[str, QuantizedLayer],
    denoise: Denoise,
    trajectory: Trajectory,
    start: Literal["round", "gptq"],
    distance: float,
    ctx: Context,
) -> dict[str, torch.Tensor]:
    """Set the weights that the training starts from, at most `distance` scales from their codes.

    Returns these codes, (N, K), by layer name; empty if all layers start from the model's weights.
    """
    if start == "round" and distance > 0:
        return {}
    codes = {}
    moments: dict[str, torch.Tensor] = {}
    if start == "gptq":
        rows = trajectory.some_rows(START_ROWS)
        few = {name: layer for name, layer in layers.items() if layer.scheme.weight_bits <= FEW_BITS}
        steps = range(0, len(trajectory.timesteps), max(1, len(trajectory.timesteps) // 5))
        with ctx.progress("second moments", len(steps)) as advance, full_precision(layers.values()):
            for step in steps:
                for name, inputs in layer_inputs(few, denoise, trajectory.call(step, rows)).items():
                    layer = layers[name]
                    for x in inputs:
                        moment = second_moment(layer.layer, layer.balanced(x))
                        moments[name] = moments.get(name, torch.zeros(())) + moment
                advance()
    with ctx.progress("start of the weights", len(layers)) as advance:
        for name, layer in layers.items():
            weight = layer.weight_rounding
            codes[name] = layer.weight_codes()
            if name in moments:
                w_NK = weight.base(layer.layer.weight)
                codes[name] = gptq(w_NK, weight.code_scale(), weight.rounded_form.grid, moments[name])
            start_from(layer, codes[name], distance)
            advance()
    return codes
