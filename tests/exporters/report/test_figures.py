"""The report writes numbers and sizes in one way; its curves, heat maps and fronts show what the artifacts say."""
# ruff: noqa: RUF001 - the page sets its figures with a multiplication sign, a minus sign and a dash

import math
import re
from dataclasses import replace

import pytest
import torch
from reporting import EMBED, LAYERS, SAMPLES, Page, points, write

from intaglio.exporters.report.figures import (
    curve,
    drawn_figure,
    heat_map,
    log_shares,
    number,
    short_size,
    size,
    split_name,
)
from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.graph import ScaledBy
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    FRONT,
    GRAPH,
    PLAN,
    SENSITIVITY,
)
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
from intaglio.pipeline.numerics.basis import Balance, LayerBalance


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
