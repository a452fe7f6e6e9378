"""The report is read back with an HTML parser: what it shows is what the artifacts say."""
# ruff: noqa: RUF001 - the page sets its figures with a multiplication sign, a minus sign and a dash

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reporting import EMBED, FIGURES, HOSTILE, LAYERS, SAMPLES, Page, artifacts, points

from intaglio.exporters.report.figures import (
    curve,
    drawn_figure,
    heat_map,
    log_shares,
    number,
    short_size,
    size,
    split_name,
    strip,
)
from intaglio.exporters.report.grids import Drawn, sample_figure
from intaglio.exporters.report.report import WriteReport, metrics_of_files
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.graph import Engine, ScaledBy
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    ENGINE,
    FRONT,
    GRAPH,
    LATENCY,
    LINT,
    PLAN,
    PROVENANCE,
    REPORT,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.verification import Departure, LayerParity, Report, Verification
from intaglio.pipeline.contract.artifact import AnyKey, Artifact, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.numerics.basis import Balance, LayerBalance


@pytest.fixture
def made(tmp_path: Path) -> dict[AnyKey, Artifact]:
    return artifacts(tmp_path / "model")


def write(made: dict[AnyKey, Artifact], **options: int) -> Report:
    report = WriteReport(**options).run(State(made, reader="report"), Context(Path()))[REPORT]
    assert isinstance(report, Report)
    return report


def decode(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


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


def test_sheets_show_the_same_samples_in_order(made):
    page = Page(write(made, samples=3).html)
    images = page.found("samples", "img")
    assert [image["alt"] for image in images] == [
        *("Full precision, 3 samples", "Simulated, 3 samples", "Deployed, 3 samples"),
        *("Deployed − Full precision, times 16", "Deployed − Simulated, times 1024"),
    ]
    assert [image.get("class") for image in images[:3]] == ["left", None, "right"]
    shown = [decode(image["src"]) for image in images]
    assert {image.size for image in shown} == {(24, 8)}
    assert shown[0].getpixel((0, 0)) == (0, 0, 0)
    assert shown[2].getpixel((23, 7)) == (16, 16, 16)  # -0.875 is 1/16 of the way from -1 to 1; 255 / 16 = 15.9
    assert shown[3].getpixel((0, 0)) == 255  # that sixteenth, 16 times
    assert "white is 1/16 of the range" in page.text("samples")
    assert "Largest of all 4: 0.0010" in page.text("samples")
    assert "3 seeds of 4, 8 × 8 pixels." in page.text("samples")


def test_every_sample_has_its_own_psnr(made):
    page = Page(write(made).html)
    dots = page.found("samples", "i", "^dot$")
    assert [dot["title"] for dot in dots[4:6]] == [
        *("sample 1: 24.08 dB (SQNR 18.06)", "sample 2: 24.08 dB (SQNR 18.06)")  # 4 / 0.125^2 = 256, and 1 / 0.125^2
    ]
    assert len(dots) == 2 * 4
    assert strip({}, {}) is None
    drawn = strip({"one": [20.0, 40.0], "two": [30.0, 30.0]}, {"one": [10.0, 20.0], "two": [25.0, 25.0]})
    assert drawn is not None
    assert [(lane.mean, lane.mean_sqnr) for lane in drawn.lanes] == [("30.00", "15.00"), ("30.00", "25.00")]
    assert drawn.lanes[0].mean_left == drawn.lanes[1].dots[0].left == pytest.approx(0.5)


def test_latents_are_normalised_and_said_to_be_latents(made):
    latent = torch.linspace(-7, 3, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    made[VERIFICATION] = Verification(FIGURES, {}, samples={"full_precision": latent, "deployed": latent})
    page = Page(write(made).html)
    assert "latents with 4 channels: shown are the first three" in page.text("samples")
    images = [decode(image["src"]) for image in page.found("samples", "img")]
    assert images[0].getpixel((0, 0)) == (0, 0, 0)
    assert images[0].getpixel((15, 7)) == (255, 255, 255)
    assert images[2].getpixel((0, 0)) == 0  # no difference


def compared(samples: torch.Tensor, count: int = 16):
    return sample_figure({"full": Drawn("Full precision", "", samples)}, [], count)


def test_one_channel_is_grey_and_vectors_are_no_images():
    grey = compared(torch.ones(1, 1, 4, 4))
    assert grey is not None
    assert decode(grey.sheets[0].image).mode == "L"
    assert compared(torch.ones(2, 8)) is None


def test_large_samples_become_fewer_or_smaller():
    many = compared(torch.zeros(16, 3, 128, 128))
    assert many is not None
    assert (many.shown, many.total, many.reduced) == (9, 16, 1)
    large = compared(torch.zeros(2, 3, 512, 512))
    assert large is not None
    assert (large.shown, large.reduced) == (2, 2)
    assert decode(large.sheets[0].image).size == (512, 256)


@pytest.mark.parametrize(("count", "columns", "rows"), [(16, 4, 4), (13, 4, 3), (8, 4, 2), (7, 7, 1), (3, 3, 1)])
def test_rows_of_samples_are_full(count, columns, rows):
    drawn = compared(torch.zeros(count, 3, 4, 4))
    assert drawn is not None
    assert (drawn.columns, drawn.rows, drawn.shown) == (columns, rows, columns * rows)


def test_errors_outside_of_an_image_are_seen_and_said():
    full = torch.zeros(1, 1, 2, 2)
    full[0, 0, 0] = 1.0
    drawn = sample_figure({"a": Drawn("A", "", full), "b": Drawn("B", "", full + 6.0)}, [("a", "b")], 1)
    assert drawn is not None
    (error,) = drawn.errors
    assert (error.largest, error.span, error.gain) == (6.0, (0.0, 1.0), 1)
    assert {*decode(error.image).getdata()} == {255}  # also where full precision is white


def test_a_clip_is_a_line_of_frames():
    clips = torch.zeros(2, 3, 5, 4, 6)
    clips[1, :, 4] = 1.0
    drawn = compared(clips)
    assert drawn is not None
    assert (drawn.columns, drawn.rows, drawn.shown, drawn.frames) == (5, 2, 2, 5)
    sheet = decode(drawn.sheets[0].image)
    assert sheet.size == (30, 8)
    assert sheet.getpixel((29, 7)) == (255, 255, 255)
    assert sheet.getpixel((23, 7)) == (128, 128, 128)


def test_the_bit_map_has_one_cell_a_layer(made):
    page = Page(write(made).html)
    cells = {attrs["title"].split("\n")[0]: attrs for attrs in page.found("precision", "td", r"^s-")}
    assert set(cells) == {layer.name for layer in LAYERS}
    assert cells[EMBED.name]["class"] == "s-float"
    gemm = cells["transformer_blocks.0.ff.net.0.proj"]
    assert gemm["class"] == "s-w4a16"
    assert "4" + short_size(256 * 128 * 9 // 16 + 4 * 256) in page.text("precision").replace(" ", "")
    # 4.5 bits a weight with the scales of groups of 64, and a float32 for each row
    assert gemm["title"].split("\n")[1:] == ["w4a16", "N = 256, K = 128", f"{256 * 128 * 9 // 16 + 4 * 256:,} bytes"]


def test_what_balanced_layers_gained_is_shown_and_what_their_scales_cost(made):
    assert not Page(write(made).html).found("precision", "td", r"^b-")
    scaled, rotated, given = (LAYERS[place].name for place in (1, 3, 4))
    ends = torch.ones(8)
    balances = {
        scaled: LayerBalance(Balance(torch.full((64,), 0.5)), -ends, ends, 3.21),
        rotated: LayerBalance(Balance(torch.full((64,), 0.5), 16), -ends, ends, 12.04),
        given: LayerBalance(Balance(torch.full((64,), 0.5)), -ends, ends),
    }
    made[PLAN] = made[PLAN].balanced(balances)
    nodes = {name: (f"{name}.x", f"{name}.y") for name in balances}
    made[GRAPH] = replace(made[GRAPH], nodes=nodes, scaled={f"{scaled}.x": ScaledBy(scaled, 0)})
    page = Page(write(made).html)
    cells = {attrs["title"].split("\n")[0]: attrs for attrs in page.found("precision", "td", r"^b-")}
    assert {name: cell["class"] for name, cell in cells.items()} == {
        scaled: "b-scaled",
        rotated: "b-rotated",
        given: "b-scaled",
    }
    in_front = "the scales are a multiplication before it"
    assert cells[scaled]["title"].split("\n")[1:] == [
        "scaled",
        "the scales are folded into the operator before the layer",
        "the error of the output is 3.2 dB smaller",
    ]
    assert cells[rotated]["title"].split("\n")[1:] == [
        "scaled, rotated in blocks of 16",
        in_front,
        "the error of the output is 12.0 dB smaller",
    ]
    assert cells[given]["title"].split("\n")[1:] == ["scaled", in_front, "a given basis"]
    assert "3 layers are rounded in a basis" in page.text("precision")
    assert "The scales of 1 are in the weights" in page.text("precision")
    assert "s3.2r*12.0" in page.text("precision").replace(" ", "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("transformer_blocks.3.attn1.to_q", ("transformer_blocks", "3", "attn1.to_q")),
        ("down_blocks.0.resnets.1.conv1", ("down_blocks", "0", "resnets.1.conv1")),
        ("mid_block.attentions.0.to_q", ("", "", "mid_block.attentions.0.to_q")),
        ("proj_out_2", ("", "", "proj_out_2")),
    ],
)
def test_names_are_split_into_stack_block_and_role(name, parts):
    assert split_name(name) == parts


def test_the_heat_map_shows_the_plan_and_every_scheme(made):
    page = Page(write(made).html)
    cells = page.found("sensitivity", "td", r"^h")
    assert len(cells) == len(LAYERS) * 3 * 2  # as planned, token and step; two buckets
    # decades 10^-5 to 10^-2 on ten colours: 2e-3 lies 2.30 of 3 decades up, 3e-5 0.48
    convolution, linear = cells[:6], cells[6:12]
    assert [c["class"] for c in convolution] == ["h-zero"] * 2 + ["h-none"] * 2 + ["h7", "h1"]
    assert [c["class"] for c in linear] == ["h7", "h1"] * 3
    assert [c["title"] for c in linear[:2]] == ["0.00200", "3.00×10⁻⁵"]
    heat = heat_map(made[SENSITIVITY], made[PLAN])
    assert [label for _, label in heat.ticks] == ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]
    assert [block for block, _ in heat.blocks] == ["Outside the blocks", "transformer_blocks.0", "transformer_blocks.1"]
    assert page.found("sensitivity", "table")[0]["data-steps"] == "0 to 3|4 to 7"


def test_the_curve_falls_as_the_loss_does(made):
    page = Page(write(made).html)
    raw, mean, _ = (
        [tuple(map(float, p.split(","))) for p in line["points"].split()]
        for line in page.found("distillation", "polyline")
    )
    assert len(raw) == len(mean) == 100
    assert raw[-1][0] == 1.0
    assert [y for _, y in raw] == sorted(y for _, y in raw)  # downwards in SVG
    assert "update" in page.text("distillation")


def test_the_error_of_drawn_samples_is_beside_the_loss_and_the_kept_state_is_marked(made):
    page = Page(write(made).html)
    tips = [dot["title"] for dot in page.found("distillation", "i", r"^dot")]
    assert tips == ["start: 20.00 dB", "after 100 updates: 40.00 dB", "kept: 40.00 dB"]
    assert "PSNR of drawn samples, dB kept" in page.text("distillation")
    made[ADAPTER] = replace(
        made[ADAPTER], drawn=(DrawnError(0, 0.0004), DrawnError(50, 0.04), DrawnError(100, math.inf))
    )
    tips = [dot["title"] for dot in Page(write(made).html).found("distillation", "i", r"^dot")]
    assert tips == ["start: 40.00 dB", "after 50 updates: 20.00 dB", "kept: 40.00 dB"]
    assert drawn_figure(Adapter({})) is None


def test_short_and_long_losses():
    assert curve(()) is None
    assert curve((0.5, 0.5)) is not None  # flat: no division by zero
    drawn = curve([1.0, math.nan] + [1e-3] * 50_000)
    assert drawn is not None
    assert drawn.logarithmic
    assert len(drawn.points.split()) <= 1001
    assert [label for _, label in drawn.y_ticks] == ["0.001", "0.01", "0.1", "1"]


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


def test_the_front_is_drawn_with_the_plan_marked(made):
    plans = points(4e-2, 4e-3, 4e-4, 0.0)
    made[FRONT] = Front(plans, plans[1], SAMPLES)
    page = Page(write(made).html)
    dots = page.found("front", "i", r"^dot$")
    (ring,) = page.found("front", "i", "dot ring")
    assert len(dots) == 3  # nothing is lost in the fourth
    assert ring["style"] == dots[1]["style"]
    assert dots[1]["title"].splitlines() == [
        *("point 1", "30.0 dB (SQNR 18.0)", "size 0.400", "latency 0.500"),
        "1 float, 2 w8a8_token, 1 w8a8_step, 1 w4a16",
    ]
    places = [tuple(map(float, re.findall(r"([\d.]+)%", dot["style"]))) for dot in dots]
    assert [left for left, _ in places] == sorted(left for left, _ in places)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.2)  # 10 dB apart
    (line,) = page.found("front", "polyline")
    assert [float(p.split(",")[0]) for p in line["points"].split()] == pytest.approx(
        [left / 100 for left, _ in places], abs=1e-3
    )
    assert "size, relative to float16" in page.text("front")
    assert "20" in page.text("front").split()  # a tick of decibels


def test_without_a_front_there_is_nothing_to_draw(made):
    assert "No other plans were made" in Page(write(made).html).text("front")
    plans = points(4e-2)
    made[FRONT] = Front(plans, plans[0], SAMPLES)
    assert not Page(write(made).html).found("front", "svg")
    made[FRONT] = Front(points(4e-2, 4e-3), points(0.0)[0], SAMPLES)
    assert not Page(write(made).html).found("front", "i", "dot ring")


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


def test_the_picture_has_full_precision_above_deployed(made):
    report = write(made)
    assert report.picture is not None
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(report.picture))))
    assert image.shape == (2 * 8 * 3, 4 * 8 * 3, 3)
    assert (image[:24] == 0).all()
    assert (image[24:] == 16).all()  # 0.125 of a range of 2 in 255 levels


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


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (12.0, "12.0"),
        (0.03124, "0.0312"),
        (9.996, "10.0"),
        (1234.5, "1,230"),
        (-0.5, "−0.500"),
        (0.9984, "0.998"),
        (0.9998741, "0.999874"),
        (3.1e-7, "3.10×10⁻⁷"),
        (2.5e9, "2.50×10⁹"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_digits_and_those_near_one_have_six_decimals(quantity, text):
    assert number(quantity) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0"), (999, "999"), (65_536, "66k"), (999_600, "1.0M"), (12.3e6, "12M")],
)
def test_short_sizes_have_four_characters(size_bytes, text):
    assert short_size(size_bytes) == text


def test_bars_are_logarithmic():
    shares = log_shares({"a": 1e-3, "b": 1e-5, "none": 0.0, "all": math.inf})
    assert shares == {"a": 1.0, "b": 0.01, "none": 0.0, "all": 1.0}
    assert log_shares({"none": 0.0}) == {"none": 0.0}


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(999, "999 bytes"), (40_000, "40.0 kB"), (3.34e6, "3.34 MB"), (None, "–")]
)
def test_sizes_are_decimal(size_bytes, text):
    assert size(size_bytes) == text
