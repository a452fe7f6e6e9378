"""A compiled folder is what was delivered, or what departs is named."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from toys import START, toy_recipe
from typer.testing import CliRunner

from intaglio import Store, compile
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.runs.manifest import Manifest, compiled_folders, target_name


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
        f"numbers.json: has the sha256 {digest}, not {before}",
        "recipe.yaml: is missing",
        "text.json: has 2 bytes, but 7 were delivered",
        "deeper/more.txt: was not delivered",
    ]
    (delivered / "recipe.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    assert "recipe.yaml: is a link, where a file was delivered" in departures(delivered)


def test_the_command_exits_with_1_where_a_byte_has_flipped(delivered: Path) -> None:
    fine = CliRunner().invoke(app, ["verify", str(delivered.parent)])
    assert (fine.exit_code, fine.stdout) == (0, f"{delivered}: all files match the manifest\n")
    (delivered / "numbers.json").write_text("[1, 3]")
    bad = CliRunner().invoke(app, ["verify", str(delivered), "--json"])
    assert bad.exit_code == 1
    assert [problem.split(":")[0] for problem in json.loads(bad.stdout)[str(delivered)]] == ["numbers.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no manifest: Invalid JSON"),
        (b"\xff\xfe", "is no manifest: Invalid JSON"),
        (b"[" * 100_000, "is no manifest: Invalid JSON"),
        (b"[]", "is no manifest: Input should be an object"),
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
    with pytest.raises(RecipeError, match=r"no manifest\.json: give the folder of one target"):
        Manifest.read(tmp_path)
    with pytest.raises(RecipeError, match=r"no manifest\.json in it or below: give a folder"):
        compiled_folders(tmp_path)


def test_links_pipes_and_empty_folders_beside_what_was_delivered_are_named(delivered: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    (delivered / "extra").symlink_to(tmp_path / "other")
    (delivered / "nowhere").symlink_to("nowhere")
    os.mkfifo(delivered / "pipe")
    (delivered / "a/b").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(delivered) + b"/caf\xe9\x1b[31m")).write_text("")
    assert departures(delivered) == [
        r"caf\udce9\x1b[31m: was not delivered",
        "extra: was not delivered: a link",
        "nowhere: was not delivered: a link",
        "pipe: was not delivered: a named pipe",
        "a/b: was not delivered: an empty folder",
    ]


def test_a_pipe_or_a_linked_folder_in_a_delivered_file_s_place_is_named(delivered: Path, tmp_path: Path) -> None:
    (delivered / "numbers.json").unlink()
    os.mkfifo(delivered / "numbers.json")
    (delivered / "text.json").unlink()
    (delivered / "text.json").symlink_to(tmp_path)
    assert departures(delivered) == [
        "numbers.json: is a named pipe, where a file was delivered",
        "text.json: is a link, where a file was delivered",
    ]


@pytest.mark.parametrize("digest", ["../../elsewhere", "0" * 63, "0" * 64 + "\n", "A" * 64, ""])
@pytest.mark.parametrize("place", ["files", "start", "steps", "key"])
def test_what_is_no_digest_is_refused_wherever_it_stands(place: str, digest: str, delivered: Path) -> None:
    manifest = json.loads((delivered / "manifest.json").read_text())
    match place:
        case "files":
            manifest["files"]["numbers.json"]["sha256"] = digest
        case "start":
            manifest["start"]["NUMBERS"] = digest
        case "steps":
            manifest["steps"][0]["outputs"]["NUMBERS"] = digest
        case "key":
            manifest["steps"][0]["key"] = digest
    (delivered / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=r"is no manifest: \w+.*: String should match pattern"):
        Manifest.read(delivered)


def test_a_manifest_that_is_no_file_of_the_folder_is_refused_at_once(delivered: Path, tmp_path: Path) -> None:
    (delivered / "manifest.json").rename(tmp_path / "manifest.json")
    (delivered / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(RecipeError, match=r"manifest\.json: is a link out of"):
        Manifest.read(delivered)
    (delivered / "manifest.json").unlink()
    os.mkfifo(delivered / "manifest.json")
    with pytest.raises(RecipeError, match=r"manifest\.json: is not a regular file"):
        Manifest.read(delivered)
    (delivered / "manifest.json").unlink()
    with (delivered / "manifest.json").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(RecipeError, match="has 1073741824 bytes: at most 16777216 are read"):
        Manifest.read(delivered)


def test_the_target_of_a_linked_folder_is_known_by_either_name(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime-cpu").mkdir()
    (tmp_path / "latest").symlink_to("onnxruntime-cpu")
    (tmp_path / "tensorrt-rtx").symlink_to(tmp_path)
    assert [target_name(tmp_path / name) for name in ("onnxruntime-cpu", "latest", "tensorrt-rtx")] == [
        "onnxruntime-cpu",
        "onnxruntime-cpu",
        "tensorrt-rtx",
    ]
