"""Pages as a browser shows them: wide and narrow, light and dark, with the keyboard."""

import io
from pathlib import Path

import pytest
from browser import Browser
from PIL import Image
from reporting import SAMPLES, artifacts, points

from intaglio.exporters.report.report import WriteReport
from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.keys import FRONT, REPORT
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context

FIGURES = {
    "samples": (".stage img.left", ".stage img.right", ".controls input", ".error img", ".strip .dot"),
    "precision": (".share i", ".bits td[class]"),
    "front": (".dot", ".ring", "polyline"),
    "sensitivity": (".heat td[class^=h]", ".scale .ramp"),
    "distillation": ("polyline",),
    "cost": (".bars .bar",),
    "parity": ("tbody tr", ".bar"),
    "lint": (".l-warning",),
    "engine": (".facts",),
    "provenance": (".command", ".sources"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    plans = points(4e-2, 4e-3, 4e-4)
    made = artifacts(root / "model") | {FRONT: Front(plans, plans[1], SAMPLES)}
    WriteReport().run(State(made, reader="report"), Context(root))[REPORT].save(root)
    return root / "report.html"


def brightness(png: bytes) -> float:
    """Return the mean brightness of the picture's left rim, where the page has its background."""
    image = Image.open(io.BytesIO(png)).convert("L")
    return sum(image.crop((0, 0, 4, image.height)).tobytes()) / (4 * image.height)


@pytest.mark.parametrize("width", [1280, 420])
def test_a_report_has_every_figure_and_fits(tab: Browser, report: Path, width: int) -> None:
    tab.show(report, width)
    wanted = [f"#{section} {css}" for section, figures in FIGURES.items() for css in figures]
    drawn = tab.evaluate(
        f"{wanted}.filter(css => {{ const found = document.querySelector(css);"
        " return !found || !found.getClientRects().length; })"
    )
    assert drawn == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
    light = tab.screenshot()
    assert Image.open(io.BytesIO(light)).width == width
    tab.show(report, width, dark=True)
    assert brightness(light) > 200
    assert brightness(tab.screenshot()) < 60
    assert tab.problems == []


def test_the_divider_moves_by_keyboard_and_by_dragging(tab: Browser, report: Path) -> None:
    tab.show(report, 1280)
    at = "document.querySelector('.stage').style.getPropertyValue('--at')"
    tab.evaluate("document.querySelector('.controls input').focus()")
    for _ in range(3):
        tab.press("ArrowRight")
    assert tab.evaluate(at) == "53%"
    x, y, width = tab.evaluate(
        "(box => [box.x, box.y + 5, box.width])((stage => (stage.scrollIntoView(),"
        " stage.getBoundingClientRect()))(document.querySelector('.stage')))"
    )
    press = {"button": "left", "buttons": 1, "clickCount": 1, "y": y}
    tab.call("Input.dispatchMouseEvent", type="mousePressed", x=x + width / 8, **press)  # in the first of two columns
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * 3 / 8, **press)
    tab.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + width * 3 / 8, **press)
    assert tab.evaluate(at) == "75%"
    tab.evaluate("document.querySelector('.controls select').value = 1")
    tab.evaluate("document.querySelector('.controls select').dispatchEvent(new Event('input'))")
    assert tab.evaluate("document.querySelector('.stage .left').alt") == "Simulated, 4 samples"
    tab.evaluate("document.querySelector('.controls select').focus()")
    for _ in range(3):  # the slider, the other side, the button
        tab.press("Tab")
    tab.press(" ")
    assert tab.evaluate("document.querySelector('.compare').classList.contains('flicker')") is True
    assert tab.evaluate("document.querySelector('.controls button').getAttribute('aria-pressed')") == "true"
    assert tab.problems == []


def test_the_theme_can_be_switched(tab: Browser, report: Path) -> None:
    tab.show(report, 420)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(paper)
    assert tab.evaluate(f"(document.getElementById('theme').click(), {paper})") == "rgb(20, 22, 24)"
    assert tab.evaluate(f"(document.getElementById('theme').click(), {paper})") == light


def test_nothing_is_loaded_from_elsewhere(tab: Browser, report: Path) -> None:
    """The page forbids it itself: a picture that somebody writes into it is refused."""
    page = report.with_name("with-a-picture.html")
    page.write_text(
        report.read_text("utf-8").replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), "utf-8"
    )
    tab.show(page, 420)
    assert [problem for problem in tab.problems if "Content Security Policy" in problem]
