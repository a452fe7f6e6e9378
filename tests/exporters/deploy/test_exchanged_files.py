"""Load a compiled folder in which a file was exchanged, cut off or linked since the run that wrote it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiled import compiled

import intaglio
from intaglio.exporters.deploy.denoiser import check_delivered
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.runs.manifest import MANIFEST

DATA = "model.onnx.data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return compiled(tmp_path / "onnxruntime-cpu")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved").name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (DATA, flip, "has the sha256"),
        (DATA, lambda file: file.write_bytes(file.read_bytes()[:1000]), "has 1000 bytes, but 4096 were delivered"),
        (DATA, Path.unlink, "is missing"),
        (DATA, link, "is a link, where a file was delivered"),
        ("model.onnx", flip, "has the sha256"),
        ("graph.json", lambda file: file.write_text(file.read_text() + " "), r"has \d+ bytes"),
    ],
)
def test_a_file_that_is_not_the_delivered_one_is_named(
    name: str, change: Callable[[Path], object], message: str, folder: Path
) -> None:
    change(folder / name)
    with pytest.raises(RecipeError, match=rf"onnxruntime-cpu: {name}: ({message}).*: run the recipe again; if you"):
        intaglio.load(folder)


def test_files_that_are_not_read_may_be_changed(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("# my notes")
    (folder / "notes.txt").write_text("mine")
    made = intaglio.load(folder, threads=1)
    assert made(torch.zeros(1, 16, 64), torch.tensor([600.0]))[0].isfinite().all()


def test_a_folder_without_a_manifest_is_loaded_as_it_is(folder: Path) -> None:
    flip(folder / DATA)
    (folder / MANIFEST).unlink()
    check_delivered(folder, (DATA,))
    assert intaglio.load(folder, threads=1) is not None
