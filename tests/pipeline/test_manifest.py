"""A compiled folder is what was delivered, or what departs is named."""

import hashlib
import json
from pathlib import Path

import pytest
from toys import START, toy_recipe
from typer.testing import CliRunner

from intaglio.pipeline import Store, compile
from intaglio.pipeline.cli import app
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.manifest import Manifest, compiled_folders


@pytest.fixture
def delivered(store: Store, tmp_path: Path) -> Path:
    compile(toy_recipe("Append", "Add"), store, start=START, out=tmp_path / "out")
    return tmp_path / "out/onnxruntime-cpu"


def departures(folder: Path) -> list[str]:
    return list(Manifest.read(folder).departures(folder))


def test_what_was_delivered_passes(delivered: Path) -> None:
    assert departures(delivered) == []
    assert Manifest.read(delivered).files["numbers.json"].sha256 == hashlib.sha256(b"[1, 1]").hexdigest()
    assert compiled_folders(delivered) == compiled_folders(delivered.parent) == [delivered]


def test_every_departure_is_named(delivered: Path, tmp_path: Path) -> None:
    (delivered / "numbers.json").write_text("[1, 2]")
    (delivered / "text.json").write_text("[]")
    (delivered / "recipe.yaml").rename(tmp_path / "elsewhere.yaml")
    (delivered / "deeper").mkdir()
    (delivered / "deeper/more.txt").write_text("")
    digest = hashlib.sha256(b"[1, 2]").hexdigest()
    before = hashlib.sha256(b"[1, 1]").hexdigest()
    assert departures(delivered) == [
        f"numbers.json: has the sha256 {digest}, delivered was {before}",
        "recipe.yaml: is missing",
        "text.json: has 2 bytes, delivered were 7",
        "deeper/more.txt: was not delivered",
    ]
    (delivered / "recipe.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    assert "recipe.yaml: is a link, where a file was delivered" in departures(delivered)


def test_the_command_exits_with_1_where_a_byte_has_flipped(delivered: Path) -> None:
    fine = CliRunner().invoke(app, ["verify", str(delivered.parent)])
    assert (fine.exit_code, fine.stdout) == (0, f"{delivered}: as delivered\n")
    (delivered / "numbers.json").write_text("[1, 3]")
    bad = CliRunner().invoke(app, ["verify", str(delivered), "--json"])
    assert bad.exit_code == 1
    assert [problem.split(":")[0] for problem in json.loads(bad.stdout)[str(delivered)]] == ["numbers.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no manifest: the whole: Invalid JSON"),
        (b"\xff\xfe", "is no manifest: the whole: Invalid JSON"),
        (b"[" * 100_000, "is no manifest: the whole: Invalid JSON"),
        (b"[]", "is no manifest: the whole: Input should be an object"),
        (b'{"files": {"model.onnx": 7}}', r"is no manifest: files\.model\.onnx: Input should be an object"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(text: bytes, message: str, delivered: Path) -> None:
    (delivered / "manifest.json").write_bytes(text)
    with pytest.raises(RecipeError, match=message):
        Manifest.read(delivered)


@pytest.mark.parametrize("name", ["../numbers.json", "/etc/hostname", "deeper/../../numbers.json"])
def test_a_manifest_does_not_lead_out_of_its_folder(name: str, delivered: Path) -> None:
    (delivered.parent / "numbers.json").write_text("[1, 1]")
    manifest = json.loads((delivered / "manifest.json").read_text())
    manifest["files"] = {**manifest["files"], name: manifest["files"]["numbers.json"]}
    (delivered / "manifest.json").write_text(json.dumps(manifest))
    assert departures(delivered) == [f"{name}: is outside of the folder"]


def test_a_folder_without_manifest_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no manifest\.json: give one target's folder"):
        Manifest.read(tmp_path)
    with pytest.raises(RecipeError, match=r"no manifest\.json in it or below: give a folder"):
        compiled_folders(tmp_path)
