"""A check of distillation: the merged model computes what the trained one does."""

import torch
from harness import run_pass

from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.numerics.basis import bases_of
from intaglio.pipeline.simulation.model import quantize_model, simulate


def check_merged_equals_trained(artifacts, folder) -> None:
    model, trajectory, adapter = artifacts[MODEL].open(), artifacts[TRAJECTORY], artifacts[ADAPTER]
    clock, plan = StepClock(trajectory.timesteps), artifacts[PLAN]
    tables = trajectory.tables(plan.schemes, plan.balances)
    tables |= {name: tables[name].replaced_by(learnt.tables) for name, learnt in adapter.layers.items()}
    layers = quantize_model(model.module, plan.schemes, clock, tables, bases_of(plan.balances))
    for name, learnt in adapter.layers.items():
        grid, start_NK = layers[name].weight_rounding, layers[name].weight_rounding.base(layers[name].layer.weight)
        grid.trained = lambda start_NK=start_NK, learnt=learnt: start_NK + learnt.b @ learnt.a
        grid.set_scales(learnt.scale_NG, learnt.group_NG)
    for module in model.module.modules():
        if isinstance(module, torch.nn.Embedding):  # kept in float16 by the graph, and so by its simulation
            module.weight.data = affine.half_table(module.weight.data).float()
    merged = artifacts[MODEL].open()
    merged_clock = simulate(merged.module, run_pass(MergeAdapters(), artifacts, folder)[QUANTIZED])
    with torch.no_grad(), clock.at(1), merged_clock.at(1):
        trained = denoise_with(model.module, model)(trajectory.call(1))
        deployed = denoise_with(merged.module, merged)(trajectory.call(1))
    assert torch.equal(trained, deployed)
