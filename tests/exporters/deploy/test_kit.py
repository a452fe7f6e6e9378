"""A kit holds the files that its manifest lists and cases that show an error; it replaces only an earlier kit."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiled import delivered, unpacked
from harness import run_pass
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from quantizing import with_plan
from typer.testing import CliRunner

from intaglio.exporters.deploy import kit
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.onnxruntime.session import open_session
from intaglio.exporters.runtimes.tensorrt.kit_scripts.run import compare, read_case
from intaglio.pipeline.artifacts.keys import GRAPH, TARGET
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target


def test_the_archive_is_what_its_manifest_says_and_the_same_each_time(build, archives, orin):
    files = {str(path.relative_to(orin)) for path in orin.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "SHA256SUMS", "build.py", "build.sh", "kit.json", "model.onnx", "model.onnx.data", "run.py"),
        *(f"selftest/{n}.{end}" for n in range(3) for end in ("npz", "bin")),
    }
    assert orin.name == "emoji-tensorrt-10.3-orin"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=orin, capture_output=True, text=True, check=True)
    assert len(checked.stdout.splitlines()) == len(files) - 1
    archive = archives["tensorrt-10.3-orin"]
    assert kit.write_kit(build / "tensorrt-10.3-orin", Path("again.tar.gz")).read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as packed:
        entries = packed.getmembers()
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {(e.uid, e.gid, e.uname, e.gname, e.mtime) for e in entries} == {(0, 0, "", "", 315532800)}
    assert [path for path in Path.cwd().iterdir() if path.name.startswith(".again")] == []


def test_the_readme_says_sizes_and_steps(orin, rtx):
    read = (orin / "README.md").read_text()
    assert "| x | float32 | 1 x 16 x 64 | 2 x 16 x 64 | 4 x 16 x 64 |" in read
    assert "`step` is the index of the call's timestep among 3: 900, 600, 300." in read
    assert "512 MiB, 256 MiB with --low-memory" in read
    assert "./build.sh" in read
    assert "./build.sh" not in (rtx / "README.md").read_text()
    assert (rtx / "engine.plan").read_bytes() == b"built ahead of time"


def test_every_case_is_at_its_step_and_one_wrong_scale_is_noticed(orin, build):
    cases = [read_case(orin / f"selftest/{i}.npz") for i in range(3)]
    assert [(int(inputs["step"]), inputs["timestep"].tolist()) for inputs, _ in cases] == [
        (0, [900.0, 900.0]),
        (1, [600.0, 600.0]),
        (2, [300.0, 300.0]),
    ]
    inputs, outputs = cases[0]
    model = onnx.load(build / "tensorrt-10.3-orin/model.onnx")
    right = open_session(model.SerializeToString(), optimize=False)
    assert compare(right.run(None, inputs)[0], outputs["y"]) == 0
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "s0")
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.0021), "s0"))
    wrong = open_session(model.SerializeToString(), optimize=False)
    assert compare(wrong.run(None, inputs)[0], outputs["y"]) > 0.01


def test_an_execution_that_rounds_everything_to_float16_passes(dit, tmp_path):
    artifacts = with_plan(dit, lambda layer: W8A8_TOKEN if layer.op == "linear" else FLOAT)
    graph = run_pass(ExportQdq(), artifacts | {TARGET: load_target("tensorrt-10.3-orin")}, tmp_path / "qdq")[GRAPH]
    shapes = {"hidden_states": (2, 3, 8, 8), "timestep": (2,), "class_labels": (2,)}
    (case,) = kit._cases(graph, shapes)
    (found,) = ReferenceEvaluator(str(graph.path)).run(None, dict(case.inputs))
    distance = compare(found, *case.outputs.values())
    assert 0 < distance <= max(kit.TOLERANCE_MIN, kit.TOLERANCE_FACTOR * case.neighbour_rel_l2)
    assert distance < 2 * case.neighbour_rel_l2


def kit_command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["kit", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout + done.stderr


def test_the_command_packs_the_target_that_is_asked_for(build):
    assert kit_command(str(build), "--target", "tensorrt-rtx") == (0, "emoji-tensorrt-rtx.tar.gz\n")
    assert unpacked(Path("emoji-tensorrt-rtx.tar.gz")).name == "emoji-tensorrt-rtx"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "several targets for TensorRT: take one with --target: tensorrt-10.16-orin, tensorrt-10.3-orin"),
        (["--target", "tensorrt-10.3"], "no target 'tensorrt-10.3' in it: did you mean 'tensorrt-10.3-orin'"),
        (["--target", "onnxruntime-cpu"], "onnxruntime-cpu is not for TensorRT"),
    ],
)
def test_what_is_no_single_target_for_tensorrt_is_refused(arguments, message, build):
    code, said = kit_command(str(build), *arguments)
    assert code == 2
    assert message in said


def test_a_folder_without_a_graph_is_refused(tmp_path):
    code, said = kit_command(str(tmp_path / "nothing"))
    assert code == 2
    assert "no graph.json in it or in a folder of it" in said


@pytest.fixture
def folder(build: Path) -> Path:
    """A compiled folder that a test may change."""
    return Path(shutil.copytree(build / "tensorrt-10.3-orin", "build/emoji/tensorrt-10.3-orin"))


def flipped(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def linked(folder: Path, name: str) -> None:
    Path("private").write_text("only mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("private").absolute())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped, r"model\.onnx\.data: has the sha256 .*, not "),
        (lambda folder: linked(folder, "model.onnx_more"), r"model\.onnx_more: is a link, which no run delivers"),
        (lambda folder: linked(folder, "model.onnx"), r"model\.onnx: is a link, where a file was delivered"),
        (lambda folder: linked(folder, "recipe.yaml"), r"recipe\.yaml: is a link, where a file was delivered"),
        (lambda folder: (folder / "more").symlink_to(Path.cwd()), "more: is a link"),
        (lambda folder: os.mkfifo(folder / "model.onnx_f"), "model.onnx_f: is a named pipe"),
        (lambda folder: (folder / "model.onnx.data").unlink(), r"model\.onnx\.data: is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest\.json"),
    ],
)
def test_what_verify_would_refuse_is_not_packed(change, message, folder):
    change(folder)
    with pytest.raises(RecipeError, match=message):
        kit.write_kit(folder, Path("kit.tar.gz"))
    assert not Path("kit.tar.gz").exists()


def test_files_that_no_run_delivered_are_left_out(folder, archives):
    (folder / "model.onnx.kept").write_text("mine")
    (folder / "my_notes.txt").write_text("mine")
    packed = kit.write_kit(folder, Path("kit.tar.gz"))
    assert packed.read_bytes() == archives["tensorrt-10.3-orin"].read_bytes()


def odd_output(kind: str, archive: Path) -> Path:
    out = Path("out.tar.gz")
    match kind:
        case "link":
            shutil.copy(archive, "elsewhere")
            out.symlink_to("elsewhere")
        case "pipe":
            os.mkfifo(out)
        case "folder":
            out.mkdir()
        case "device":
            out = Path("/dev/null")
        case "thesis":
            out.write_text("years of work")
        case "archive of others":
            with tarfile.open(out, "w:gz") as packed:
                packed.add(archive, "thesis/README.md")
        case "half of an archive":
            out.write_bytes(archive.read_bytes()[:100])
    return out


def written(path: Path) -> tuple[int, ...]:
    """Return what writing or replacing a file changes; reading it changes only the time of the last access."""
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.parametrize(
    "kind", ["link", "pipe", "folder", "device", "thesis", "archive of others", "half of an archive"]
)
def test_a_kit_takes_the_place_of_an_earlier_kit_alone(kind, folder, archives, monkeypatch):
    monkeypatch.setattr(kit, "_content", lambda folder, name: pytest.fail("it is refused before any work"))
    out = odd_output(kind, archives["tensorrt-10.3-orin"])
    before = written(out)
    message = f"{out}: exists and is no kit: move it, or choose another --out|{out}: is a .* is not overwritten"
    with pytest.raises(RecipeError, match=message):
        kit.write_kit(folder, out)
    assert written(out) == before


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (
            "compiled",
            "k.tar.gz: lies in the compiled folder .*, which holds only what a run delivers: choose another --out",
        ),
        ("thesis", "thesis/new/k.tar.gz: .*/thesis is no folder: choose another --out"),
    ],
)
def test_a_kit_is_not_written_where_it_would_do_harm_or_cannot_be(inside, message, folder, monkeypatch):
    monkeypatch.setattr(kit, "_content", lambda folder, name: pytest.fail("it is refused before any work"))
    Path("thesis").write_text("years of work")
    before = sorted(folder.rglob("*"))
    with pytest.raises(RecipeError, match=message):
        kit.write_kit(folder, folder / "k.tar.gz" if inside == "compiled" else Path("thesis/new/k.tar.gz"))
    assert sorted(folder.rglob("*")) == before
    assert Path("thesis").read_text() == "years of work"


def test_a_name_that_no_tool_prints_is_refused_as_that_of_the_archive_s_folder(folder):
    code, said = kit_command(str(folder), "--out", "line\nbreak.tar.gz")
    assert (code, said) == (0, "line\\nbreak.tar.gz\n")
    moved = folder.parent.rename(folder.parent.with_name("line\nbreak"))
    with pytest.raises(RecipeError, match=r"line\\nbreak/.*: its name, .*, would name the folder .*: rename it"):
        kit.write_kit(moved / folder.name)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"outputs": {}}, "outputs: there is none"),
        ({"inputs": {}}, "its inputs are not those of the model.onnx beside it"),
        ({"timestep": "other"}, "timestep: other is no input"),
    ],
)
def test_a_graph_file_of_another_graph_is_refused_before_a_call(facts, message, folder):
    graph = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps(graph | facts))
    with pytest.raises(RecipeError, match=rf"graph\.json: .*{message}"):
        kit.write_kit(delivered(folder))


def test_an_earlier_kit_and_an_empty_file_are_written_over(folder, archives):
    out = Path(shutil.copy(archives["tensorrt-rtx"], "kit.tar.gz"))
    expected = archives["tensorrt-10.3-orin"].read_bytes()
    assert kit.write_kit(folder, out).read_bytes() == expected
    out.write_bytes(b"")
    assert kit.write_kit(folder, out).read_bytes() == expected
