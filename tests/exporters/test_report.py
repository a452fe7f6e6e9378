"""The report is read back with an HTML parser: what it shows is what the artifacts say."""
# ruff: noqa: RUF001 - the page sets its figures with a multiplication sign, a minus sign and a dash

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intaglio.exporters._figures import curve, heat_map, number, sample_figure, size, split_name
from intaglio.exporters.report import WriteReport
from intaglio.pipeline.artifact import AnyKey, Artifact, State
from intaglio.pipeline.checkpoint import Checkpoint, ModelRef
from intaglio.pipeline.context import Context
from intaglio.pipeline.front import Front, Point
from intaglio.pipeline.graph import Engine, Graph, TensorSpec
from intaglio.pipeline.keys import (
    ADAPTER,
    ENGINE,
    FRONT,
    GRAPH,
    LATENCY,
    MODEL,
    PLAN,
    REPORT,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
)
from intaglio.pipeline.plan import Layer, QuantPlan
from intaglio.pipeline.quant.spec import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.quantized import Adapter
from intaglio.pipeline.sensitivity import Sensitivity
from intaglio.pipeline.target import load_target
from intaglio.pipeline.verification import Departure, Latency, LayerParity, Report, Verification

HOSTILE = 'transformer_blocks.1.<script>alert("x")</script>&amp;'
EMBED = Layer(name="pos_embed.proj", op="conv", shape=(64, 3, 2, 2), bias=True)
LAYERS = (
    EMBED,
    Layer(name="transformer_blocks.0.attn1.to_q", op="linear", shape=(64, 64), bias=True),
    Layer(name="transformer_blocks.0.ff.net.0.proj", op="linear", shape=(256, 128), bias=False),
    Layer(name="transformer_blocks.1.attn1.to_q", op="linear", shape=(64, 64), bias=True),
    Layer(name=HOSTILE, op="linear", shape=(64, 64), bias=True),
)
SCHEMES = (FLOAT, W8A8_TOKEN, w4a16(64), W8A8_STEP, W8A8_TOKEN)
FIGURES = {
    "psnr_db": 31.42,
    "psnr_db_min": 24.1,
    "psnr_simulated_db": 31.54,
    "fidelity_gap_db": 0.12,
    "fidelity_gap_error_db": 0.05,
    "sqnr_db": 28.9,
    "parity_layer_rel_l2_max": 4.1e-7,
    "parity_rel_l2": 0.013,
    "fp16_bytes": 100_000.0,
}
MODEL_BYTES = 40_000


class Page(HTMLParser):
    """Every start tag as (section, tag, attributes), and the text of every section."""

    VOID = frozenset({"meta", "img", "col", "line", "polyline"})
    APART = frozenset({"dd", "dt", "li", "small", "td", "th"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: text or "" for name, text in attrs}
        if tag in ("section", "dl") and named.get("id", named.get("class")) != "facts":
            self.section = named.get("id", "tiles")
        self.tags.append((self.section, tag, named))
        if tag in self.APART:
            self.handle_data(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def found(self, section: str, tag: str, css: str = "") -> list[dict[str, str]]:
        return [
            attrs
            for where, name, attrs in self.tags
            if (where, name) == (section, tag) and re.search(css, attrs.get("class", ""))
        ]

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


def artifacts(root: Path) -> dict[AnyKey, Artifact]:
    (root / "transformer").mkdir(parents=True)
    (root / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (root / "model.onnx").write_bytes(bytes(MODEL_BYTES))
    plan = QuantPlan(LAYERS, {layer.name: scheme for layer, scheme in zip(LAYERS, SCHEMES, strict=True)})
    measured = {x.name: (FLOAT, W8A8_STEP) if x.op == "conv" else (FLOAT, W8A8_TOKEN, W8A8_STEP) for x in LAYERS}
    sensitivity = Sensitivity(
        LAYERS,
        ((0, 4), (4, 8)),
        (1.0, 3.0),
        {name: {s.name: s for s in schemes} for name, schemes in measured.items()},
        {n: {s.name: (0.0, 0.0) if s == FLOAT else (2e-3, 3e-5) for s in schemes} for n, schemes in measured.items()},
    )
    full = torch.full((4, 3, 8, 8), -1.0)
    samples = {"full_precision": full, "simulated": full + 0.124, "deployed": full + 0.125}
    parity = {layer.name: LayerParity(4.1e-7, 4096, 3, 1) for layer in LAYERS[1:]}
    sample = TensorSpec("float32", ("batch", 3, 8, 8))
    return {
        MODEL: Checkpoint(root, ModelRef(path="model", sampling_steps=8, guidance=1.5)),
        TARGET: load_target("onnxruntime-cpu"),
        SENSITIVITY: sensitivity,
        PLAN: plan,
        ADAPTER: Adapter({}, tuple(0.1 * 0.98**i for i in range(100))),
        GRAPH: Graph(root / "model.onnx", {"sample": sample, "step": TensorSpec("int64", ())}, {"noise": sample}),
        ENGINE: Engine("onnxruntime", "1.31.1", int8_gemm=3, fp_gemm=2),
        VERIFICATION: Verification(FIGURES, parity, samples),
        LATENCY: Latency(rows=8, float32_ms=30.0, compiled_ms=12.0),
    }


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
        **{name: figure for name, figure in FIGURES.items() if name != "fp16_bytes"},
        "engine": {
            "path": "model.onnx",
            "runtime": "onnxruntime",
            "version": "1.31.1",
            "bytes": 40_000,
            "int8_gemm": 3,
            "fp_gemm": 2,
        },
    }


def test_a_built_engine_is_the_file_that_metrics_name(made):
    made[ENGINE] = Engine("tensorrt-rtx", "1.7.1", int8_gemm=3, fp_gemm=2, plan=bytes(1234))
    report = write(made)
    engine = report.metrics["engine"]
    assert (engine["path"], engine["bytes"]) == ("engine.plan", 1234)
    assert "engine.plan" in Page(report.html).text("cost")
    assert "not that of the engine on its device" in Page(report.html).text("cost")


def test_what_was_not_measured_is_null_and_a_dash(made):
    figures = {"psnr_db": math.inf, "fp16_bytes": 100_000.0}
    made[VERIFICATION] = Verification(figures, {}, {})
    made[ENGINE] = Engine("tensorrt", "10.3", None, None, command="trtexec --onnx=model.onnx")
    report = write(made)
    assert json.loads(json.dumps(report.metrics, allow_nan=False))["psnr_db"] is None
    assert report.metrics["sqnr_db"] is None
    page = Page(report.html)
    assert "PSNR – dB" in page.text("tiles")
    assert "Layers were not compared" in page.text("parity")
    assert "no samples" in page.text("samples")
    assert "trtexec --onnx=model.onnx" in page.text("engine")


def test_headlines(made):
    page = Page(write(made).html)
    tiles = page.text("tiles")
    for headline in (
        "Mean weight 5.27 bits 4 of 5 layers quantized",
        "Size 40.0 kB 2.50× smaller than float16",
        "Latency 12.0 ms 2.50× the speed of float32",
        "Integer products 3 matrix products and convolutions in int8; 2 in float",
        "PSNR 31.42 dB",
        "SQNR 28.90 dB",
        "Fidelity gap 0.12 dB lost from simulation (31.54 dB)",
        "Layer parity 4.1×10⁻⁷",
    ):
        assert headline in tiles
    assert "DiTTransformer2DModel on onnxruntime-cpu" in page.text("")
    assert "8 denoising steps, guidance 1.5." in page.text("")


def test_the_page_needs_no_other_file(made):
    report = write(made)
    for _, tag, attrs in Page(report.html).tags:
        assert tag not in ("link", "iframe", "object")
        assert attrs.get("src", "data:").startswith("data:")
        assert attrs.get("href", "#").startswith("#")
    assert "@import" not in report.html
    assert "url(" not in report.html
    assert "prefers-color-scheme: dark" in report.html


def test_links_lead_to_sections(made):
    page = Page(write(made).html)
    sections = {attrs["id"] for _, tag, attrs in page.tags if tag == "section"}
    assert {attrs["href"].removeprefix("#") for attrs in page.found("", "a")} == sections


def test_grids_show_the_same_samples_in_order(made):
    page = Page(write(made, samples=3).html)
    images = page.found("samples", "img")
    assert [image["alt"] for image in images] == [
        f"{title}, sample {i}" for title in ("Full precision", "Simulated", "Deployed", "Difference") for i in (1, 2, 3)
    ]
    shown = [decode(image["src"]) for image in images]
    assert {image.size for image in shown} == {(8, 8)}
    assert shown[0].getpixel((0, 0)) == (0, 0, 0)
    assert shown[6].getpixel((0, 0)) == (16, 16, 16)  # -0.875 is 1/16 of the way from -1 to 1; 255 / 16 = 15.9
    assert shown[9].getpixel((0, 0)) == 255  # that sixteenth, 16 times
    assert "× 16" in page.text("samples")
    assert "differ by 0.0010 at most" in page.text("samples")
    assert "3 seeds of 4, 8 × 8 pixels." in page.text("samples")


def test_latents_are_normalised_and_said_to_be_latents(made):
    latent = torch.linspace(-7, 3, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    made[VERIFICATION] = Verification(FIGURES, {}, {"full_precision": latent, "deployed": latent})
    page = Page(write(made).html)
    assert "latents with 4 channels: shown are the first three" in page.text("samples")
    images = [decode(image["src"]) for image in page.found("samples", "img")]
    assert images[0].getpixel((0, 0)) == (0, 0, 0)
    assert images[1].getpixel((7, 7)) == (255, 255, 255)
    assert images[4].getpixel((0, 0)) == 0  # no difference


def test_one_channel_is_grey_and_vectors_are_no_images():
    grey = sample_figure({"full_precision": torch.ones(1, 1, 4, 4)}, 16)
    assert grey is not None
    assert decode(grey.grids[0].images[0]).mode == "L"
    assert sample_figure({"full_precision": torch.ones(2, 8)}, 16) is None


def test_large_samples_become_fewer_or_smaller():
    many = sample_figure({"full_precision": torch.zeros(16, 3, 128, 128)}, 16)
    assert many is not None
    assert (many.shown, many.total, many.reduced) == (9, 16, 1)
    large = sample_figure({"full_precision": torch.zeros(2, 3, 512, 512)}, 16)
    assert large is not None
    assert (large.shown, large.reduced) == (2, 2)
    assert decode(large.grids[0].images[0]).size == (256, 256)


def test_the_bit_map_has_one_cell_a_layer(made):
    page = Page(write(made).html)
    cells = {attrs["title"].split("\n")[0]: attrs for attrs in page.found("precision", "td", r"^s-")}
    assert set(cells) == {layer.name for layer in LAYERS}
    assert cells[EMBED.name]["class"] == "s-float"
    gemm = cells["transformer_blocks.0.ff.net.0.proj"]
    assert gemm["class"] == "s-w4a16"
    # 4.5 bits a weight with the scales of groups of 64, and a float32 for each row
    assert gemm["title"].split("\n")[1:] == ["w4a16", "N = 256, K = 128", f"{256 * 128 * 9 // 16 + 4 * 256:,} bytes"]


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
    raw, mean = (
        [tuple(map(float, p.split(","))) for p in line["points"].split()]
        for line in page.found("distillation", "polyline")
    )
    assert len(raw) == len(mean) == 100
    assert raw[-1][0] == 1.0
    assert [y for _, y in raw] == sorted(y for _, y in raw)  # downwards in SVG
    assert "training step" in page.text("distillation")


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


def points(*losses: float) -> tuple[Point, ...]:
    schemes = {layer.name: scheme.name for layer, scheme in zip(LAYERS, SCHEMES, strict=True)}
    return tuple(Point({"size": 0.3 + 0.1 * i, "latency": 0.5}, loss, schemes) for i, loss in enumerate(losses))


def test_the_front_is_drawn_with_the_plan_marked(made):
    plans = points(4e-2, 4e-3, 4e-4, 0.0)
    made[FRONT] = Front(plans, plans[1])
    page = Page(write(made).html)
    dots = page.found("front", "i", r"^dot$")
    (ring,) = page.found("front", "i", "ring")
    assert len(dots) == 3  # nothing is lost in the fourth
    assert ring["style"] == dots[1]["style"]
    assert dots[1]["title"].splitlines() == [
        *("point 1", "30.0 dB", "size 0.400", "latency 0.500"),
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
    made[FRONT] = Front(plans, plans[0])
    assert not Page(write(made).html).found("front", "svg")
    made[FRONT] = Front(points(4e-2, 4e-3), points(0.0)[0])
    assert not Page(write(made).html).found("front", "i", "ring")


def test_a_look_into_the_whole_graph_is_reported(made):
    assert "Inside the whole graph" not in Page(write(made).html).text("parity")
    departures = {"a": Departure(2e-7, 3.1e-6), "b": Departure(5.2e-7, 1e-6)}
    made[VERIFICATION] = replace(made[VERIFICATION], departures=departures)
    parity = Page(write(made).html).text("parity")
    assert "on what reaches it there, a layer's error is at most 3.1×10⁻⁶" in parity
    assert "from right layers at most 5.2×10⁻⁷" in parity


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
    for name in ("psnr_db", "engine.int8_gemm", "size_ratio_fp16"):
        assert name in provenance


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
        layers,
        tuple((i, i + 1) for i in range(8)),
        (1.0,) * 8,
        {layer.name: {s.name: s for s in schemes} for layer in layers},
        {layer.name: {s.name: (1.234e-5,) * 8 for s in schemes} for layer in layers},
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
        (3.1e-7, "3.10×10⁻⁷"),
        (2.5e9, "2.50×10⁹"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_digits(quantity, text):
    assert number(quantity) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(999, "999 bytes"), (40_000, "40.0 kB"), (3.34e6, "3.34 MB"), (None, "–")]
)
def test_sizes_are_decimal(size_bytes, text):
    assert size(size_bytes) == text
