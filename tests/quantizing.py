"""Quantizes a model as a plan says, without sensitivity or training, and runs the simulation layer by layer."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from harness import Artifacts

from intaglio.exporters._layer import entry_type, run_layer
from intaglio.pipeline.checkpoint import layer_table
from intaglio.pipeline.denoiser import denoise_with
from intaglio.pipeline.graph import Graph
from intaglio.pipeline.keys import MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.plan import Layer, QuantPlan
from intaglio.pipeline.quant.affine import group_integers
from intaglio.pipeline.quant.modules import QuantizedLayer, StepClock, quantize_model, simulate
from intaglio.pipeline.quant.spec import LayerScheme
from intaglio.pipeline.quantized import Quantized, QuantizedLayerData

HALF_TOLERANCE = 1e-3
"""Relative L2 error of a layer in float16: its weight, product, sum and bias are rounded, by 2^-11 / sqrt(3) each."""

Seen = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def with_plan(start: Artifacts, choose: Callable[[Layer], LayerScheme]) -> Artifacts:
    """`start` with a plan, and the integers that the layers get by rounding alone."""
    module, trajectory = start[MODEL].open().module, start[TRAJECTORY]
    layers = layer_table(module)
    plan = QuantPlan(layers, {layer.name: choose(layer) for layer in layers})
    made = quantize_model(module, plan.schemes, StepClock(trajectory.timesteps), *trajectory.ranges(plan.schemes))
    return start | {PLAN: plan, QUANTIZED: integers(made, trajectory.timesteps)}


def integers(layers: Mapping[str, QuantizedLayer], timesteps: tuple[float, ...]) -> Quantized:
    return Quantized(
        timesteps,
        {
            name: QuantizedLayerData(
                m.scheme,
                m.weight_codes(),
                m.weight_scale.detach(),
                getattr(m, "amax_T", None),
                None if m.weight_group is None else group_integers(m.weight_group),
                getattr(m, "output_amax_T", None),
                getattr(m, "shift_T", None),
            )
            for name, m in layers.items()
        },
    )


class Simulation:
    """The quantized layers; `at(step)` gives what enters and leaves each in the recorded call, and the prediction."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.trajectory = artifacts[TRAJECTORY]
        model = artifacts[MODEL].open()
        self.denoise = denoise_with(model.module, model)
        self.clock = simulate(model.module, artifacts[QUANTIZED])
        self.layers = {name: model.module.get_submodule(name) for name in artifacts[QUANTIZED].layers}
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, args, y, name=name: self.seen.__setitem__(name, (args[0], y)))

    def at(self, step: int) -> tuple[Seen, torch.Tensor]:
        self.clock.step = step
        with torch.no_grad():
            prediction = self.denoise(self.trajectory.call(step))
        return dict(self.seen), prediction


def parity(
    graph: Graph, name: str, layer: QuantizedLayer, x, y, step: int, *, optimize: bool
) -> tuple[float, int, int]:
    """Relative L2 error of a layer of the graph on x, how many of its input codes differ, and by how much.

    Where the layer takes float16, both have x as float16 holds it.
    """
    if entry_type(graph, name) == np.float16:
        x = x.detach().half().float()
        y = layer(x)
    found, codes = run_layer(graph, name, x.detach().numpy(), step, optimize=optimize)
    error = rel_l2(torch.from_numpy(found), y.detach())
    if codes is None:
        return error, 0, 0
    zero = 128 if codes.dtype == np.uint8 else 0
    off = np.abs(codes.astype(np.int32) - zero - layer.input_codes(x)[0].detach().numpy())
    return error, int(np.count_nonzero(off)), int(off.max())


def rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).norm() / reference.norm())
