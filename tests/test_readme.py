"""The documents are short where they should be, their links lead somewhere, and they use public names only."""

import ast
import json
import re
from pathlib import Path

import pytest
import typer
from documents import CONTRIBUTING, DOCUMENTS, GUIDES, LINK, README, REASON, RESULTS, ROOT, anchors, blocks, links

import intaglio
from intaglio.pipeline.cli.app import app


def names(document: Path) -> str:
    """Return the path of a document, which names its tests."""
    return document.relative_to(ROOT).as_posix()


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300


def test_the_readme_has_one_picture_and_one_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("![") == 1
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 1


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in links(README) if not link.startswith("http")}
    assert [guide.name for guide in GUIDES if guide not in linked] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    broken = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        place = (document.parent / path).resolve() if path else document
        if link.startswith("https://"):
            continue
        if not place.exists() or not place.is_relative_to(ROOT) or (anchor and anchor not in anchors(place)):
            broken.append(link)
    assert broken == []


def test_every_link_of_the_tutorial_leads_to_a_file() -> None:
    cells = json.loads((ROOT / "samples/tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert len(found := LINK.findall(text)) > 3
    assert [link for link in found if not (ROOT / "samples" / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_path_of_the_repository_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:pipeline|passes|exporters|tests|samples)/[\w./*-]+)`", text)
    assert [path for path in named if "my_" not in path and not list(ROOT.glob(path))] == []


def test_the_picture_of_the_house_shows_the_folders_that_exist() -> None:
    house = next(block for block in blocks(CONTRIBUTING) if block.language == "text")
    shown, parent = set(), ""
    for line in house.text.splitlines():
        if (found := re.match(r"( *)([\w.]+(?:/[\w.]+)*)/ ", line)) is not None:
            parent = parent if found[1] else found[2]
            shown.add(f"{parent}/{found[2]}" if found[1] else found[2])
    packages = [file for top in ("pipeline", "passes", "exporters") for file in ROOT.glob(f"{top}/*/__init__.py")]
    folders = {package.parent.relative_to(ROOT).as_posix() for package in packages}
    assert [folder for folder in sorted(shown) if not (ROOT / folder).is_dir()] == []
    assert folders <= shown


def test_every_result_is_under_a_command_and_names_its_machine() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[2:]:  # the first are the introduction, the models
        assert "```console" in section or section.startswith("Fuzzing"), section[:40]
        assert "CPU" in section or section.startswith("Fuzzing"), section[:40]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_a_block_that_is_not_run_says_why(document: Path) -> None:
    for block in blocks(document):
        assert block.language in ("sh", "console", "python", "yaml", "toml", "text"), block.place
        if block.language == "console" or (block.label and block.file is None):
            assert REASON.match(block.label), f"{block.place}: write what it needs, or how long it takes"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_command_has_the_options_that_it_is_given(document: Path) -> None:
    for block in blocks(document):
        if block.language in ("sh", "console"):
            for words in block.commands():
                check_command([word for word in words if not re.match("[A-Z_]+=", word)], block.place)


def check_command(words: list[str], place: str) -> None:
    """Parse a command of intaglio without running it; look for the options of a script in its source."""
    program, first = words[0], words[1] if len(words) > 1 else ""
    if program == "intaglio" and not first.startswith("-"):
        command = typer.main.get_command(app).get_command(None, first)  # type: ignore[attr-defined]  # it is a group
        assert command is not None, f"{place}: no command {first}"
        command.make_context(first, words[2:])
    elif program == "python" and first.endswith(".py"):
        source = (ROOT / first).read_text(encoding="utf-8")
        for option in re.findall(r" --(?:no-)?([a-z-]+)", " ".join(words)):
            assert option.replace("-", "_") in source, f"{place}: {first} has no --{option}"
    elif program == "make":
        assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), place


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_examples_use_public_names_only(document: Path) -> None:
    for block in blocks(document):
        nodes = ast.walk(ast.parse(block.text)) if block.language == "python" else ()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "intaglio":
                assert node.module == "intaglio", f"{block.place}: from {node.module} import"
                assert {alias.name for alias in node.names} <= set(intaglio.__all__), block.place
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "intaglio":
                assert node.attr in intaglio.__all__, f"{block.place}: intaglio.{node.attr}"
