"""Files of --out are written whole, and never through or over what is no file."""

import os
from pathlib import Path

import pytest
from harness import full_disk
from typer.testing import CliRunner

from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.output_files import write_output


def odd(kind: str) -> Path:
    """One of the things that a file's name may stand for, in the working folder."""
    path = Path("out.json")
    match kind:
        case "link":
            Path("private").write_text("mine")
            path.symlink_to("private")
        case "link to nowhere":
            path.symlink_to("private")
        case "named pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path = Path("/dev/null")
    return path


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "named pipe", "folder", "device"])
def test_what_is_no_file_is_neither_replaced_nor_written_through(kind: str) -> None:
    path = odd(kind)
    before = os.lstat(path)
    with pytest.raises(
        RecipeError, match=f"{path}: is a {kind.split()[0]}.*, and is not overwritten: choose another --out"
    ):
        write_output(path, "text")
    assert os.lstat(path) == before
    assert not Path("private").exists() or Path("private").read_text() == "mine"


def test_the_old_file_stays_where_the_disk_is_full_or_the_writer_fails() -> None:
    path = Path("out.json")
    write_output(path, "old")
    with full_disk(5), pytest.raises(OSError, match=r"File too large: 'out\.json'"):
        write_output(path, "new and longer")
    with pytest.raises(UnicodeEncodeError):
        write_output(path, "half \udce9")
    assert path.read_text() == "old"
    assert os.listdir() == ["out.json"]


def test_no_file_is_written_into_a_compiled_folder() -> None:
    inside = Path("build/onnxruntime-cpu/more")
    inside.mkdir(parents=True)
    (inside.parent / "graph.json").write_text("{}")
    write_output(inside / "out.json", "text")
    (inside.parent / "manifest.json").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"out\.json: lies in the compiled folder .*build/onnxruntime-cpu, which holds"
    ):
        write_output(inside / "out.json", "other")
    assert (inside / "out.json").read_text() == "text"


@pytest.mark.parametrize("command", [["schema"], ["init", "model", "--force"]])
def test_commands_refuse_a_link_before_they_work(command: list[str]) -> None:
    odd("link")
    result = CliRunner().invoke(app, [*command, "--out", "out.json"])
    assert (result.exit_code, result.stderr) == (
        2,
        "intaglio: out.json: is a link, and is not overwritten: choose another --out\n",
    )
