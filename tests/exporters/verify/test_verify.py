"""The deployed graph is compared with its simulation, and a difference is found and named."""

import re
from dataclasses import replace

import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import HALF_TOLERANCE, with_plan

from intaglio.exporters.measure.benchmark import MeasureLatency
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.verify.verify import BETWEEN_HALVES, Verify, _distances, layers_in_float
from intaglio.pipeline.artifacts.keys import GRAPH, LATENCY, QUANTIZED, TARGET, VERIFICATION
from intaglio.pipeline.artifacts.verification import Verification, VerificationFigures
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.layer import structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target

OPTIONS = {"samples": 2, "rows": 4, "gap_db_tolerance": 6.0}  # random weights and 3 steps: one flipped tie moves much


@pytest.fixture(scope="module", params=["onnxruntime-cpu", "tensorrt-rtx"])
def compiled(unet: Artifacts, request, tmp_path_factory) -> Artifacts:
    """A tiny UNet with linears per token, convolutions per step, and 4 bits for every fourth layer."""

    def choose(layer):
        four = structural_schemes(layer)[-1]
        if four.name == "w4a16" and len(layer.name) % 4 == 0:
            return four
        return W8A8_TOKEN if layer.op == "linear" else W8A8_STEP

    made = with_plan(unet, choose) | {TARGET: load_target(request.param)}
    return made | run_pass(ExportQdq(), made, tmp_path_factory.mktemp("qdq"))


def test_layers_agree_and_figures_are_complete(compiled, tmp_path):
    verified = run_pass(Verify(**OPTIONS, bisect=True), compiled, tmp_path)[VERIFICATION]
    assert set(verified.layers) == set(compiled[QUANTIZED].layers)
    float_inputs = {n for n, data in compiled[QUANTIZED].layers.items() if data.scheme.name == "w4a16"}
    half = float_inputs if compiled[TARGET].float_type == "float16" else set()
    for name, layer in verified.layers.items():
        assert layer.rel_l2 <= (HALF_TOLERANCE if name in half else 1e-5)  # float32 sums of some hundred products
    assert all(layer.code_distance_max <= 1 for layer in verified.layers.values())
    assert sum(layer.codes for layer in verified.layers.values()) > 10_000
    assert verified.figures.psnr_db > 15  # random weights, and 4 bits in every fourth layer
    assert verified.figures.fp16_bytes > 0
    verified.save(tmp_path)
    loaded = type(verified).load(tmp_path)
    assert loaded.layers == verified.layers
    assert list(loaded.departures) == list(verified.departures)
    assert loaded.departures == verified.departures
    assert set(loaded.departures) == set(compiled[QUANTIZED].layers)
    for figure in ("departure_own_rel_l2_max", "departure_input_rel_l2_max", "departure_output_rel_l2"):
        assert getattr(verified.figures, figure) < (BETWEEN_HALVES if half else 1e-5)
    assert torch.equal(loaded.samples["deployed"], verified.samples["deployed"])


def test_one_changed_weight_scale_is_found_and_named(compiled, tmp_path):
    name = "mid_block.resnets.0.conv1"
    layer = compiled[QUANTIZED].layers[name]
    spoilt = replace(layer, scale_NG=layer.scale_NG * 1.001)
    quantized = replace(compiled[QUANTIZED], layers={**compiled[QUANTIZED].layers, name: spoilt})
    with pytest.raises(StepFailed, match=rf"^{name}: relative L2 error 9\.9\de-04 on the same input, tolerance 1e-04"):
        run_pass(Verify(**OPTIONS), {**compiled, QUANTIZED: quantized}, tmp_path)


def test_a_wrong_input_range_is_found_in_the_codes(compiled, tmp_path):
    name = "conv_in"
    layer = compiled[QUANTIZED].layers[name]
    spoilt = replace(layer, tables=replace(layer.tables, amax_T=layer.tables.amax_T * 1.01))
    quantized = replace(compiled[QUANTIZED], layers={**compiled[QUANTIZED].layers, name: spoilt})
    with pytest.raises(StepFailed, match=r"conv_in: \d+ of \d+ input codes differ"):
        run_pass(Verify(**OPTIONS), {**compiled, QUANTIZED: quantized}, tmp_path)


def verification(gap_db: float, error_db: float) -> Verification:
    figures = VerificationFigures(
        psnr_peak=2.0,
        psnr_db=30.0,
        psnr_db_min=30.0,
        psnr_simulated_db=30.0,
        sqnr_db=30.0,
        sqnr_db_min=30.0,
        sqnr_simulated_db=30.0,
        fidelity_gap_db=gap_db,
        fidelity_gap_error_db=error_db,
        parity_rel_l2=0.0,
        parity_layer_rel_l2_max=0.0,
        fp16_bytes=1.0,
    )
    return Verification(figures, {})


def test_samples_that_part_are_an_error_with_numbers():
    message = r"simulated and deployed PSNR differ by -0\.81 dB, standard error 0\.15 dB \(0\.5 allowed\)"
    with pytest.raises(StepFailed, match=message):
        Verify()._judge(verification(-0.81, 0.15))
    Verify()._judge(verification(-0.79, 0.15))


def test_gap_is_the_mean_difference_of_each_samples_own_psnr():
    full = torch.zeros(2, 1, 1, 2)
    simulated = torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1).expand_as(full)  # 20 and 40 dB
    deployed = torch.tensor([0.02, 0.02]).reshape(2, 1, 1, 1).expand_as(full)  # 40 dB both
    figures = _distances({"full_precision": full + 0.0, "simulated": simulated, "deployed": deployed}, peak=2.0)
    assert figures.psnr_simulated_db == pytest.approx(30, abs=1e-4)
    assert figures.psnr_db == pytest.approx(40, abs=1e-4)
    assert figures.fidelity_gap_db == pytest.approx(-10, abs=1e-4)
    assert figures.fidelity_gap_error_db == pytest.approx(10, abs=1e-3)  # differences -20 and 0: std 14.1 / sqrt 2


def test_samples_outside_of_minus_one_to_one_are_compared_as_they_are():
    full = torch.tensor([[30.0, -10.0], [30.0, -10.0]])
    found = {"full_precision": full, "simulated": full + 0.4, "deployed": full + torch.tensor([[4.0], [0.4]])}
    figures = _distances(found, peak=40.0)
    assert figures.psnr_peak == 40.0
    assert figures.psnr_simulated_db == pytest.approx(40, abs=1e-3)  # 20 log10(40 / 0.4)
    assert (figures.psnr_db, figures.psnr_db_min) == (pytest.approx(30, abs=1e-3), pytest.approx(20, abs=1e-3))
    assert figures.sqnr_simulated_db == pytest.approx(34.95, abs=0.01)  # 10 log10(500 / 0.16)
    assert (figures.sqnr_db, figures.sqnr_db_min) == (pytest.approx(24.95, abs=0.01), pytest.approx(14.95, abs=0.01))


def test_cosine_and_largest_error_are_of_the_deployed_samples():
    full = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    deployed = torch.tensor([[[4.0, 3.0]], [[0.0, 2.5]]])  # 24 / 25, and the same direction
    figures = _distances({"full_precision": full, "simulated": full, "deployed": deployed}, peak=4.0)
    assert figures.cosine == pytest.approx(0.98, abs=1e-12)
    assert figures.cosine_min == pytest.approx(0.96, abs=1e-12)
    assert figures.error_max == 1.0


def test_errors_within_the_rounding_of_float32_are_no_gap():
    full = torch.full((1, 1, 1, 2), 0.5)
    found = {"full_precision": full, "simulated": full, "deployed": full + 4e-6}
    figures = _distances(found, 2.0, 1e-4)
    assert figures.psnr_simulated_db == pytest.approx(206, abs=0.1)
    assert figures.psnr_db == pytest.approx(114, abs=0.1)
    assert figures.fidelity_gap_db == 0.0
    beyond = _distances({**found, "deployed": full + 5e-4}, 2.0, 1e-4)  # ten times what rounding may be
    assert beyond.fidelity_gap_db == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt-10"])
def test_a_plan_that_leaves_all_in_float_passes_and_says_which_layers(unet, target, tmp_path, caplog):
    made = with_plan(unet, lambda _: FLOAT) | {TARGET: load_target(target)}
    made |= run_pass(ExportQdq(), made, tmp_path / "qdq")
    caplog.set_level("INFO", logger="test")
    verified = run_pass(Verify(samples=2, rows=2), made, tmp_path / "verify")[VERIFICATION]
    assert abs(verified.figures.fidelity_gap_db) < 0.1  # an error at the edge of float32's rounding; 70 without
    assert not verified.layers
    assert "51 of 51 layers stay in float: " in caplog.text
    assert "the plan leaves it in float (" in caplog.text
    assert re.search(r" and 2\d more\)", caplog.text)


def test_layers_in_float_have_a_reason():
    from torch import nn

    module = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "back": nn.ConvTranspose2d(64, 64, 3),
            "narrow": nn.Conv2d(3, 64, 3),
            "quantized": nn.Linear(64, 64),
        }
    )
    assert layers_in_float(module, {"quantized"}, load_target("onnxruntime-cpu")) == {
        "plain": "the plan leaves it in float",
        "back": "a transposed convolution (ConvTranspose2d) cannot be quantized",
        "narrow": "the plan leaves it in float",
    }


def test_latency_is_measured_for_both(compiled, tmp_path):
    latency = run_pass(MeasureLatency(rows=2, rounds=3), compiled, tmp_path)[LATENCY]
    assert latency.rows == 2
    assert latency.float32_ms > 0
    assert latency.compiled_ms > 0
    assert GRAPH in compiled
