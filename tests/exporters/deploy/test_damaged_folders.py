"""A compiled folder with any file damaged in any way: one line that names the file, in bounded time and memory."""

import json
import os
import shutil
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from reporting import LAYERS, artifacts
from safetensors.torch import save_file
from typer.testing import CliRunner

from intaglio.exporters.report.report import WriteReport
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, PLAN, REPORT
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.runs.manifest import Manifest

TARGET = "onnxruntime-cpu"
READ_BY = {
    "plan.json": (("show", "{out}"), ("profile", "{folder}"), ("diff", "{folder}", "{folder}")),
    "graph.json": (("show", "{out}"), ("profile", "{folder}"), ("triton", "{folder}", "--out", "repository")),
    "engine.json": (("show", "{out}"),),
    "metrics.json": (("show", "{out}"), ("diff", "{folder}", "{folder}")),
}
CONTENTS = {
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "text": b'"a"',
    "nothing": b"",
    "latin": b'{"\xe9": 1}',
    "not closed": b'{"a": ',
    "deep": b"[" * 17_000_000,
    "digits": b'{"layers": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one target's folder as a run leaves it, with all that can be damaged in a copy of it."""
    place = tmp_path_factory.mktemp("whole")
    made = artifacts(place / "model")
    made[REPORT] = WriteReport().run(State(made, reader="report"), Context(place))[REPORT]
    folder = place / "out" / TARGET
    folder.mkdir(parents=True)
    for key in (PLAN, GRAPH, ENGINE, REPORT):
        made[key].save(folder)
    (folder / "recipe.yaml").write_text("model: m\n")
    Manifest(files={}, seed=0, start={}, steps=(), versions={}).write(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the whole folder, to damage."""
    return shutil.copytree(whole, tmp_path / "out" / TARGET)


def refused(folder: Path, name: str, arguments: tuple[str, ...]) -> None:
    """Assert that the command ends in one line that names the file, within two seconds of CPU time."""
    if name != "metrics.json":
        (folder / "metrics.json").unlink()
    began = time.process_time()
    spelled = [each.format(folder=folder, out=folder.parent) for each in arguments]
    result = CliRunner().invoke(app, spelled)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stderr.startswith(f"intaglio: {folder / name}: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 2000
    assert time.process_time() - began < 2


def loaded(kind: type[Graph], folder: Path) -> str | None:
    """Return what is said of a folder that cannot be loaded."""
    try:
        kind.load(folder)
    except IntaglioError as error:
        return str(error)
    return None


CALLS = [(name, arguments) for name, calls in READ_BY.items() for arguments in calls]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_damaged_file_is_named(folder: Path, name: str, arguments: tuple[str, ...], content: str) -> None:
    (folder / name).write_bytes(CONTENTS[content])
    refused(folder, name, arguments)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [c for c in CALLS if c[1][0] != "triton"],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_no_file_is_named(folder: Path, name: str, arguments: tuple[str, ...], kind: str) -> None:
    file = folder / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    refused(folder, name, arguments)


@pytest.mark.parametrize(("kind", "name"), [(Graph, "graph.json"), (QuantPlan, "plan.json"), (Engine, "engine.json")])
def test_any_field_that_is_missing_or_of_another_type_is_named(folder: Path, kind: type[Graph], name: str) -> None:
    whole = json.loads((folder / name).read_text())
    optional = {"scaled", "command", "layers"} if name != "plan.json" else set()
    for field in whole:
        for other in (None, 7, "x", [], {}, [[1]], {"a": {"b": 1}}, -5, 10**30):
            (folder / name).write_text(json.dumps({**whole, field: other}))
            said = loaded(kind, folder)
            assert said is None or said.startswith(f"{folder / name}: is damaged: {field}: "), (field, other)
        (folder / name).write_text(json.dumps({n: entry for n, entry in whole.items() if n != field}))
        if field not in optional:
            with pytest.raises(RecipeError, match=f"{name}: is damaged: {field}: is missing"):
                kind.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [-1, 64]}, "layers: 1: shape: 0: Input should be greater than or equal to 0"),
        ({"shape": [10**400, 64]}, "layers: 1: shape: 0: Input should be less than 2147483648"),
        ({"shape": [64]}, "layers: 1: shape: Tuple should have at least 2 items"),
        ({"op": "pool"}, "layers: 1: op: Input should be 'linear' or 'conv'"),
        ({"scheme": "w4a16"}, "layers: 1: its formats are w8a8_token, not w4a16"),
        ({"weight": {"kind": "int"}}, "layers: 1: weight: int: bits: is missing"),
        ({"name": LAYERS[0].name}, "layers: 5 rows of 4 layers: a name is there twice"),
    ],
)
def test_a_layer_that_cannot_be_is_named(folder: Path, change: dict[str, object], said: str) -> None:
    rows = json.loads((folder / "plan.json").read_text())["layers"]
    rows[1] |= change
    (folder / "plan.json").write_text(json.dumps({"layers": rows}))
    with pytest.raises(RecipeError, match=rf"plan\.json: is damaged: {said}"):
        QuantPlan.load(folder)


def _png(width: int, height: int) -> bytes:
    """Return a PNG file of a few kB that says to have so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_png(50_000, 50_000), "50000 x 50000 pixels|decompression bomb"),
        (_png(4000, 4000), "4000 x 4000 pixels: at most 8388608 are read"),
        (_png(8, 8)[:44], "is not a picture that can be read"),
        (b"GIF89a" + bytes(100), "cannot identify image file"),
        (b"", "cannot identify image file"),
    ],
    ids=["bomb", "large", "cut off", "gif", "nothing"],
)
def test_a_picture_that_is_none_or_too_large_is_named(folder: Path, content: bytes, said: str) -> None:
    (folder / "samples.png").write_bytes(content)
    result = CliRunner().invoke(app, ["diff", str(folder), str(folder), "--out", "diff.html"])
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stderr.startswith(f"intaglio: {folder / 'samples.png'}: is not a picture that can be read: ")
    assert any(each in result.stderr for each in said.split("|"))


@pytest.mark.parametrize("name", ["balance.safetensors", "branch.safetensors"])
def test_tensors_beside_a_plan_that_are_damaged_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(RecipeError, match=rf"{name}: is not a safetensors file: its header would have"):
        QuantPlan.load(folder)
    part = {"balance.safetensors": "a:block", "branch.safetensors": "a:branch-down"}[name]
    save_file({part: torch.ones(())}, folder / name)
    with pytest.raises(RecipeError, match=rf"{name}: is damaged: 'a:[a-z-]+' is missing"):
        QuantPlan.load(folder)
