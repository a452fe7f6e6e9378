"""What `verify` says of a plan that is worse than it was predicted to be."""

from assigning import given

from intaglio.exporters.verify.advice import largest_losses
from intaglio.exporters.verify.verify import Verify
from intaglio.pipeline.artifacts.front import Front, Point
from intaglio.pipeline.artifacts.keys import FRONT, PLAN, SENSITIVITY, TARGET, WORKLOAD
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.verification import VerificationFigures
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.formats.schemes import W8A8_TOKEN


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
    assert warning.startswith("the deployed samples have a PSNR of 38.4 dB, where assign predicted 40.0 dB; l4, in 1")
    assert step._unpredicted(figures(38.6, 40.0), state) == ()
    assert step._unpredicted(figures(38.6, None), state) == ()


def figures(psnr_db: float, predicted_db: float | None) -> VerificationFigures:
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
        parity_rel_l2=0.0,
        parity_layer_rel_l2_max=0.0,
        fp16_bytes=1.0,
    )
