"""Run onnx, ONNX Runtime and TensorRT-RTX's parser on any graph, in a process of its own with limits.

Inference of types and shapes computes the values that shapes depend on, so a graph of 400 bytes can make 16 GB of
values. No analysis of the graph predicts that for every operator. The process sees no weights: a file of
zeros replaces them.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from intaglio.exporters.float_graph.onnx_file import graphs, is_outside, nbytes, place_outside, tensors
from intaglio.exporters.runtimes.tensorrt.parsing import parse

if TYPE_CHECKING:
    import onnx

Question: TypeAlias = Literal["standard", "types", "loads", "parses"]
SECONDS, SECONDS_PER_MB = 5.0, 15.0
"""CPU seconds that one question may take: a fixed number, and a number for each MB of the model without its weights.

A graph of 300 layers and 1.5 MB takes 7 s to load on a CPU of 2017, and 1 s on one of 2024.
"""
MEGABYTES, TIMES = 256, 16
"""Memory that one question may take: megabytes, and a multiple of the model's size without its weights."""
MAPPED: Mapping[Question, int] = {"standard": 0, "types": 0, "loads": 2, "parses": 2}
"""Number of times that a question maps the file of zeros, which then counts as memory though nothing is read yet."""
LIBRARIES_MB, WATCH_SECONDS = 1024, 0.05
"""Megabytes of memory for the libraries themselves, and seconds between two looks at the memory of the process."""
IDLE_SECONDS = 5
"""Seconds without a question after which the process ends, with the exit code 0."""
MOST_STARTS = 3
"""Number of processes that are started for one question: a process may end, idle, just before it reads the question."""


@dataclass(frozen=True)
class Answer:
    """Complaint of the library if any, and the model with types and shapes if they were asked for."""

    complaint: str | None
    model: onnx.ModelProto | None = None


def ask(question: Question, proto: onnx.ModelProto) -> Answer:
    """Ask onnx, ONNX Runtime or TensorRT-RTX about a graph.

    `standard`: is it valid ONNX? `types`: do types and shapes fit together, and what are they?

    `loads`: can ONNX Runtime make a session of it on the CPU, without running or rewriting it?

    `parses`: can the parser of TensorRT-RTX read it?
    """
    import onnx

    content = _without_weights(proto, apart=question == "parses").SerializeToString()
    seconds, megabytes = SECONDS + SECONDS_PER_MB * len(content) / 1e6, MEGABYTES + TIMES * len(content) // 1_000_000
    mapped = MAPPED[question] * sum(nbytes(t) or 0 for t in tensors(proto) if is_outside(t)) // 1_000_000
    limits = {"seconds": seconds, "megabytes": megabytes, "mapped": mapped}
    found = _PROCESS.ask({"question": question, **limits}, content)
    if found is None:
        return Answer(f"it takes more than {seconds:.0f} s or {megabytes} MB to find out what its values are")
    complaint, inferred = found
    if not inferred:
        return Answer(complaint)
    model = onnx.ModelProto.FromString(inferred)
    for there, here in zip(tensors(model), tensors(proto), strict=True):
        there.CopyFrom(here)
    return Answer(complaint, model)


def _without_weights(proto: onnx.ModelProto, *, apart: bool) -> onnx.ModelProto:
    """Return a copy whose external tensors are in the file `weights`: all at its beginning, or apart from each other.

    TensorRT-RTX refuses tensors of different types in one place.
    """
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    place = 0
    for tensor in tensors(bare):
        if is_outside(tensor):
            size = nbytes(tensor) or 0
            place_outside(tensor, _WEIGHTS, place, size)
            place += -(-size // 64) * 64 if apart else 0
    return bare


_WEIGHTS = "weights"


class _Process:
    """Process that answers questions. It starts with the first question, and again after a limit ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._folder: TemporaryDirectory[str] | None = None
        atexit.register(self._end)

    def ask(self, header: dict[str, Any], content: bytes) -> tuple[str | None, bytes] | None:
        """Return the answer of the process; None if it reached its limits."""
        with self._lock:
            for _ in range(MOST_STARTS):
                running = self._start()
                assert running.stdin is not None
                assert running.stdout is not None
                with suppress(BrokenPipeError):  # then its exit code says why it ended
                    _write(running.stdin, header, content)
                with _watched(running, LIBRARIES_MB + header["megabytes"]):
                    found = _read(running.stdout)
                if found is not None:
                    return found[0]["complaint"], found[1]
                idle = running.wait() == 0  # it ended without questions just before this one arrived
                self._end()
                if not idle:
                    return None
        raise AssertionError(f"{MOST_STARTS} processes ended before they read a question")

    def _start(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._running.poll() is not None:
            self._end()
            self._folder = TemporaryDirectory(ignore_cleanup_errors=True)
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            self._running = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._folder.name,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._running

    def _end(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


_PROCESS = _Process()


@contextmanager
def _watched(process: subprocess.Popen[bytes], megabytes: int) -> Iterator[None]:
    """Kill the process if it takes more memory than this; mapped files that nobody reads take none."""
    import psutil

    done = Event()

    def watch() -> None:
        with suppress(psutil.Error):  # the process has ended
            watched = psutil.Process(process.pid)
            while not done.wait(WATCH_SECONDS):
                if watched.memory_info().rss > megabytes * 1_000_000:
                    process.kill()

    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _write(stream: IO[bytes], header: dict[str, Any], content: bytes) -> None:
    stream.write(json.dumps({**header, "size": len(content)}).encode() + b"\n" + content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; None if the other side has closed the pipe."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    content = stream.read(header["size"])
    return (header, content) if len(content) == header["size"] else None


def serve() -> None:
    """Answer questions until no more come."""
    import select

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries go to stderr
    while sys.platform == "win32" or select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        found = _read(sys.stdin.buffer)
        if found is None:
            return
        header, content = found
        _import_libraries(header["question"])
        _limit(header["seconds"], header["megabytes"] + header["mapped"])
        complaint, inferred = _answer(header["question"], content)
        _write(answers, {"complaint": complaint}, inferred)


def _import_libraries(question: Question) -> None:
    """Import the libraries that answer a question; this does not count as time or memory of its graph."""
    import onnx.shape_inference  # noqa: F401
    import onnx_ir  # noqa: F401

    if question == "loads":
        import onnxruntime  # noqa: F401
    if question == "parses":
        import tensorrt_rtx  # noqa: F401


def _limit(seconds: float, megabytes: int) -> None:
    """Limit the time and memory that the process may take from now on, on Linux only."""
    if sys.platform != "linux":
        return
    import resource
    import time

    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    most = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(question: Question, content: bytes) -> tuple[str | None, bytes]:
    """Return the complaint, if any, and the inferred model."""
    import onnx

    proto = onnx.ModelProto.FromString(content)
    inferred = b""
    try:
        _write_weights(proto)
        match question:
            case "standard":
                _check(content)
            case "types":
                model = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
                inferred = model.SerializeToString()
            case "loads":
                _load(proto)
            case "parses":
                return _parsed(proto), b""
    except MemoryError:
        os._exit(1)
    except Exception as e:  # functions of operators raise exceptions of any type
        if "bad_alloc" in str(e):
            os._exit(1)
        return " ".join(str(e).split()) or type(e).__name__, b""
    return None, inferred


def _write_weights(proto: onnx.ModelProto) -> None:
    """Write a sparse file of zeros that holds all external tensors."""
    from onnx.external_data_helper import ExternalDataInfo

    places = [ExternalDataInfo(tensor) for tensor in tensors(proto) if is_outside(tensor)]
    with open(_WEIGHTS, "wb") as file:
        file.truncate(max(((place.offset or 0) + (place.length or 0) for place in places), default=0))


def _check(content: bytes) -> None:
    """Raise what the checker of onnx raises, except for deprecated operators, which runtimes execute."""
    import onnx

    try:
        onnx.checker.check_model(content)
    except onnx.checker.ValidationError as e:
        if "is deprecated" not in str(e):  # GroupNormalization of opsets 18 to 20
            raise


def _parsed(proto: onnx.ModelProto) -> str | None:
    """Return what the parser of TensorRT-RTX says against a graph, whose nodes are named by their first outputs."""
    _name_nodes(proto)
    return parse(proto, Path.cwd() / "ones")


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Name all nodes by their first outputs."""
    for _, nodes in graphs(proto):
        for node in nodes:
            node.name = next(filter(None, node.output), node.name)


def _load(proto: onnx.ModelProto) -> None:
    """Raise what ONNX Runtime raises while it makes a session; nodes are named by their first outputs."""
    import onnxruntime

    _name_nodes(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.getcwd())
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
