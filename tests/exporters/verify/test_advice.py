"""The advice of `verify` for a plan that is worse than predicted."""

import math
from dataclasses import replace

import pytest
import torch
from assigning import given

from intaglio.exporters.verify.advice import largest_losses
from intaglio.exporters.verify.verify import Verify, _predicted_db, _predicted_error_db
from intaglio.pipeline.artifacts.front import Front, Point
from intaglio.pipeline.artifacts.keys import ADAPTER, FRONT, PLAN, SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
from intaglio.pipeline.artifacts.verification import VerificationFigures
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.formats.schemes import W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target


def planned():
    """Five layers in W8A8; `l4` makes 40 % of the loss, and `l2` 30 %."""
    artifacts = given((1e-6, 1), (2e-6, 1), (3e-6, 1), (1e-7, 1), (4e-6, 1), rows=(16,) * 5)
    layers = artifacts[SENSITIVITY].layers
    return artifacts | {PLAN: QuantPlan(layers, {layer.name: W8A8_TOKEN for layer in layers})}


def test_the_layers_that_lose_most_are_named_with_what_float_inputs_cost_there():
    """l4 has a third of all 120 x 64 weights: 40 of them; each layer has three passes over 64 numbers, of 8 each."""
    artifacts = planned()
    found = largest_losses(artifacts[SENSITIVITY], artifacts[PLAN], artifacts[WORKLOAD], artifacts[TARGET])
    share = 64 * (40 - 24) / (64 * (120 + 5 * 24))
    assert found == [
        f"l4, in 1 layers, makes 40% of the predicted loss (w8a16 there would add {share:.0%} to the time)",
        f"l2, in 1 layers, makes 30% of the predicted loss (w8a16 there would add {0:.0%} to the time)",
    ]


def test_samples_that_are_worse_than_predicted_are_a_warning():
    artifacts = planned()
    samples = artifacts[SENSITIVITY].samples
    front = Front((), Point({}, samples.mse(40.0), {}), samples)
    state = State(artifacts | {FRONT: front}, reader="verify")
    step = Verify()
    (warning,) = step._unpredicted(figures(38.4, 40.0), state)
    assert warning.startswith("the deployed samples have a PSNR of 38.4 dB, where 40.0 dB were predicted; l4, in 1")
    assert step._unpredicted(figures(38.6, 40.0), state) == ()
    assert step._unpredicted(figures(38.6, None), state) == ()
    assert step._unpredicted(figures(36.0, 40.0, error_db=2.1), state) == ()  # 4 dB are less than two standard errors
    assert step._unpredicted(figures(36.0, 40.0, error_db=1.9), state)


@pytest.mark.parametrize(("target", "rounding_db"), [("onnxruntime-cpu", 80.0), ("tensorrt-rtx", 48.0)])
def test_an_error_of_float_arithmetic_is_not_worse_than_predicted(target, rounding_db):
    """float32 is exact to 1e-4, float16 to 4e-3: 80 and 48 dB."""
    state = State(planned() | {TARGET: load_target(target)}, reader="verify")
    assert Verify()._unpredicted(replace(figures(60.0, 206.0), sqnr_db=rounding_db + 1), state) == ()
    assert Verify()._unpredicted(replace(figures(60.0, 206.0), sqnr_db=rounding_db - 1), state)


def test_predicted_and_deployed_psnr_are_of_different_samples_and_both_have_a_standard_error():
    """Deployed: 20, 26 and 32 dB, a standard deviation of 6 dB, so 3.464 dB for the mean of three; predicted: 2 dB."""
    artifacts = planned()
    front = Front((), Point({}, 1e-4, {}), artifacts[SENSITIVITY].samples, drawn_error_db=2.0)
    reference = torch.zeros(3, 1, 4)
    deployed = reference + 2 * 10 ** (-torch.tensor([20.0, 26.0, 32.0]) / 20)[:, None, None]
    samples = {"full_precision": reference, "deployed": deployed}
    error_db = _predicted_error_db(State(artifacts | {FRONT: front}, reader="verify"), samples, 2.0)
    assert error_db == pytest.approx(4.0, abs=1e-3)
    assert _predicted_error_db(State(artifacts, reader="verify"), samples, 2.0) is None


def test_what_training_gained_on_its_own_samples_is_added_to_the_prediction():
    artifacts = planned()
    samples = artifacts[SENSITIVITY].samples
    artifacts |= {FRONT: Front((), Point({}, samples.mse(40.0), {}), samples)}
    gained = {
        (): 40.0,
        (DrawnError(0, 1e-3), DrawnError(8, 1e-4), DrawnError(16, 2e-4)): 50.0,  # the kept state has a tenth
        (DrawnError(0, 1e-3), DrawnError(8, 2e-3)): 40.0,
        (DrawnError(0, math.inf), DrawnError(8, 1e-3)): 40.0,
    }
    for drawn, expected_db in gained.items():
        state = State(artifacts | {ADAPTER: Adapter({}, drawn=drawn, peak=2.0)}, reader="verify")
        assert _predicted_db(state) == pytest.approx(expected_db)
    assert _predicted_db(State(artifacts, reader="verify")) == pytest.approx(40.0)
    assert _predicted_db(State(planned(), reader="verify")) is None


def figures(psnr_db: float, predicted_db: float | None, error_db: float | None = None) -> VerificationFigures:
    return VerificationFigures(
        psnr_peak=2.0,
        psnr_db=psnr_db,
        psnr_db_min=30.0,
        psnr_simulated_db=psnr_db,
        sqnr_db=30.0,
        sqnr_db_min=30.0,
        sqnr_simulated_db=30.0,
        fidelity_gap_db=0.0,
        fidelity_gap_error_db=0.0,
        psnr_predicted_db=predicted_db,
        psnr_predicted_error_db=error_db,
        parity_rel_l2=0.0,
        parity_layer_rel_l2_max=0.0,
        fp16_bytes=1.0,
    )
