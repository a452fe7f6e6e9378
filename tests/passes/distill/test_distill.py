"""Distillation heals the loss of rounding, resumes to the same result, and is merged as it was trained."""

import math
import re
from dataclasses import replace

import pytest
import torch
from distilling import check_merged_equals_trained
from harness import killed_at_save, run_pass
from quantizing import output_error, with_plan

from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.trainer import ROUND
from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, PLAN, QUANTIZED, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter, Quantized
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.processes import Processes
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.layer import Layer, structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme
from intaglio.pipeline.numerics.basis import Balance


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
