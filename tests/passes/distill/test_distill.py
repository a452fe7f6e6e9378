import math
import re
from dataclasses import replace

import pytest
import torch
from harness import killed_at_save, run_pass
from quantizing import output_error, with_plan

from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.drawn import DrawnSamples
from intaglio.passes.distill.gptq import gptq, second_moment
from intaglio.passes.distill.trainable import InputScales, learn_input
from intaglio.passes.distill.trainable import learnt as learnt_of
from intaglio.passes.distill.trainer import ROUND
from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter, Quantized
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.processes import Processes
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.layer import Layer, structural_schemes
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme, w4a8_token, w4a16, with_output, with_shift
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.numerics.basis import Balance, bases_of
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import quantize_model, simulate


@pytest.fixture(scope="module")
def planned(measured, tmp_path_factory):
    step = AssignPrecision(budget=Budget(size=0.42))
    return measured | run_pass(step, measured, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def distilled(planned, tmp_path_factory):
    return planned | run_pass(Distill(updates=40, samples=4, rank=4), planned, tmp_path_factory.mktemp("scratch"))


def test_distilling_heals_the_loss(planned, distilled, tmp_path):
    assert "w4a16" in {s.name for s in planned[PLAN].schemes.values()}
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    before = output_error(rounded | run_pass(MergeAdapters(), rounded, tmp_path / "b"))
    after = output_error(distilled | run_pass(MergeAdapters(), distilled, tmp_path / "c"))
    assert after < 0.9 * before


def test_killed_distillation_resumes_to_the_same_result(planned, distilled, tmp_path):
    step = Distill(updates=40, samples=4, rank=4)
    with killed_at_save():
        run_pass(step, planned, tmp_path)
    assert len(torch.load(tmp_path / "distill.pt", weights_only=True)["loss"]) == ROUND
    resumed = run_pass(step, planned, tmp_path)[ADAPTER]
    expected = distilled[ADAPTER]
    assert resumed.loss == expected.loss
    for name, layer in expected.layers.items():
        assert torch.equal(resumed.layers[name].scale_NG, layer.scale_NG)
        assert layer.b is not None
        assert torch.equal(resumed.layers[name].b, layer.b)


SAID = {"cut": "its end is missing", "flipped": "is damaged", "foreign": "to another run", "empty": "to another run"}


@pytest.mark.parametrize("damage", SAID)
def test_a_damaged_checkpoint_starts_the_training_again(damage, planned, tmp_path, caplog):
    step, file = Distill(updates=1, samples=2, rank=1), tmp_path / "distill.pt"
    expected = run_pass(step, planned, tmp_path)[ADAPTER].loss
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[:-100])
        case "flipped":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "foreign":
            saved = torch.load(file, weights_only=True)
            saved["state"] = saved["best"] = {name: value[None] for name, value in saved["state"].items()}
            torch.save(saved, file)
        case "empty":
            torch.save({}, file)
    assert run_pass(step, planned, tmp_path)[ADAPTER].loss == expected
    assert re.search(rf"distill: training starts again: .*distill.pt.*{SAID[damage]}", caplog.text)


def test_more_processes_than_samples_are_refused(planned, tmp_path):
    state = State({key: planned[key] for key in Distill.requires}, reader="distill")
    ctx = Context(scratch=tmp_path, seed=0, processes=Processes(index=0, count=5))
    with pytest.raises(RecipeError, match=r"5 processes share 4 samples an update"):
        Distill(samples=4).run(state, ctx)
    ctx = Context(scratch=tmp_path, seed=0, processes=Processes(index=0, count=2))
    with pytest.raises(RecipeError, match="2 processes share 1 held-out samples"):
        Distill(samples=4, scope="block").run(state, ctx)


def test_merged_model_equals_the_trained_one(distilled, tmp_path):
    check_merged_equals_trained(distilled, tmp_path)


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


def test_quantized_and_adapter_survive_the_store(distilled, tmp_path):
    quantized = run_pass(MergeAdapters(), distilled, tmp_path / "merge")[QUANTIZED]
    for artifact in (quantized, distilled[ADAPTER]):
        artifact.save(tmp_path)
    loaded = type(quantized).load(tmp_path)
    assert loaded.layers.keys() == quantized.layers.keys()
    assert all(torch.equal(loaded.layers[n].codes, layer.codes) for n, layer in quantized.layers.items())
    assert type(distilled[ADAPTER]).load(tmp_path).loss == distilled[ADAPTER].loss


def test_every_scale_stays_positive(distilled):
    assert all((layer.scale_NG > 0).all() for layer in distilled[ADAPTER].layers.values())


def test_eight_bits_never_get_worse_in_drawn_samples(measured, tmp_path):
    planned = measured | run_pass(AssignPrecision(budget=Budget(size=0.7)), measured, tmp_path / "p")
    start, *later = run_pass(Distill(updates=20, samples=4, rank=4), planned, tmp_path / "b")[ADAPTER].drawn
    assert [each.update for each in (start, *later)] == [0, 20]
    assert 0 < min(start.mse, *(each.mse for each in later)) <= start.mse


def test_a_training_that_makes_it_worse_leaves_the_starting_point(planned, tmp_path):
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    spoilt = planned | run_pass(Distill(updates=20, samples=2, rank=2, rate=100.0), planned, tmp_path / "b")
    assert spoilt[ADAPTER].loss[-1] > 10 * spoilt[ADAPTER].loss[0]
    start, kept = (run_pass(MergeAdapters(), s, tmp_path / "m")[QUANTIZED].layers for s in (rounded, spoilt))
    for name, data in start.items():
        assert torch.equal(kept[name].codes, data.codes), name
        assert torch.equal(kept[name].scale_NG, data.scale_NG), name


def test_two_levels_are_trained_and_survive_the_store(measured, tmp_path):
    def choose(layer):
        admitted = structural_schemes(layer, (32,), ("w4a8_token", "w4a8_step"))
        return admitted[-1] if "blocks.1" in layer.name else FLOAT

    layers = measured[SENSITIVITY].layers
    planned = measured | {PLAN: QuantPlan(layers, {layer.name: choose(layer) for layer in layers})}
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    trained = planned | run_pass(Distill(updates=40, samples=4, rank=4), planned, tmp_path / "b")
    merged = [s | run_pass(MergeAdapters(), s, tmp_path / "m") for s in (rounded, trained)]
    errors = [output_error(s) for s in merged]
    assert errors[1] < 0.9 * errors[0]
    name = "transformer_blocks.1.ff.net.2"
    data = merged[1][QUANTIZED].layers[name]
    assert not torch.equal(trained[ADAPTER].layers[name].group_NG, rounded[ADAPTER].layers[name].group_NG)
    assert data.group_NG.dtype == torch.int8
    assert 1 <= data.group_NG.min() <= data.group_NG.max() <= 8
    merged[1][QUANTIZED].save(tmp_path)
    trained[ADAPTER].save(tmp_path)
    loaded = Quantized.load(tmp_path).layers[name]
    assert torch.equal(loaded.codes, data.codes)
    assert torch.equal(loaded.group_NG, data.group_NG)
    again = Adapter.load(tmp_path).layers[name]
    assert torch.equal(again.group_NG, trained[ADAPTER].layers[name].group_NG)


def test_rounded_outputs_are_trained_through_and_survive_the_store(measured, tmp_path):
    layers, name = measured[SENSITIVITY].layers, "pos_embed.proj"
    schemes = {layer.name: with_output(W8A8_STEP) if layer.name == name else FLOAT for layer in layers}
    planned = measured | {PLAN: QuantPlan(layers, schemes)}
    trained = planned | run_pass(Distill(updates=2, samples=2, rank=2), planned, tmp_path / "a")
    quantized = run_pass(MergeAdapters(), trained, tmp_path / "m")[QUANTIZED]
    tables = quantized.layers[name].tables
    calibrated = measured[TRAJECTORY].tables({name: schemes[name]})[name]
    for part in ("output_amax_T", "output_share_N"):
        assert torch.equal(getattr(tables, part), getattr(calibrated, part))
    assert output_error(trained | {QUANTIZED: quantized}) < 0.01
    quantized.save(tmp_path)
    again = Quantized.load(tmp_path)
    assert again.layers[name].scheme == schemes[name]
    assert torch.equal(again.layers[name].tables.output_amax_T, tables.output_amax_T)
    assert torch.equal(again.layers[name].tables.output_share_N, tables.output_share_N)


def test_shifted_inputs_are_trained_and_survive_the_store(measured, tmp_path):
    layers, name = measured[SENSITIVITY].layers, "transformer_blocks.0.ff.net.2"
    schemes = {layer.name: with_shift(W8A8_STEP) if layer.op == "linear" else FLOAT for layer in layers}
    planned = measured | {PLAN: QuantPlan(layers, schemes)}
    trained = planned | run_pass(Distill(updates=2, samples=2, rank=2, input_rate=0), planned, tmp_path / "a")
    quantized = run_pass(MergeAdapters(), trained, tmp_path / "m")[QUANTIZED]
    tables = measured[TRAJECTORY].tables(schemes)[name]
    assert torch.equal(quantized.layers[name].tables.shift_T, tables.shift_T)
    assert torch.equal(quantized.layers[name].tables.amax_T, tables.amax_T)
    assert output_error(trained | {QUANTIZED: quantized}) < 0.01
    quantized.save(tmp_path)
    again = Quantized.load(tmp_path).layers[name]
    assert torch.equal(again.tables.shift_T, tables.shift_T)
    assert again.scheme == schemes[name]


def test_a_trained_shift_keeps_a_code_for_the_zeros_around_a_convolution():
    """The merged shift is the trained one, to the bit; the gradient passes the rounding of the shift."""
    clock, scheme = StepClock((900.0, 100.0)), with_shift(W8A8_STEP)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    tables = LayerTables(torch.tensor([3.14, 2.0]), torch.tensor([2.86, 0.3]))
    layer, scales = QuantizedLayer(conv, scheme, clock, tables), InputScales(torch.tensor([0.9, 0.5]))
    learn_input(layer, scales)
    scales.offset_T[0].data.fill_(-0.013)
    scales.offset_T[1].data.fill_(1.5)  # from 19 scales of 2 / 127: without zero, from 2.2992 to 4.2992
    merged = layer.tables.replaced_by(learnt_of(layer).tables).needed_by(scheme, padded=True)
    deployed = QuantizedLayer(conv, scheme, clock, merged)
    assert merged.amax_T.tolist() == pytest.approx([0.9 * 3.14, 4.2992 / 2], abs=1e-4)
    assert (merged.shift_T / merged.amax_T * 127).tolist() == pytest.approx([127, 127], abs=1e-4)
    x = torch.nn.functional.silu(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3)
    for step in range(2):
        with clock.at(step):
            assert torch.equal(layer(x), deployed(x))
            layer(x).square().sum().backward()
        assert scales.offset_T[step].grad.abs() > 0
        assert scales.log_factor[step].grad.abs() > 0


def test_training_keeps_the_zero_point_in_front_of_a_rounded_output():
    clock, scheme = StepClock((900.0, 100.0)), with_shift(with_output(W8A8_STEP))
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    tables = LayerTables(torch.tensor([3.14, 2.0]), torch.tensor([2.86, 1.8]), torch.tensor([4.0, 3.0]))
    layer, scales = QuantizedLayer(conv, scheme, clock, tables), InputScales(torch.tensor([0.9, 0.5]))
    before = layer.tables
    learn_input(layer, scales)
    scales.offset_T[0].data.fill_(0.3)
    merged = layer.tables.replaced_by(learnt_of(layer).tables).needed_by(scheme, padded=True)
    torch.testing.assert_close(merged.amax_T, before.amax_T * torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(merged.shift_T / merged.amax_T, before.shift_T / before.amax_T)
    deployed = QuantizedLayer(conv, scheme, clock, merged)
    x = torch.nn.functional.silu(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3)
    for step in range(2):
        with clock.at(step):
            assert torch.equal(layer(x), deployed(x))
            layer(x).square().sum().backward()
        assert scales.log_factor[step].grad.abs() > 0


def test_balanced_layers_are_trained_in_their_basis_and_survive_the_store(measured, tmp_path):
    def balance(layer: Layer) -> Balance:
        block = 16 if layer.shape[1] % 16 == 0 else 1
        return Balance.rotated(torch.full((layer.shape[1],), 0.7), block, torch.Generator().manual_seed(0))

    def choose(layer: Layer) -> LayerScheme:
        return structural_schemes(layer, (32,), ("w4a8_step",))[-1]

    planned = with_plan(measured, choose, balance)
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    trained = planned | run_pass(Distill(updates=40, samples=4, rank=4), planned, tmp_path / "b")
    loss = trained[ADAPTER].loss
    assert sum(loss[-5:]) < 0.5 * sum(loss[:5])
    check_merged_equals_trained(trained, tmp_path / "c")
    merged = run_pass(MergeAdapters(), rounded, tmp_path / "m")[QUANTIZED]
    for name, data in planned[QUANTIZED].layers.items():  # what is trained starts as what is rounded
        assert torch.equal(merged.layers[name].codes, data.codes)
        assert torch.equal(merged.layers[name].tables.amax_T, data.tables.amax_T)
    merged.save(tmp_path)
    error = output_error(rounded | {QUANTIZED: merged})
    assert error < 0.1  # squared, over 4 steps, at 4 bits a weight
    assert output_error(rounded | {QUANTIZED: Quantized.load(tmp_path)}) == error


def test_tables_can_have_other_timesteps(measured, tmp_path):
    layers, name = measured[SENSITIVITY].layers, "transformer_blocks.0.ff.net.2"
    schemes = {layer.name: W8A8_STEP if layer.name == name else FLOAT for layer in layers}
    planned = measured | {PLAN: QuantPlan(layers, schemes)}
    planned |= run_pass(Distill(updates=0), planned, tmp_path / "a")
    known, amax = measured[TRAJECTORY].timesteps, measured[TRAJECTORY].amax[name]
    plain, finer, other = (
        run_pass(MergeAdapters(**options), planned, tmp_path / "m")[QUANTIZED]
        for options in ({}, {"between": 1}, {"timesteps": (2000.0, known[0], 0.0)})
    )
    assert plain.timesteps == known
    assert torch.equal(plain.layers[name].tables.amax_T, amax)
    assert finer.timesteps[::2] == known
    assert torch.equal(finer.layers[name].tables.amax_T[::2], amax)
    torch.testing.assert_close(finer.layers[name].tables.amax_T[1], (amax[0] * amax[1]).sqrt())
    assert other.timesteps == (2000.0, known[0], 0.0)
    assert other.layers[name].tables.amax_T.tolist() == [amax[0], amax[0], amax[-1]]
    assert output_error(planned | {QUANTIZED: finer}) == output_error(planned | {QUANTIZED: plain})


def test_merge_refuses_a_scale_that_is_not_positive_and_what_is_no_number(distilled, tmp_path):
    from intaglio.pipeline.errors import StepFailed

    adapter = distilled[ADAPTER]
    name, layer = next(iter(adapter.layers.items()))
    spoilt = replace(adapter, layers={**adapter.layers, name: replace(layer, scale_NG=-layer.scale_NG)})
    with pytest.raises(StepFailed, match="a scale that is not positive"):
        run_pass(MergeAdapters(), {**distilled, ADAPTER: spoilt}, tmp_path)
    lost = replace(adapter, layers={**adapter.layers, name: replace(layer, b=layer.b * math.nan)})
    with pytest.raises(StepFailed, match=f"{name}: the merged weight has NaN"):
        run_pass(MergeAdapters(), {**distilled, ADAPTER: lost}, tmp_path)


@pytest.fixture(scope="module")
def four_bits(measured):
    """Weights and inputs in 4 bits: tokens in one block, a scale a step and a shift in the other."""

    def choose(layer: Layer) -> LayerScheme:
        name = "w4a4_token" if "blocks.0" in layer.name else "w4a4s_step"
        return structural_schemes(layer, (32,), (name,))[-1]

    return with_plan(measured, choose)


def test_learnt_input_scales_heal_and_are_merged(four_bits, tmp_path):
    plain = Distill(updates=60, samples=4, rank=4, input_rate=0)
    errors = []
    for step in (plain, plain.model_copy(update={"input_rate": 0.02})):
        trained = four_bits | run_pass(step, four_bits, tmp_path / f"{step.input_rate}")
        merged = run_pass(MergeAdapters(), trained, tmp_path / "m")[QUANTIZED]
        errors.append(output_error(trained | {QUANTIZED: merged}))
    assert errors[1] < errors[0]
    check_merged_equals_trained(trained, tmp_path / "c")
    tokens, steps = (merged.layers[f"transformer_blocks.{i}.ff.net.2"].tables for i in (0, 1))
    assert tokens.amax_T is None
    assert (tokens.factor_T > 0).all()
    assert (steps.amax_T > 0).all()
    name = "transformer_blocks.1.ff.net.2"
    assert not torch.equal(steps.shift_T, trained[TRAJECTORY].tables(trained[PLAN].schemes)[name].shift_T)
    merged.save(tmp_path)
    trained[ADAPTER].save(tmp_path)
    assert torch.equal(
        Quantized.load(tmp_path).layers["transformer_blocks.0.ff.net.2"].tables.factor_T, tokens.factor_T
    )
    assert torch.equal(Adapter.load(tmp_path).layers[name].tables.amax_T, trained[ADAPTER].layers[name].tables.amax_T)


def test_an_update_moves_the_scales_of_its_step_alone(four_bits, tmp_path, monkeypatch):
    errors = iter([1.0, 0.5])  # so that the state behind the update is kept
    monkeypatch.setattr(DrawnSamples, "error", lambda _: next(errors))
    name = "transformer_blocks.1.ff.net.2"
    before, after = (
        run_pass(Distill(updates=n, samples=2, rank=2, scale_rate=0), four_bits, tmp_path / str(n))[ADAPTER].layers[
            name
        ]
        for n in (0, 1)
    )
    for table in ("amax_T", "shift_T"):
        assert (getattr(before.tables, table) != getattr(after.tables, table)).sum() == 1


def test_siblings_share_their_input_scales(four_bits, tmp_path):
    learnt = run_pass(Distill(updates=20, samples=2, rank=2), four_bits, tmp_path)[ADAPTER].layers
    q, k, v = (learnt[f"transformer_blocks.0.attn1.to_{n}"].tables.factor_T for n in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)


def test_siblings_share_their_input_scales_when_their_bases_were_stored(measured, tmp_path):
    def balance(layer: Layer) -> Balance | None:
        scale_C = torch.full((layer.shape[1],), 0.7)
        return Balance(scale_C) if "to_" in layer.name else None

    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a4_token",))[-1], balance)
    planned[PLAN].save(tmp_path)
    stored = planned | {PLAN: QuantPlan.load(tmp_path)}
    learnt = run_pass(Distill(updates=20, samples=2, rank=2), stored, tmp_path / "a")[ADAPTER].layers
    q, k, v = (learnt[f"transformer_blocks.0.attn1.to_{n}"].tables.factor_T for n in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)


def test_gptq_codes_lose_less_of_the_output_than_the_nearest_ones():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 16, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(16, 64, generator=generator), requires_grad=False)
    mixing = torch.randn(64, 64, generator=generator)
    x = torch.randn(500, 8, generator=generator) @ mixing[:8] + 0.3 * torch.randn(500, 64, generator=generator)
    form = w4a16(32).weight
    scale = form.fit(layer.weight)[0]
    nearest = form.quantize(layer.weight, scale)
    found = gptq(layer.weight, scale, form.grid, second_moment(layer, x))
    assert found.min() >= form.low
    assert found.max() <= form.high

    def error(codes: torch.Tensor) -> float:
        return float((x @ (form.dequantize(codes, scale) - layer.weight).T).square().sum())

    assert error(found) < 0.5 * error(nearest)


@pytest.mark.parametrize(
    ("kind", "padding", "dilation"),
    [(torch.nn.Conv1d, 1, 1), (torch.nn.Conv2d, 1, 2), (torch.nn.Conv3d, "valid", 1)],
)
def test_the_second_moment_of_a_convolution_is_that_of_its_patches(kind, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    conv = kind(3, 5, 3, stride=2, padding=padding, dilation=dilation, bias=False)
    x = torch.randn(2, 3, *[8] * len(conv.stride), generator=generator)
    moment = second_moment(conv, x)
    w_NK = conv.weight.detach().flatten(1).double()
    energy = (w_NK @ moment @ w_NK.T).diagonal().sum()
    assert float(energy) == pytest.approx(float(conv(x).detach().square().sum()), rel=1e-5)


@pytest.mark.parametrize("base", ["float", "grid"])
def test_training_can_start_from_gptq_codes(measured, tmp_path, base):
    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a8_token",))[-1])
    name = "transformer_blocks.1.ff.net.2"
    assert planned[PLAN].schemes[name] == w4a8_token(32)
    step = Distill(updates=0, start="gptq", base=base)
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "r")
    started = planned | run_pass(step, planned, tmp_path / "s")
    codes = [run_pass(MergeAdapters(), s, tmp_path / "m")[QUANTIZED].layers[name].codes for s in (rounded, started)]
    assert torch.equal(codes[1], started[ADAPTER].layers[name].codes)
    assert not torch.equal(codes[0], codes[1])
    trained = planned | run_pass(step.model_copy(update={"updates": 20, "samples": 4}), planned, tmp_path / "t")
    errors = [output_error(s | run_pass(MergeAdapters(), s, tmp_path / "m")) for s in (rounded, started, trained)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.9 * errors[0]


def test_on_the_grid_a_small_adapter_moves_no_code(measured, tmp_path):
    """Why rates follow the weight's scale: the rounded weight and less than half a scale round to the same codes."""
    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a16",))[-1])
    step = Distill(updates=3, samples=2, rank=2, rate=1e-4, scale_rate=0, base="grid")
    trained = planned | run_pass(step, planned, tmp_path / "a")
    merged = run_pass(MergeAdapters(), trained, tmp_path / "m")[QUANTIZED]
    for name, layer in trained[ADAPTER].layers.items():
        if layer.codes is not None:
            assert torch.equal(merged.layers[name].codes, layer.codes)


def test_a_factor_on_the_gradient_cancels_in_adam(planned, tmp_path):
    """The rule of the paper's Eq. 8 and none at all train alike; as a rate it does not cancel.

    In the first updates: later on a last bit that moves a code to the next one moves all that follows.
    """
    losses = {
        rule: run_pass(Distill(updates=5, samples=4, rank=4, scale_aware=rule), planned, tmp_path / rule)[ADAPTER].loss
        for rule in ("off", "gradient", "rate")
    }
    assert losses["gradient"] == pytest.approx(losses["off"], rel=1e-2)
    assert losses["rate"] != pytest.approx(losses["off"], rel=5e-2)


def test_states_of_the_quantized_model_are_trained_on_and_resumed(planned, tmp_path):
    step = Distill(updates=40, samples=2, rank=2, rollout=0.5)
    whole = run_pass(step, planned, tmp_path / "whole")[ADAPTER]
    teacher_forced = run_pass(step.model_copy(update={"rollout": 0.0}), planned, tmp_path / "none")[ADAPTER]
    assert whole.loss != teacher_forced.loss
    with killed_at_save():
        run_pass(step, planned, tmp_path / "killed")
    assert run_pass(step, planned, tmp_path / "killed")[ADAPTER].loss == whole.loss
