"""Run engine.plan on the inputs in selftest/, compare its outputs with the expected ones, and time it.

This script needs Python 3.10, NumPy, TensorRT and the CUDA driver, nothing else. It exits with 1 if an output is out
of tolerance, with 2 if the engine cannot be run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tensorrt import Dims, ILogger

    Array: TypeAlias = NDArray[Any]
    Shape: TypeAlias = tuple[int, ...]

WARM_UP = 5


class RunError(Exception):
    """The engine cannot be run here, or not on these inputs."""


class Execution:
    """Engine that is ready to run on inputs and outputs in GPU memory."""

    def __init__(self, module: ModuleType, plan: bytes, built_by: str = "another TensorRT") -> None:
        """Load the engine. Raises RunError if the runtime refuses it."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = module
        errors: list[str] = []

        class Log(trt.ILogger):  # type: ignore[misc]  # Any where tensorrt is not installed
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: ILogger.Severity, msg: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(msg)

        self._log = Log()
        self._runtime = trt.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RunError(
                f"{module.__name__} {trt.__version__} cannot load the engine, which {built_by} built: build it again"
                f" here: {' '.join(errors) or 'it gives no reason'}"
            )
        context = engine.create_execution_context()
        if context is None:
            raise RunError(f"not enough GPU memory to run the engine: {' '.join(errors) or 'it gives no reason'}")
        self._engine, self._context, self._errors = engine, context, errors
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    @property
    def activation_bytes(self) -> int:
        """GPU memory of a call in bytes, without weights, inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def resize(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the shapes of the inputs and return those of the outputs. Raises RunError for unsupported shapes."""
        if absent := sorted(set(self.inputs) - shapes.keys()):
            raise RunError(f"the engine also needs {', '.join(absent)}")
        problems = []
        for name in self.inputs:
            shape, built = shapes[name], _shape(self._engine.get_tensor_shape(name))
            if shape == built:
                continue
            ends = self._engine.get_tensor_profile_shape(name, 0) if -1 in built else (built, built, built)
            smallest, _, largest = map(_shape, ends)
            inside = len(shape) == len(built) and all(
                a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)
            )
            if not inside:
                problems.append(f"{name} has the shape {shape}, but the engine is for {smallest} to {largest}")
            elif not self._context.set_input_shape(name, shape):
                problems.append(f"{name}: the engine refuses the shape {shape}: {' '.join(self._errors)}")
        if problems:
            raise RunError("; ".join(problems))
        return {name: _shape(self._context.get_tensor_shape(name)) for name in self.outputs}

    def start(self, addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue one call at the sizes given to `resize`. The memory must stay until the stream has finished it."""
        for name in (*self.inputs, *self.outputs):
            self._context.set_tensor_address(name, addresses[name])
        if not self._context.execute_async_v3(stream):
            raise RunError(f"the engine does not run: {' '.join(self._errors) or 'it gives no reason'}")


def _shape(sizes: Dims | Shape) -> Shape:
    return tuple(int(sizes[axis]) for axis in range(len(sizes)))


class Cuda:
    """First GPU, through the driver's own library, which exists wherever a GPU is."""

    def __init__(self) -> None:
        """Open the driver. Raises RunError if there is none."""
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RunError(f"no CUDA driver, so no GPU to run on: {error}") from error
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        self._stream = stream

    @property
    def stream(self) -> int:
        """Return the address of the stream, as TensorRT takes it."""
        return self._stream.value or 0

    def free_bytes(self) -> int:
        """Return how many bytes of GPU memory are free now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size_bytes: int) -> int:
        """Allocate GPU memory and return its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size_bytes)))
        return address.value

    def free(self, address: int) -> None:
        """Free GPU memory that `allocate` or `upload` returned."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, array: Array) -> int:
        """Copy an array to the GPU and return its address."""
        array = np.ascontiguousarray(array)
        address = self.allocate(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _host(array), ctypes.c_size_t(array.nbytes))
        return address

    def download(self, address: int, like: Array) -> Array:
        """Copy GPU memory into an array with the shape and the type of `like`."""
        array = np.empty_like(like, order="C")
        self._call("cuMemcpyDtoH_v2", _host(array), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self._call("cuStreamSynchronize", self._stream)

    def mark(self) -> ctypes.c_void_p:
        """Record an event on the stream."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self._call("cuEventRecord", event, self._stream)
        return event

    def milliseconds(self, begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Return the time between two marks, in milliseconds."""
        took = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(took), begin, end)
        return took.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            raise RunError(f"{name}: CUDA error {code}: {(text.value or b'unknown').decode()}")


def _host(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def compare(output: Array, expected: Array) -> float:
    """Return the relative L2 error; infinite if the shapes differ or a value is not finite."""
    if output.shape != expected.shape or not np.isfinite(output).all():
        return float("inf")
    found, known = output.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - known)) / max(float(np.linalg.norm(known)), 1e-12)


def read_case(path: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read inputs and expected outputs, by name."""
    with np.load(path, allow_pickle=False) as arrays:
        ends = [{n.partition(".")[2]: arrays[n] for n in arrays.files if n.startswith(f"{end}.")} for end in "io"]
    return ends[0], ends[1]


def run_case(execution: Execution, cuda: Cuda, inputs: dict[str, Array], outputs: dict[str, Array], runs: int) -> Any:
    """Return the outputs by name, and the GPU time of each of `runs` more calls in milliseconds."""
    shapes = execution.resize({name: array.shape for name, array in inputs.items()})
    wrong = {name: shape for name, shape in shapes.items() if name not in outputs or outputs[name].shape != shape}
    if wrong:
        raise RunError(f"the engine's outputs are {wrong}, not those of selftest/: it was built from another model")
    addresses = {name: cuda.upload(array) for name, array in inputs.items()}
    addresses |= {name: cuda.allocate(outputs[name].nbytes) for name in shapes}
    try:
        execution.start(addresses, cuda.stream)
        cuda.synchronize()
        found = {name: cuda.download(addresses[name], outputs[name]) for name in shapes}
        moments = []
        for _ in range(runs + WARM_UP if runs else 0):
            begin = cuda.mark()
            execution.start(addresses, cuda.stream)
            moments.append((begin, cuda.mark()))
        cuda.synchronize()
        return found, [cuda.milliseconds(*ends) for ends in moments[WARM_UP:]]
    finally:
        for address in addresses.values():
            cuda.free(address)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check engine.plan against the recorded outputs and time it. Returns 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Check and time engine.plan.")
    parser.add_argument("--runs", type=int, default=50, help="calls that are timed")
    given = parser.parse_args(arguments)
    here = Path(__file__).resolve().parent
    kit = json.loads((here / "kit.json").read_text(encoding="utf-8"))
    try:
        return _check(here, kit, given.runs)
    except RunError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def _check(here: Path, kit: dict[str, Any], runs: int) -> int:
    plan = here / "engine.plan"
    if not plan.is_file():
        raise RunError("no engine.plan beside this script: build it first, as README.md says")
    cuda = Cuda()
    try:
        module = import_module(kit["module"])
    except ImportError as error:
        raise RunError(f"no Python module {kit['module']}: {error}") from error
    free = cuda.free_bytes()
    execution = Execution(module, plan.read_bytes())
    taken = free - cuda.free_bytes()
    failed = 0
    for number, case in enumerate(kit["selftest"]):
        inputs, expected = read_case(here / case)
        found, took = run_case(execution, cuda, inputs, expected, runs if number == 0 else 0)
        for name, output in found.items():
            distance = compare(output, expected[name])
            good = distance <= kit["tolerance"]
            failed += not good
            word = "as expected" if good else "WRONG"
            print(f"{case} {name}: relative L2 error {distance:.2e}, tolerance {kit['tolerance']:.2e}: {word}")
        if took:
            rows = " ".join(f"{name}{list(array.shape)}" for name, array in inputs.items())
            print(f"latency, median of {len(took)} calls: {statistics.median(took):.3f} ms, least {min(took):.3f} ms")
            print(f"    of {rows}")
    sizes = {
        "engine.plan": plan.stat().st_size,
        "activations": execution.activation_bytes,
        "used on the GPU by engine and activations": taken,
        "still free on the GPU": cuda.free_bytes(),
    }
    print(f"memory: {', '.join(f'{what} {size_bytes / 1e6:.1f} MB' for what, size_bytes in sizes.items())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
