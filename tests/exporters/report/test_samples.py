"""Samples on the page of the report: sheets of the same seeds, their errors, frames of clips, a figure of each."""
# ruff: noqa: RUF001 - the page sets its figures with a multiplication sign, a minus sign and a dash

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from reporting import FIGURES, Page, write

from intaglio.exporters.report.figures import (
    strip,
)
from intaglio.exporters.report.grids import Drawn, sample_figure
from intaglio.pipeline.artifacts.keys import (
    VERIFICATION,
)
from intaglio.pipeline.artifacts.verification import Verification


def decode(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


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


def test_the_picture_has_full_precision_above_deployed(made):
    report = write(made)
    assert report.picture is not None
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(report.picture))))
    assert image.shape == (2 * 8 * 3, 4 * 8 * 3, 3)
    assert (image[:24] == 0).all()
    assert (image[24:] == 16).all()  # 0.125 of a range of 2 in 255 levels
