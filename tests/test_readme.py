"""What the README shows is what the repository holds."""

import re
from pathlib import Path

from intaglio import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_with(text: str) -> str:
    """The indented block that holds `text`, without its indent."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    found = next(block for block in blocks if text in block)
    return re.sub(r"^    ", "", found, flags=re.MULTILINE)


def test_the_recipe_is_the_one_that_the_demo_runs() -> None:
    shown = Recipe.parse(block_with("sampling_steps: 20").partition("intaglio run")[0])
    kept = Recipe.read(ROOT / "samples/emoji-dit.yaml")
    assert shown == kept


def test_the_pass_is_the_one_in_the_samples() -> None:
    shown = block_with("class KeepFirst").partition("intaglio run")[0].strip()
    assert shown in (ROOT / "samples/custom_pass.py").read_text(encoding="utf-8")


def test_every_file_it_points_to_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []
