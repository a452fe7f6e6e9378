import math
from statistics import fmean

import oracle
import pytest
import torch
from harness import run_pass
from torch import nn

from intaglio.passes.balance import BalanceLayers
from intaglio.passes.basis_search import candidates, nearest, output_error, some_tokens, with_ranges
from intaglio.passes.layer_inputs import layer_inputs
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a4_token
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance, bases_of
from intaglio.pipeline.numerics.rounding import group_integers
from intaglio.pipeline.simulation.model import quantize_model
from intaglio.pipeline.simulation.weight import WeightRounding


@pytest.fixture
def planned(calibrated):
    """The tiny DiT in W4A4 where its shapes admit it."""
    layers = layer_table(calibrated[MODEL].open().module)
    schemes = {n.name: w4a4_token(32) if n.op == "linear" and n.k % 32 == 0 and n.k > 32 else FLOAT for n in layers}
    return calibrated | {PLAN: QuantPlan(layers, schemes)}


@pytest.fixture
def outliers() -> tuple[nn.Linear, list[list[torch.Tensor]]]:
    """A layer one of whose 64 channels has inputs 50 times as large as the others, at each of two timesteps."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight.data = torch.randn(32, 64, generator=generator)
    x = torch.randn(2, 40, 64, generator=generator)
    x[..., 3] *= 50
    return layer, [[part] for part in x]


FORM = w4a4_token(32)


def error_by_the_oracle(layer: nn.Linear, x: torch.Tensor, basis: Balance | None) -> float:
    """Relative squared error of the output, computed in numpy from the formulas; the scales alone are the package's."""
    grid = WeightRounding.fitted(FORM.weight, layer.weight, basis)
    moved, w, bias = x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    exact = oracle.product(moved, w) + bias
    if basis is not None:
        d = basis.scale_C.numpy()
        moved, w = oracle.balanced(moved, d, basis.block, -1), oracle.balanced(w, 1 / d, basis.block, 1) / basis.block
    scale = grid.scale.detach().numpy()[:, 0]
    _, codes = oracle.two_level_codes(w, scale, group_integers(grid.group).numpy(), 32)
    y = oracle.layer(moved, codes, scale, bias, high=7).y
    return float(((y - exact) ** 2).sum() / (exact**2).sum())


def test_an_outlier_channel_is_evened_out_as_the_oracle_says(outliers, tmp_path):
    layer, x = outliers
    parts, ctx = {"a": (layer, FORM)}, Context(scratch=tmp_path, seed=0)
    bases = list(candidates(parts, x, (0.3, 0.5, 0.7), 128, ctx))
    basis, gain_db = nearest(parts, x, bases)
    found = [fmean(error_by_the_oracle(layer, part, each) for (part,) in x) for each in (None, *bases)]
    assert basis is bases[found.index(min(found)) - 1]
    assert gain_db == pytest.approx(10 * math.log10(found[0] / min(found)), abs=0.01)  # float32, and a tie
    assert gain_db > 3


def test_channels_that_are_never_used_have_finite_scales(outliers, tmp_path):
    layer, x = outliers
    for (part,) in x:
        part[:, 5] = 0
    layer.weight.data[:, 7] = 0
    parts, ctx = {"a": (layer, FORM)}, Context(scratch=tmp_path, seed=0)
    bases = list(candidates(parts, x, (0.3, 0.5, 0.7), 128, ctx))
    assert all(math.isfinite(output_error(parts, x, basis)) for basis in bases)
    assert all(basis.scale_C.isfinite().all() and (basis.scale_C != 0).all() for basis in bases)
    _, gain_db = nearest(parts, x, bases)
    assert gain_db > 3


def test_a_linear_layer_may_read_images_whose_channels_are_last():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    (tokens,) = some_tokens([x], layer, 512, torch.Generator().manual_seed(0))
    assert sorted(map(tuple, tokens.tolist())) == sorted(map(tuple, x.reshape(-1, 32).tolist()))
    basis = Balance(torch.linspace(0.5, 2, 32))
    (ranges,) = with_ranges([{"a": (basis, 1.0)}], {"a": layer}, lambda call: layer(call["x"]), [{"x": x[:1]}])
    moved = x[:1] * torch.linspace(0.5, 2, 32)
    found = ranges["a"]
    assert (found.low_T.tolist(), found.high_T.tolist()) == ([float(moved.min())], [float(moved.max())])


def test_a_basis_that_gains_too_little_is_not_taken(planned, tmp_path):
    plan = run_pass(BalanceLayers(steps=1, rows=2, gain_db=60), planned, tmp_path)[PLAN]
    assert plan.balances == {}


def test_every_scale_comes_with_and_without_a_rotation(outliers, tmp_path):
    layer, x = outliers
    ctx = Context(scratch=tmp_path, seed=0)
    parts = {"a": (layer, W8A8_TOKEN)}
    assert [basis.block for basis in candidates(parts, x, (0.5,), 128, ctx)] == [64, 1, 64]
    assert [basis.block for basis in candidates(parts, x, (0.5,), 1, ctx)] == [1]


def test_layers_on_one_input_share_a_basis_and_the_model_gets_nearer(planned, tmp_path):
    plan = run_pass(BalanceLayers(steps=2, rows=2, gain_db=0.0), planned, tmp_path)[PLAN]
    first = [plan.balances[f"transformer_blocks.0.attn1.to_{i}"].balance for i in "qkv"]
    assert first[0].block == first[1].block == first[2].block
    assert torch.equal(first[0].scale_C, first[1].scale_C)
    assert torch.equal(first[0].scale_C, first[2].scale_C)
    trajectory = planned[TRAJECTORY]

    def error(balances) -> float:
        model = planned[MODEL].open()
        clock = StepClock(trajectory.timesteps)
        tables = trajectory.tables(plan.schemes, balances)
        quantize_model(model.module, plan.schemes, clock, tables, bases_of(balances))
        with torch.no_grad(), clock.at(1):
            return float((denoise_with(model.module, model)(trajectory.call(1)) - trajectory.outputs[1]).norm())

    assert error(plan.balances) < error({})
    assert all(balance.gain_db > 0 for balance in plan.balances.values())


def test_ranges_are_those_of_the_new_basis_at_every_step(planned, tmp_path):
    name = "transformer_blocks.1.ff.net.2"
    steps = planned | {PLAN: planned[PLAN].replace({name: W8A8_STEP})}
    plan = run_pass(BalanceLayers(steps=1, rows=16, gain_db=0.0, exponents=(0.9,), block=1), steps, tmp_path)[PLAN]
    chosen = plan.balances[name]
    model = planned[MODEL].open()
    layers = {name: model.module.get_submodule(name)}
    (seen,) = layer_inputs(layers, denoise_with(model.module, model), planned[TRAJECTORY].call(2))[name]
    moved = seen * chosen.balance.scale_C
    assert chosen.low_T[2] == moved.min()
    assert chosen.high_T[2] == moved.max()


def test_a_branch_takes_what_is_large_of_a_weight_of_4_bits(planned, tmp_path):
    """Its layers are nearer than without; what it costs is counted, and it is there again when the plan is read."""
    names = [f"transformer_blocks.0.attn1.to_{i}" for i in "qkv"]
    eight = "transformer_blocks.1.ff.net.2"
    mixed = planned | {PLAN: planned[PLAN].replace({eight: W8A8_TOKEN})}
    plan = run_pass(BalanceLayers(steps=1, rows=2, branch=4), mixed, tmp_path)[PLAN]
    assert set(names) <= plan.branches.keys()
    assert eight not in plan.branches
    layers = {layer.name: layer for layer in plan.layers}
    n, k = layers[names[0]].shape
    added = plan.layer_bytes(layers[names[0]]) - layers[names[0]].size_bytes(plan.schemes[names[0]])
    assert (n, k, added) == (64, 64, 4 * (64 + 64) * 2)
    assert plan.size_bytes == sum(map(plan.layer_bytes, plan.layers))
    model, trajectory = planned[MODEL].open(), planned[TRAJECTORY]
    modules = {name: model.module.get_submodule(name) for name in names}
    ((x,), *_) = layer_inputs(modules, denoise_with(model.module, model), trajectory.call(1)).values()
    parts = {name: (modules[name], plan.schemes[name]) for name in names}
    assert output_error(parts, [[x]], None, 4) < 0.9 * output_error(parts, [[x]], None)
    plan.save(tmp_path)
    read = QuantPlan.load(tmp_path).branches
    assert read.keys() == plan.branches.keys()
    assert torch.equal(read[names[0]].up_NR, plan.branches[names[0]].up_NR)
    assert names[0] not in plan.replace({names[0]: FLOAT}).branches
