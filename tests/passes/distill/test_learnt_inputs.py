"""Scales and shifts of inputs and outputs are trained, merged as they were trained, and kept by the store."""

import pytest
import torch
from distilling import check_merged_equals_trained
from harness import run_pass
from quantizing import output_error, with_plan

from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.drawn import DrawnSamples
from intaglio.passes.distill.trainable import InputScales, learn_input
from intaglio.passes.distill.trainable import learnt as learnt_of
from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, PLAN, QUANTIZED, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter, Quantized
from intaglio.pipeline.formats.layer import Layer, structural_schemes
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme, with_output, with_shift
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.simulation.layer import QuantizedLayer


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
