"""The state that is kept is chosen by samples that the model draws."""

import math
from pathlib import Path

import pytest
import torch
from harness import Artifacts, killed_at_save, run_pass
from quantizing import with_plan

from intaglio.passes.calibrate import Calibrate
from intaglio.passes.distill.distill import Distill, samples_line
from intaglio.passes.distill.drawn import DrawnSamples
from intaglio.passes.distill.trainer import checks
from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.processes import Processes
from intaglio.pipeline.formats.layer import structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme, with_shift
from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import clocked, denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.cost import ModelCost
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.simulation.model import simulate
from intaglio.pipeline.simulation.references import draw_starts

OUTLIERS = Distill(updates=40, drawn=16, weighting="output", enough_db=1000)


def outliers(scratch: Path, factory: str = "make", scheme: LayerScheme = W8A8_STEP) -> Artifacts:
    """The network of outliers.py, its trajectories, and a plan with one scheme."""
    model = Checkpoint.resolve(ModelRef(path=f"outliers.py:{factory}", sampling_steps=2), Path(__file__).parents[2])
    start: Artifacts = {MODEL: model}
    start |= run_pass(Calibrate(samples=16), start, scratch)
    return with_plan(start, lambda _: scheme)


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Artifacts:
    return outliers(tmp_path_factory.mktemp("scratch"))


def sample_error(artifacts: Artifacts, scratch: Path) -> float:
    """Mean squared error of the merged model's samples, from the starts that the guard draws."""
    model = artifacts[MODEL].open()
    sampler, denoise = Sampler(model, 2, 1.0), denoise_with(model.module, model)
    starts: list[Start] = draw_starts(sampler, 16, Context(scratch=scratch, seed=0), "choice")
    with torch.no_grad():
        expected = torch.cat([sampler.sample(denoise, start) for start in starts])
        clock = simulate(model.module, run_pass(MergeAdapters(), artifacts, scratch)[QUANTIZED])
        samples = torch.cat([sampler.sample(clocked(denoise, clock, "timestep"), start) for start in starts])
    return float((samples - expected).square().mean())


def output_error(samples: DrawnSamples) -> float:
    """Relative error of the output on held-out calls of every second step: the guard of earlier versions."""
    task, errors = samples.task, []
    rows = list(task.split.held_out)
    for step in range(0, len(task.trajectory.timesteps), 2):
        with torch.no_grad(), task.clock.at(step):
            output, target = task.denoise(task.trajectory.call(step, rows)), task.trajectory.outputs[step][rows]
        errors.append(float((output - target).square().sum() / target.square().sum()))
    return sum(errors) / len(errors)


def test_a_better_output_with_worse_samples_is_not_kept(hard, tmp_path, monkeypatch):
    """The outliers make most of the output's error at the first step, the samples most of theirs at the second one."""
    rounded = sample_error(hard | run_pass(Distill(updates=0), hard, tmp_path / "a"), tmp_path / "m")
    kept = sample_error(hard | run_pass(OUTLIERS, hard, tmp_path / "b"), tmp_path / "m")
    assert kept <= rounded
    monkeypatch.setattr(DrawnSamples, "error", output_error)
    by_output = hard | run_pass(OUTLIERS, hard, tmp_path / "c")
    first, *_, last = by_output[ADAPTER].drawn
    assert last.mse < 0.8 * first.mse  # of the output
    assert sample_error(by_output, tmp_path / "m") > 1.05 * rounded


def test_the_errors_of_the_adapter_are_those_of_its_samples(hard, tmp_path, caplog):
    caplog.set_level("INFO")
    adapter = run_pass(OUTLIERS, hard, tmp_path / "a")[ADAPTER]
    assert [each.update for each in adapter.drawn] == [0, 20, 40]
    least = min(each.mse for each in adapter.drawn)
    assert sample_error(hard | {ADAPTER: adapter}, tmp_path / "b") == pytest.approx(least, rel=1e-3)  # float32
    start = 10 * math.log10(adapter.peak**2 / adapter.drawn[0].mse)
    assert f"samples: {start:.1f} dB at the start" in caplog.text


def test_a_plan_with_nothing_to_heal_is_not_trained(hard, tmp_path, caplog):
    caplog.set_level("INFO")
    adapter = run_pass(Distill(updates=40, drawn=4, enough_db=50), hard, tmp_path / "a")[ADAPTER]
    start = adapter.psnr_db(adapter.drawn[0])
    assert start > 50
    assert (adapter.loss, len(adapter.drawn), adapter.gain_db) == ((), 1, 0.0)
    assert f"no training is needed: the samples have {start:.1f} dB at the start, and 50 dB are enough" in caplog.text
    trained = run_pass(Distill(updates=2, drawn=4, enough_db=start + 1), hard, tmp_path / "b")[ADAPTER]
    assert len(trained.loss) == 2
    float_only = with_plan(hard, lambda _: FLOAT)
    assert run_pass(Distill(updates=40), float_only, tmp_path / "c")[ADAPTER].drawn == ()
    assert "no training is needed: the plan rounds no weights" in caplog.text


def test_training_ends_when_two_checks_in_a_row_find_no_better_samples(hard, tmp_path, monkeypatch):
    errors = iter([1.0, 0.5, 0.7, 0.5, 0.1])
    monkeypatch.setattr(DrawnSamples, "error", lambda _: next(errors))
    adapter = run_pass(Distill(updates=80, drawn=1), hard, tmp_path / "a")[ADAPTER]
    assert adapter.drawn == (DrawnError(0, 1.0), DrawnError(20, 0.5), DrawnError(40, 0.7), DrawnError(60, 0.5))
    assert len(adapter.loss) == 60
    assert adapter.kept.update == 20


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_state_with_worse_samples_leaves_the_start(scope, measured, tmp_path, monkeypatch):
    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a16",))[-1])
    start = run_pass(Distill(updates=0), planned, tmp_path / "a")
    errors = iter([1.0, math.inf])
    monkeypatch.setattr(DrawnSamples, "error", lambda _: next(errors))
    spoilt = run_pass(Distill(updates=20, samples=2, rank=2, scope=scope), planned, tmp_path / "b")
    updates = 20 if scope == "model" else 40  # of two blocks
    assert spoilt[ADAPTER].drawn == (DrawnError(0, 1.0), DrawnError(updates, math.inf))
    merged = [run_pass(MergeAdapters(), planned | s, tmp_path / "m")[QUANTIZED].layers for s in (start, spoilt)]
    for name, data in merged[0].items():
        assert torch.equal(merged[1][name].codes, data.codes), name
        assert torch.equal(merged[1][name].scale_NG, data.scale_NG), name


def test_the_line_says_which_state_is_kept():
    errors = DrawnError(0, 0.04), DrawnError(40, 0.004), DrawnError(60, 0.4)
    assert samples_line(Adapter({}, drawn=errors, peak=2.0)) == (
        "samples: 20.0 dB at the start; 30.0 dB after 40 updates, which is kept"
    )
    assert samples_line(Adapter({}, drawn=(errors[0], errors[2]), peak=2.0)) == (
        "samples: 20.0 dB at the start, which is kept; 10.0 dB after 60 updates"
    )


def test_checks_are_spread_over_the_updates_and_end_with_them():
    assert [checks(n) for n in (1, 20, 50, 120, 1000)] == [
        (1,),
        (20,),
        (20, 40, 50),
        (40, 60, 100, 120),
        (260, 500, 760, 1000),
    ]


def test_drawn_samples_count_in_the_estimate():
    model = ModelCost(layers=1, steps=20, rows_per_sample=2)
    assert Distill(updates=0).forward_rows(model) == 0
    assert Distill().forward_rows(model) == 3 * 120 * 8 * 2 + 6 * 4 * 20 * 2
    assert Distill(scope="block").forward_rows(model) == 3 * 120 * 8 * 2 + 3 * 4 * 20 * 2


def test_a_killed_training_resumes_with_its_errors(hard, tmp_path):
    whole = run_pass(OUTLIERS, hard, tmp_path / "a")[ADAPTER]
    with killed_at_save():
        run_pass(OUTLIERS, hard, tmp_path / "b")
    resumed: Adapter = run_pass(OUTLIERS, hard, tmp_path / "b")[ADAPTER]
    assert (resumed.drawn, resumed.peak, resumed.loss) == (whole.drawn, whole.peak, whole.loss)


def test_a_process_without_a_sample_of_its_own_draws_none(hard, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "agree", lambda _, value: value)
    monkeypatch.setattr(Processes, "gather", lambda _, value: [value, [(-1.0, 1.0)]])
    monkeypatch.setattr(Processes, "add", lambda _, tensors: [tensor.add_(1) for tensor in tensors])
    state = State({key: hard[key] for key in Distill.requires}, reader="distill")
    ctx = Context(scratch=tmp_path, seed=0, processes=Processes(index=0, count=2))
    adapter = Distill(updates=1, samples=2, drawn=1).run(state, ctx)[ADAPTER]
    assert isinstance(adapter, Adapter)
    assert adapter.drawn == (DrawnError(0, 1.0), DrawnError(1, 1.0))  # those of the other one


@pytest.mark.parametrize("scheme", [W8A8_STEP, with_shift(W8A8_STEP)], ids=lambda scheme: scheme.name)
def test_rates_follow_the_size_of_inputs_and_weights(scheme, tmp_path):
    """Inputs that are 64 times as large, with weights as much smaller, are trained by the same relative steps."""
    merged, losses = [], []
    for factory in ("make", "rescaled"):
        planned = outliers(tmp_path, factory, scheme)
        trained = run_pass(OUTLIERS, planned, tmp_path / f"train-{factory}")
        losses.append(trained[ADAPTER].loss)
        merged.append(run_pass(MergeAdapters(), planned | trained, tmp_path / "m")[QUANTIZED].layers["enter"])
    plain, large = merged
    assert losses[0] == losses[1]  # a factor of 2^6 is exact
    assert torch.equal(plain.codes, large.codes)
    assert torch.equal(plain.scale_NG, 64 * large.scale_NG)
    assert torch.equal(64 * plain.tables.amax_T, large.tables.amax_T)


def test_a_scale_moves_in_proportion_to_itself(hard, tmp_path, monkeypatch):
    """Not in proportion to the mean of all rows: a row of small weights would lose its sign."""
    errors = iter([1.0, 0.5, 0.25])  # so that the last state is kept
    monkeypatch.setattr(DrawnSamples, "error", lambda _: next(errors))
    before, after = (
        run_pass(OUTLIERS.model_copy(update={"updates": n, "scale_rate": 0.01}), hard, tmp_path / str(n))[ADAPTER]
        for n in (0, 40)
    )
    for name, layer in before.layers.items():
        change = (after.layers[name].scale_NG / layer.scale_NG - 1).abs()
        assert 0 < change.max() < 0.01 * 21  # 40 updates at a rate that falls to zero
    assert hard[PLAN].quantized == 3
