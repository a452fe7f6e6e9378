"""Samples that are trajectories are plotted over time, and two of them are told apart."""

import base64
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from reporting import Page, artifacts

from intaglio.exporters.report.curves import HEIGHT, PAD, WIDTH, ends, is_trajectory, over_time, plots
from intaglio.exporters.report.difference import Difference
from intaglio.exporters.report.figures import CHANNEL_COLOURS
from intaglio.exporters.report.grids import CurveFigure, Drawn, laid_out
from intaglio.exporters.report.pictures import picture
from intaglio.exporters.report.report import WriteReport
from intaglio.pipeline.artifacts.keys import REPORT, VERIFICATION
from intaglio.pipeline.artifacts.verification import Verification
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context

RAMP = torch.linspace(-1, 1, 9).expand(3, 1, 9)
"""Three samples of one channel that rises over nine points."""


def has(image: Image.Image, x: float, y: float, colour: tuple[int, ...]) -> bool:
    """Return True if a pixel at most one above or below has about this colour: edges of lines are smooth."""
    column = [image.getpixel((round(x), round(y) + step)) for step in (-1, 0, 1)]
    return min(max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) for pixel in column) < 40


@pytest.mark.parametrize(
    ("shape", "is_one"),
    [((2, 16), True), ((16, 7), True), ((1, 2), True), ((1, 1), False), ((64, 4096), False), ((3, 8, 8), False)],
)
def test_trajectories_have_two_axes_one_of_them_with_few_channels(shape, is_one):
    assert is_trajectory(shape) is is_one


def test_time_is_the_axis_along_which_values_change_least():
    joints = RAMP[:, :, :4] + torch.tensor([3.0, -3.0, 1.0, -2.0, 0.0, 2.0]).view(6, 1)  # (3, 6, 4): 6 joints, 4 points
    first, second = over_time([joints, joints + 1])
    assert (first.shape, second.shape) == ((3, 6, 4), (3, 6, 4))
    turned, other = over_time([joints.transpose(1, 2), joints.transpose(1, 2) + 1])
    assert torch.equal(turned, joints)
    assert torch.equal(other, joints + 1)
    (alone,) = over_time([RAMP.transpose(1, 2)])  # one channel: its values do not change along an axis of length 1
    assert torch.equal(alone, RAMP)


def test_a_rising_channel_is_a_line_from_the_lower_left_to_the_upper_right():
    image = plots([RAMP], (-1.0, 1.0), columns=2)
    assert image.size == (2 * WIDTH, 2 * HEIGHT)
    for corner in ((0, 0), (WIDTH, 0), (0, HEIGHT)):
        for part in (0.25, 0.75):
            x = corner[0] + PAD + part * (WIDTH - 2 * PAD)
            y = corner[1] + PAD + (1 - part) * (HEIGHT - 2 * PAD)
            assert has(image, x, y, CHANNEL_COLOURS[0]), (corner, part)
    assert image.getpixel((WIDTH + WIDTH // 2, HEIGHT + HEIGHT // 2)) == (255, 255, 255)  # no fourth sample


def test_the_range_has_room_and_constant_curves_have_one():
    assert ends(torch.tensor([[-1.0, 1.0]])) == (pytest.approx(-1.08), pytest.approx(1.08))  # 4% of 2
    assert ends(torch.tensor([[2.0, 2.0]])) == (1.5, 2.5)
    assert ends(torch.tensor([[float("nan"), 0.0, 1.0]])) == (pytest.approx(-0.04), pytest.approx(1.04))


def test_compiled_curves_are_below_those_of_full_precision_and_above_their_pale_lines():
    flat = torch.zeros(2, 1, 9)
    image = picture([RAMP[:2], flat], columns=2)
    assert image.size == (2 * WIDTH, 2 * HEIGHT)
    middle = PAD + round((HEIGHT - 2 * PAD) / 2)
    quarter = PAD + round((WIDTH - 2 * PAD) / 4)
    assert has(image, quarter, HEIGHT + middle, CHANNEL_COLOURS[0])  # the compiled line is flat
    upper = HEIGHT + PAD + round((HEIGHT - 2 * PAD) * (0.5 + 0.25 / 1.08))  # where full precision has -0.5
    pale = tuple(round(level + 0.62 * (255 - level)) for level in CHANNEL_COLOURS[0])
    assert has(image, quarter, upper, pale)
    assert not has(image, quarter, upper, CHANNEL_COLOURS[0])


def test_figures_of_trajectories_name_the_largest_difference_of_all_samples():
    other = RAMP.clone()
    other[2, 0, 4] += 0.25  # in a sample that is not shown
    drawn = {"a": Drawn("One", "x", RAMP), "b": Drawn("Other", "y", other)}
    figure = laid_out(drawn, [("a", "b")], 2)
    assert isinstance(figure, CurveFigure)
    assert (figure.shown, figure.total, figure.channels, figure.points) == (2, 3, 1, 9)
    (pair,) = figure.curves
    assert pair.difference == "Other − One"  # noqa: RUF001 - a minus sign
    assert pair.largest == pytest.approx(0.25)
    for uri in (pair.image, pair.errors):
        image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        assert image.size == (2 * WIDTH, HEIGHT)


def test_the_report_of_a_policy_has_plots_and_a_picture(tmp_path):
    made = artifacts(tmp_path / "model")
    samples = {"full_precision": RAMP, "simulated": RAMP + 0.01, "deployed": RAMP + 0.02}
    figures = replace(made[VERIFICATION].figures, cosine=0.99987, cosine_min=0.9991, error_max=0.02)
    made[VERIFICATION] = Verification(figures, made[VERIFICATION].layers, samples=samples)
    report = WriteReport().run(State(made, reader="report"), Context(tmp_path))[REPORT]
    page = Page(report.html)
    assert len(page.found("samples", "img")) == 4  # two pairs, each with its difference
    assert "The same 3 seeds: 1 channel over 9 points in time" in page.text("samples")
    assert "Deployed (thin) on top of full precision (broad)" in page.text("samples")
    assert "Cosine similarity 0.999870" in page.text("tiles")
    assert "the worst 0.999100, the largest error of a value 0.020" in page.text("tiles")
    assert (report.metrics["cosine"], report.metrics["cosine_min"], report.metrics["error_max"]) == (
        *(0.99987, 0.9991),
        0.02,
    )
    assert Image.open(io.BytesIO(report.picture)).size == (3 * WIDTH, 2 * HEIGHT)


def test_two_runs_of_a_policy_are_compared_by_their_plots(tmp_path):
    def side(error: float) -> object:
        class Side:
            folder = tmp_path / str(error)
            samples = {"full_precision": RAMP, "deployed": RAMP + error}  # noqa: RUF012

        return Side()

    figure = Difference(side(0.01), side(0.03)).comparison(1 << 16)
    assert isinstance(figure, CurveFigure)
    assert [(pair.below, pair.above) for pair in figure.curves] == [
        *(("A deployed", "B deployed"), ("Full precision", "A deployed"), ("Full precision", "B deployed")),
    ]
    assert [pair.largest for pair in figure.curves] == [pytest.approx(x, abs=1e-6) for x in (0.02, 0.01, 0.03)]
