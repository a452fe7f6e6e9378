from dataclasses import replace

import pytest
import torch
from assigning import EVERY, SAMPLES, costs, every_plan, given, loss, named
from harness import Artifacts, run_pass

from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.assign.quality import MORE_BYTES, MORE_DB, SLACK, SLOWER
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.pipeline.artifacts.keys import FRONT, MODEL, PLAN, SENSITIVITY
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.cost import work
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, W8A16
from intaglio.pipeline.numerics.basis import Balance, LayerBalance

ERRORS = ((1e-6, 5e-4), (2e-6, 3e-4), (3e-6, 9e-4), (1e-7, 2e-5), (4e-6, 1e-4))
OUTLIER = "transformer_blocks.1.ff.net.2"


def db_of(mse: float) -> float:
    return SAMPLES.psnr_db(mse)


def fastest(artifacts: Artifacts, most_loss: float, **limits: float) -> dict[str, str] | None:
    """Return the plan with the least latency, then bytes, then loss, the first two with 5 and 2 % to spare."""
    plans = [(costs(artifacts, p), loss(artifacts, p), p) for p in every_plan(artifacts)]
    left = [each for each in plans if each[1] <= most_loss and all(each[0][n] <= most for n, most in limits.items())]
    if not left:
        return None
    for cost, share in (("latency", SLOWER), ("size", SLACK)):
        least = min(each[0][cost] for each in left)
        left = [each for each in left if each[0][cost] <= least * (1 + share)]
    return min(left, key=lambda each: each[1])[2]


@pytest.mark.parametrize(("most", "gains"), [(2e-5, False), (3e-4, False), (2e-4, False), (7e-4, True), (1e-3, True)])
def test_the_plan_is_the_fastest_with_the_quality_and_then_the_smallest(most, gains, tmp_path):
    """All plans are compared. One with half the error is taken if it costs 2 % of time and 1/8 of the bytes at most."""
    artifacts = given(*ERRORS)
    best = fastest(artifacts, most)
    within = {n: costs(artifacts, best)[n] * (1 + more) for n, more in (("latency", SLACK), ("size", MORE_BYTES))}
    finer = fastest(artifacts, most / 10 ** (MORE_DB / 10), **within)
    assert (loss(artifacts, best) > most / 10**0.45 and finer is not None) == gains
    made = run_pass(AssignPrecision(budget=Budget(psnr=db_of(most)), schemes=EVERY), artifacts, tmp_path)
    assert named(made[PLAN]) == (finer if gains else best)
    assert made[FRONT].psnr_db(made[FRONT].chosen) >= db_of(most) - 1e-9


def test_without_a_device_time_is_the_work_of_products_and_passes():
    """32 x 64 products of 10 rows; per token three passes over 64 numbers, and one more for the channel scales."""
    layer = Layer(name="to_q", op="linear", shape=(32, 64), bias=True)
    products, numbers = 10 * 32 * 64, 10 * 64
    assert work(layer, FLOAT, 10) == work(layer, W8A16, 10) == 2 * products
    assert work(layer, W8A8_TOKEN, 10) == products + 3 * 8 * numbers
    assert work(layer, W8A8_TOKEN, 10, block=1) == products + 4 * 8 * numbers
    assert work(layer, W8A8_STEP, 10, block=16) == products + (2 * 8 + 8 + 2 * 16) * numbers


def test_a_quality_budget_needs_to_know_what_layers_are_called_with(tmp_path):
    artifacts = given(*ERRORS)
    step = AssignPrecision(budget=Budget(psnr=40), schemes=EVERY)
    with pytest.raises(RecipeError, match=r"assign\.budget\.psnr: needs the records of the calls"):
        run_pass(step, {SENSITIVITY: artifacts[SENSITIVITY], **_target(artifacts)}, tmp_path)


def _target(artifacts: Artifacts) -> Artifacts:
    return {key: artifacts[key] for key in AssignPrecision.requires if key != SENSITIVITY}


@pytest.mark.parametrize(
    ("plain_db", "best_db", "looked_for_db"), [(36.8, 49.3, 46.3), (36.8, 40.0, 37.0), (33.0, 34.0, 33.0)]
)
def test_a_network_that_loses_by_its_weights_alone_keeps_at_least_their_quality(plain_db, best_db, looked_for_db):
    from intaglio.passes.assign.quality import reachable_db

    assert reachable_db(plain_db, best_db) == pytest.approx(looked_for_db)


def test_a_size_budget_goes_before_the_quality(tmp_path, caplog):
    """0.4 of the bytes allow no plan of 60 dB: the plan with the least loss is taken."""
    artifacts = given(*ERRORS)
    within = [p for p in every_plan(artifacts) if costs(artifacts, p)["size"] <= 0.4]
    step = AssignPrecision(budget=Budget(psnr=60, size=0.4), schemes=EVERY)
    plan = run_pass(step, artifacts, tmp_path)[PLAN]
    assert named(plan) == min(within, key=lambda p: loss(artifacts, p))


def in_bases(*groups: tuple[str, ...]) -> Sensitivity:
    """Three layers on one input: `a` and `b` lose less in the scaled basis, `c` more."""
    layers = tuple(Layer(name=n, op="linear", shape=(32, 64), bias=False) for n in "abc")
    basis = LayerBalance(Balance(torch.full((64,), 2.0)), torch.zeros(1), torch.ones(1))
    losses = {"a": (5e-4, 1e-6), "b": (1e-5, 1e-6), "c": (1e-6, 2e-6)}
    label = "w8a8_token in scaled"
    return Sensitivity(
        ((0, 1),),
        (1.0,),
        layers,
        {n: {"float": FLOAT, "w8a8_token": W8A8_TOKEN, label: W8A8_TOKEN} for n in losses},
        {n: {"float": (0.0,), "w8a8_token": (plain,), label: (scaled,)} for n, (plain, scaled) in losses.items()},
        in_basis={n: {label: "scaled"} for n in losses},
        same_basis=groups,
        bases={"scaled": dict.fromkeys(losses, basis)},
        samples=SAMPLES,
    )


@pytest.mark.parametrize(("groups", "balanced"), [((), {"a", "b"}), ((("a", "b", "c"),), {"a", "b", "c"})])
def test_a_basis_is_chosen_with_the_scheme_and_shared_by_layers_on_one_input(groups, balanced, tmp_path):
    artifacts = given(*ERRORS[:3]) | {SENSITIVITY: in_bases(*groups)}
    step = AssignPrecision(budget=Budget(size=0.6), schemes={"linear": ("w8a8_token",)})
    plan = run_pass(step, artifacts | _workload("abc"), tmp_path)[PLAN]
    assert set(plan.balances) == balanced
    assert all(plan.balances[name].balance.scale_C.tolist() == [2.0] * 64 for name in balanced)


def _workload(names: str) -> Artifacts:
    from intaglio.pipeline.artifacts.keys import WORKLOAD
    from intaglio.pipeline.artifacts.workload import Workload

    return {WORKLOAD: Workload(dict.fromkeys(names, 16))}


@pytest.fixture(scope="module")
def with_outlier(calibrated, tmp_path_factory) -> Artifacts:
    """Errors of the tiny DiT's layers in W8A8 and with float inputs, in bases too; ranges are those of the samples."""
    names = ("w8a8_token", "w8a8_step", "w8a16")
    step = MeasureSensitivity(buckets=1, rows=4, samples=4, schemes=names, bases=("scaled", "rotated"))
    return calibrated | run_pass(step, calibrated, tmp_path_factory.mktemp("scratch"))


def test_errors_are_predicted_in_every_basis_and_kept(with_outlier, tmp_path):
    table = with_outlier[SENSITIVITY]
    assert set(table.bases) <= {"scaled", "rotated"}
    assert table.bases
    for basis, layers in table.bases.items():
        for name in layers:
            assert table.basis_of(name, f"w8a16 in {basis}") == basis
            assert table.total(name, f"w8a16 in {basis}") > 0
    assert all(set(group) <= {layer.name for layer in table.layers} for group in table.same_basis)
    table.save(tmp_path)
    again = Sensitivity.load(tmp_path)
    assert replace(again, bases={}) == replace(table, bases={})
    for basis, layers in table.bases.items():
        assert again.bases[basis].keys() == layers.keys()
        assert all(torch.equal(again.bases[basis][n].balance.scale_C, b.balance.scale_C) for n, b in layers.items())


@pytest.mark.parametrize(("sure_db", "starts"), [(100.0, {"choice": 4}), (0.0, {"choice": 4, "prediction": 4})])
def test_the_prediction_is_that_of_drawn_samples(sure_db, starts, with_outlier, tmp_path, monkeypatch):
    """The plan of W8A8 and float inputs is drawn again by another way: all layers replaced in the model at once.

    The prediction is from as many further samples too if its standard error is above SURE_DB.
    """
    from intaglio.passes.assign import quality
    from intaglio.pipeline.artifacts.keys import TRAJECTORY
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.calls import clocked, denoise_with
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.step_clock import StepClock
    from intaglio.pipeline.numerics.basis import bases_of
    from intaglio.pipeline.simulation.model import quantize_model
    from intaglio.pipeline.simulation.references import draw_starts

    schemes = {"linear": ("w8a8_token", "w8a16"), "conv": ("w8a8_step", "w8a16")}
    monkeypatch.setattr(quality, "SURE_DB", sure_db)
    step = AssignPrecision(budget=Budget(psnr=30), schemes=schemes, drawn=4, front=0)
    made = run_pass(step, with_outlier, tmp_path)
    plan, checkpoint, trajectory = made[PLAN], with_outlier[MODEL], with_outlier[TRAJECTORY]
    model = checkpoint.open()
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    ctx = Context(tmp_path, 0, None)
    parts = [part for label, count in starts.items() for part in draw_starts(sampler, count, ctx, label)]
    denoise, clock = denoise_with(model.module, model), StepClock(trajectory.timesteps)
    reference = torch.cat([sampler.sample(denoise, start) for start in parts])
    tables = trajectory.tables(plan.schemes, plan.balances)
    quantize_model(model.module, plan.schemes, clock, tables, bases_of(plan.balances))
    clocked_denoise = clocked(denoise, clock, sampler.names.timestep)
    samples = torch.cat([sampler.sample(clocked_denoise, start) for start in parts])
    peak = trajectory.samples.high - trajectory.samples.low
    errors = (samples - reference).flatten(1).square().mean(1)
    assert made[FRONT].psnr_db(made[FRONT].chosen) == pytest.approx(
        float((10 * (peak**2 / errors).log10()).mean()), abs=0.01
    )


def test_the_search_ends_where_no_plan_is_faster(with_outlier, tmp_path, caplog):
    """Every plan has 5 dB: one with float inputs is drawn, the fastest, and one that changes the worst layers."""
    schemes = {"linear": ("w8a8_token", "w8a8_step", "w8a16"), "conv": ("w8a8_step", "w8a16")}
    step = AssignPrecision(budget=Budget(psnr=5), schemes=schemes, drawn=4, front=0)
    with caplog.at_level("INFO"):
        run_pass(step, with_outlier, tmp_path)
    drawn = [line for line in caplog.messages if line.startswith("its 4 drawn samples have")]
    assert 1 <= len(drawn) <= 1 + 2
