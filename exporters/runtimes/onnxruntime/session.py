"""Open ONNX Runtime sessions with settings that compute exactly what the simulation does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime

from intaglio.exporters.float_graph.lean_session import exact_options
from intaglio.exporters.float_graph.onnx_file import read_proto
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.errors import RecipeError, TargetError
from intaglio.pipeline.files import checked_file, printable
from intaglio.pipeline.formats.target import load_target

CPU = "CPUExecutionProvider"
Shape: TypeAlias = tuple[int | str | None, ...]


def open_session(
    model: Path | bytes,
    *,
    optimize: bool = True,
    threads: int = 0,
    providers: Sequence[str] = (),
    optimized: Path | None = None,
    profile: Path | None = None,
    data: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU, or on available `providers`. 0 threads: one for each core.

    `optimized`: the file to which the executed graph is written. `profile`: the prefix of the file with the times of
    the kernels; `end_profiling` writes the file and returns its name. `data`: the folder with the external tensors of a
    model in memory.
    Raises what ONNX Runtime raises.
    """
    options = _options(kernels_for(model, data), threads)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        _write_to(optimized, options)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.log_severity_level = 4  # it logs the end of a profile that never began as an error
    if data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    there = [p for p in providers if p in onnxruntime.get_available_providers() and p != CPU]
    return onnxruntime.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=[*there, CPU]
    )


def graph_session(
    graph: Graph,
    *,
    optimize: bool = True,
    threads: int = 0,
    providers: Sequence[str] = (),
    optimized: Path | None = None,
    profile: Path | None = None,
    model: bytes | None = None,
) -> onnxruntime.InferenceSession:
    """Return a session of a graph in a folder, with the options of `open_session`.

    `model`: the same graph in other operators, serialized, which is opened in place of the file.
    Raises RecipeError if ONNX Runtime does not load the file, or if graph.json describes another graph.
    """
    for each in {graph.path, *graph.path.parent.glob("model.onnx*")}:
        checked_file(each)
    try:
        session = open_session(
            model or graph.path,
            optimize=optimize,
            threads=threads,
            providers=providers,
            optimized=optimized,
            profile=profile,
            data=graph.path.parent if model else None,
        )
    except Exception as e:  # its errors have no common class
        read_proto(graph.path)  # says what is wrong with the files, if that is known
        raise RecipeError(f"{printable(graph.path)}: ONNX Runtime does not load it: {printable(e)}") from e
    ends = {"inputs": (graph.inputs, session.get_inputs()), "outputs": (graph.outputs, session.get_outputs())}
    for end, (specs, values) in ends.items():
        described = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
        found = {value.name: (_dtype(value.type), tuple(value.shape)) for value in values}
        needed = found.keys() if end == "inputs" else set()
        if wrong := sorted(n for n in described.keys() | needed if not _alike(described.get(n), found.get(n))):
            file = printable(graph.path.with_name("graph.json"))
            raise RecipeError(
                f"{file}: its {end} are not those of the model.onnx beside it: {', '.join(map(printable, wrong))}"
            )
    return session


def _dtype(kind: str) -> str:
    """Return ONNX's name of ONNX Runtime's element type: `tensor(float)` -> `float32`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _alike(one: tuple[str, Shape] | None, other: tuple[str, Shape] | None) -> bool:
    """Return True if two descriptions of a value agree in type, rank and all known sizes."""
    if one is None or other is None or one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    pairs = zip(one[1], other[1], strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def write_fused(model: Path, out: Path, settings: Mapping[str, str]) -> None:
    """Write the graph with the fused operators of these settings, for sessions that take no settings.

    The CPU that loads it chooses the layout of weights. Raises what ONNX Runtime raises.
    """
    options = _options(settings, threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    _write_to(out, options)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(str(model), options, providers=[CPU])


def _write_to(optimized: Path, options: onnxruntime.SessionOptions) -> None:
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
    )


def kernels_for(model: Path | bytes, data: Path | None = None) -> Mapping[str, str]:
    """Return settings of the first kernels that multiply a graph exactly on this CPU; `data` as in `open_session`.

    The codes are read only on CPUs whose first kernels are exact for small codes, but not for all codes. Raises
    TargetError if none is exact.
    """
    settings = exact_kernels()
    if settings == exact_kernels(SMALL_CODE):
        return settings
    from intaglio.exporters.runtimes.onnxruntime.codes import largest_code

    return exact_kernels(SMALL_CODE) if largest_code(model, data) <= SMALL_CODE else settings


@cache
def exact_kernels(code: int = 127) -> Mapping[str, str]:
    """Return settings of the first kernels of onnxruntime-cpu that are exact on this CPU for weights up to this code.

    All exact kernels give the same bits, so results do not depend on the CPU. Raises TargetError if none is exact.
    """
    target = load_target("onnxruntime-cpu")
    for kernels in target.kernels:
        if multiplies_exactly(kernels.settings, code):
            return kernels.settings
    tried = ", ".join(kernels.name for kernels in target.kernels)
    raise TargetError(f"no 8-bit kernels of ONNX Runtime are exact on this CPU: tried {tried}")


SMALL_CODE = 64
"""Largest code of a weight with which two products fit into 16 bits: 2 * 255 * 64 is below 2**15."""


def multiplies_exactly(settings: Mapping[str, str], code: int = 127) -> bool:
    """Return True if a linear layer and a convolution of the largest inputs and weights of this code are exact.

    255 * 127 twice is more than 16 bits hold: without VNNI, x86-64 adds such pairs in 16 bits (0.12 relative error).
    """
    import onnx

    c, k = _PROBE_CHANNELS, 9 * _PROBE_CHANNELS
    model = onnx.parser.parse_model(_PROBE)
    constants = {"one": np.float32(1), "zero": np.uint8(128), "sum": np.float32(k * code), "ones": np.ones(c, "f")}
    constants |= {"w": np.full((c, c), code, "b"), "f": np.full((c, c, 3, 3), code, "b")}
    constants |= {name: np.zeros(c, "b") for name in ("w_zero", "f_zero")}  # ONNX Runtime rewrites each of them
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    session = onnxruntime.InferenceSession(model.SerializeToString(), _options(settings, threads=1), providers=[CPU])
    image = np.full((1, c, 8, 8), 127, np.float32)
    linear, convolution = session.run(None, {"rows": np.full((8, c), 127, np.float32), "image": image})
    return bool((linear == c * 127 * code).all() and (convolution == k * 127 * code).all())


_PROBE_CHANNELS = 64
_PROBE = """
<ir_version: 10, opset_import: ["": 21]>
graph (float[8,64] rows, float[1,64,8,8] image) => (float[8,64] y, float[1,64,6,6] z)
{
    q = QuantizeLinear (rows, one, zero)
    d = DequantizeLinear (q, one, zero)
    v = DequantizeLinear <axis = 1> (w, ones, w_zero)
    y = MatMul (d, v)
    q2 = QuantizeLinear (image, one, zero)
    d2 = DequantizeLinear (q2, one, zero)
    v2 = DequantizeLinear <axis = 0> (f, ones, f_zero)
    p = Conv (d2, v2)
    q3 = QuantizeLinear (p, sum, zero)
    z = DequantizeLinear (q3, sum, zero)
}
"""


def _options(settings: Mapping[str, str], threads: int) -> onnxruntime.SessionOptions:
    options = exact_options()
    options.intra_op_num_threads = threads
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    return options
