"""The report is read back with an HTML parser: what it shows is what the artifacts say."""
# ruff: noqa: RUF001 - the page sets its figures with a multiplication sign, a minus sign and a dash

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reporting import FIGURES, HOSTILE, LAYERS, SAMPLES, Page, artifacts, write

from intaglio.exporters.report.report import metrics_of_files
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.artifacts.graph import Engine
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    ENGINE,
    GRAPH,
    LATENCY,
    LINT,
    PLAN,
    PROVENANCE,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.verification import Departure, LayerParity, Report, Verification
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16


def test_metrics_are_those_of_the_artifacts(made):
    metrics = write(made).metrics
    weights = 64 * 12 + 3 * 64 * 64 + 256 * 128
    assert metrics == {
        "model": "DiTTransformer2DModel",
        "target": "onnxruntime-cpu",
        "layers_total": 5,
        "layers_quantized": 4,
        "weight_bits_mean": pytest.approx((16 * 64 * 12 + 8 * 3 * 64 * 64 + 4 * 256 * 128) / weights, rel=1e-12),
        "size_bytes": 40_000,
        "size_ratio_fp16": 2.5,
        "latency_ms": 12.0,
        "latency_fp32_ms": 30.0,
        "latency_ratio_fp32": 2.5,
        "samples_drawn": 16,
        "psnr_db": 31.42,
        "psnr_db_min": 24.1,
        "psnr_simulated_db": 31.54,
        "psnr_predicted_db": None,
        "psnr_predicted_error_db": None,
        "psnr_peak": 2.0,
        "fidelity_gap_db": 0.12,
        "fidelity_gap_error_db": 0.05,
        "sqnr_db": 28.9,
        "sqnr_db_min": 21.6,
        "sqnr_simulated_db": 29.02,
        "cosine": 0.99934,
        "cosine_min": 0.9967,
        "error_max": 0.125,
        "parity_layer_rel_l2_max": 4.1e-7,
        "parity_rel_l2": 0.013,
        "engine": {
            "path": "model.onnx",
            "runtime": "onnxruntime",
            "version": "1.31.1",
            "bytes": 40_000,
            "low_precision_products": 3,
            "float_products": 2,
        },
        "warnings": [],
    }


def test_the_file_of_metrics_is_these_bytes(made, tmp_path):
    write(made).save(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == Path(__file__).with_name("metrics.json").read_bytes()


def test_a_built_engine_is_the_file_that_metrics_name(made):
    made[ENGINE] = Engine("tensorrt-rtx", "1.7.1", low_precision_products=3, float_products=2, plan=bytes(1234))
    report = write(made)
    engine = report.metrics["engine"]
    assert (engine["path"], engine["bytes"]) == ("engine.plan", 1234)
    assert "engine.plan" in Page(report.html).text("cost")
    del made[LATENCY]
    assert "latency is measured on its device" in Page(write(made).html).text("cost")


def test_what_was_not_measured_is_null_and_a_dash(made):
    made[VERIFICATION] = Verification(replace(FIGURES, psnr_db=math.inf, sqnr_db=math.nan), {})
    made[ENGINE] = Engine("tensorrt", "10.3", None, None, command="trtexec --onnx=model.onnx")
    report = write(made)
    assert json.loads(json.dumps(report.metrics, allow_nan=False))["psnr_db"] is None
    assert report.metrics["sqnr_db"] is None
    page = Page(report.html)
    assert "PSNR – dB" in page.text("tiles")
    assert "Layers were not compared" in page.text("parity")
    assert "no samples" in page.text("samples")
    assert "trtexec --onnx=model.onnx" in page.text("engine")


def test_a_recipe_without_benchmark_and_verify_has_a_report_of_what_there_is(made):
    for key in (LATENCY, VERIFICATION, ENGINE):
        del made[key]
    report = write(made)
    assert (report.metrics["latency_ms"], report.metrics["psnr_db"], report.metrics["layers_total"]) == (None, None, 5)
    page = Page(report.html)
    assert "Latency – not measured" in page.text("tiles")
    assert "has no step benchmark before this page" in page.text("cost")
    assert "onnxruntime not built yet" in page.text("engine")


def test_without_a_report_the_files_say_their_metrics(made, tmp_path):
    folder = tmp_path / "out/onnxruntime-cpu"
    folder.mkdir(parents=True)
    for key in (PLAN, GRAPH, ENGINE):
        made[key].save(folder)
    whole = write(made).metrics
    known = ("target", "layers_total", "layers_quantized", "weight_bits_mean", "size_bytes", "engine")
    assert metrics_of_files(folder) == {name: whole[name] for name in known}


def test_headlines(made):
    page = Page(write(made).html)
    tiles = page.text("tiles")
    for headline in (
        "Mean weight 5.27 bits 4 of 5 layers quantized",
        "Size 40.0 kB 2.50× smaller than float16",
        "Latency 12.0 ms 2.50× the speed of float32",
        "Low-precision products 3 matrix products and convolutions in INT8, FP8 or FP4; 2 in float",
        "PSNR 31.42 dB",
        "SQNR 28.90 dB",
        "Fidelity gap 0.12 dB lost from simulation (31.54 dB, SQNR 29.02)",
        "Layer parity 4.1×10⁻⁷",
    ):
        assert headline in tiles
    assert "DiTTransformer2DModel on onnxruntime-cpu" in page.text("")
    assert "8 denoising steps, guidance 1.5." in page.text("")


def test_the_page_needs_no_other_file(made):
    report = write(made)
    for _, tag, attrs in Page(report.html).tags:
        assert tag not in ("iframe", "object")
        assert attrs.get("src", "data:").startswith("data:")
        assert attrs.get("href", "#").startswith(("#", "data:"))
    assert "@import" not in report.html
    assert "url(" not in report.html
    assert "default-src 'none'" in report.html


def test_links_lead_to_sections(made):
    page = Page(write(made).html)
    sections = {attrs["id"] for _, tag, attrs in page.tags if tag == "section"}
    assert {attrs["href"].removeprefix("#") for attrs in page.found("", "a")} == sections


def test_nothing_trained_is_said(made):
    """Neither by this recipe, nor at all: an imported model brings its integers."""
    made[ADAPTER] = Adapter({})
    assert "Nothing was trained" in Page(write(made).html).text("distillation")
    del made[ADAPTER]
    assert "Nothing was trained" in Page(write(made).html).text("distillation")


def test_a_plan_that_was_made_without_measurement_is_said(made):
    del made[SENSITIVITY]
    page = Page(write(made).html)
    assert "No layer was measured alone" in page.text("sensitivity")
    assert not page.found("sensitivity", "table")


def test_a_look_into_the_whole_graph_is_reported(made):
    assert "Inside the whole graph" not in Page(write(made).html).text("parity")
    departures = {"a": Departure(2e-7, 3.1e-6), "b": Departure(5.2e-7, 1e-6)}
    made[VERIFICATION] = replace(made[VERIFICATION], departures=departures)
    parity = Page(write(made).html).text("parity")
    assert "compared with its simulation on the same input, is at most 3.1×10⁻⁶" in parity
    assert "if all layers before it are taken as correct, is at most 5.2×10⁻⁷" in parity


def test_tables_hold_every_layer_input_fact_and_metric(made):
    page = Page(write(made).html)
    parity, provenance = page.text("parity"), page.text("provenance")
    assert all(layer.name in parity for layer in LAYERS[1:])
    assert parity.count("4.1×10⁻⁷ 4,096 3 1") == 4
    assert "the error is 0.013" in parity
    assert "in sample float32 batch × 3 × 8 × 8" in page.text("engine")
    assert "in step int64 scalar" in page.text("engine")
    for fact in made[TARGET].facts:
        assert fact.fact in provenance
        assert fact.source in provenance
    assert f"torch {torch.__version__}" in provenance
    for name in ("psnr_db", "engine.low_precision_products", "size_ratio_fp16"):
        assert name in provenance


def test_findings_of_the_linter_are_listed(made):
    assert "warning int4-shape node <7> it is odd make it even" in Page(write(made).html).text("lint")
    made[LINT] = Findings(())
    assert "No rule of the linter finds anything" in Page(write(made).html).text("lint")
    del made[LINT]
    assert "The graph was not linted" in Page(write(made).html).text("lint")


def test_the_page_says_what_it_was_made_from(made):
    provenance = Page(write(made).html).text("provenance")
    assert "intaglio run recipe.yaml" in provenance
    assert "seed 11" in provenance
    assert "model models/tiny" in provenance
    assert "MODEL, sha256 " + "0123abcd" * 8 in provenance
    assert "assign intaglio.passes.assign.assign:AssignPrecision@4 1.2 s 1.50 GB PLAN ab12cd34" in provenance
    assert "samples: 2" in provenance  # the recipe itself
    del made[PROVENANCE]
    assert "Make it again" not in Page(write(made).html).text("provenance")


def test_a_hostile_layer_name_stays_text(made):
    report = write(made)
    page = Page(report.html)
    assert "alert" not in "".join(attrs.get("class", "") for _, _, attrs in page.tags)
    assert len([tag for _, tag, _ in page.tags if tag == "script"]) == 1
    assert HOSTILE in page.text("parity")
    assert "<script>alert" not in report.html


def test_equal_artifacts_make_equal_pages(made, tmp_path):
    assert write(made) == write(artifacts(tmp_path / "again"))


def test_a_report_comes_back_from_its_folder(made, tmp_path):
    report = write(made)
    report.save(tmp_path)
    assert Report.load(tmp_path) == report


def test_a_thousand_layers_and_noise_stay_below_five_megabytes(made):
    names = (f"transformer_blocks.{i // 10}.attn1.to_{i % 10}" for i in range(1000))
    layers = tuple(LAYERS[1].model_copy(update={"name": name}) for name in names)
    schemes = (FLOAT, W8A8_TOKEN, W8A8_STEP, w4a16(32))
    made[PLAN] = QuantPlan(layers, {layer.name: W8A8_TOKEN for layer in layers})
    made[SENSITIVITY] = Sensitivity(
        tuple((i, i + 1) for i in range(8)),
        (1.0,) * 8,
        layers,
        {layer.name: {s.name: s for s in schemes} for layer in layers},
        {layer.name: {s.name: (1.234e-5,) * 8 for s in schemes} for layer in layers},
        samples=SAMPLES,
    )
    noise = torch.rand(16, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = {"full_precision": noise, "simulated": noise.flip(0), "deployed": noise.flip(1)}
    parity = {layer.name: LayerParity(1e-7, 4096, 0, 0) for layer in layers}
    made[VERIFICATION] = replace(made[VERIFICATION], samples=samples, layers=parity)
    assert len(write(made).html.encode()) < 5_000_000
