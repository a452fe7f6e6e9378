"""Write a compiled target as a model of NVIDIA's Triton server, for its ONNX Runtime or TensorRT backend."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from intaglio.exporters.deploy.compiled_folder import delivered_files, delivered_name, target_folder, tensorrt_builder
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Engine, Graph, TensorSpec
from intaglio.pipeline.errors import RecipeError, StoreError, TargetError
from intaglio.pipeline.files import MIB, checked_file, read_text
from intaglio.pipeline.formats.target import Target, load_target
from intaglio.pipeline.output_files import check_outside
from intaglio.pipeline.runs.manifest import target_name
from intaglio.pipeline.runs.registry import find_runtime, runtimes

CONFIG = "config.pbtxt"
ENGINE = "engine.plan"
BATCH = "batch"

_FLOATS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"}
_TYPES = _FLOATS | {n: n.upper() for n in ("bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))}


def write_model(
    folder: Path,
    repository: Path,
    *,
    target: str | None = None,
    name: str | None = None,
    version: int = 1,
    vnni: bool = False,
) -> Path:
    """Write `name` into the repository and return its folder; an existing model gets one more version.

    `folder`: one target's folder, or that of all targets together with `target`. A version is written completely or not
    at all. Raises RecipeError or TargetError for a target that Triton does not serve, RecipeError for files that
    changed since the run and for a version or another model that exists, StoreError if the disk cannot be written.
    """
    why = "it serves ONNX Runtime and TensorRT, and loads no engine of TensorRT-RTX"
    served = [name for name, runtime in runtimes().items() if runtime.platform is not None]
    place = target_folder(folder, target, served, what="Triton", why=why)
    name = delivered_name(place) if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise RecipeError(f"{name!r} is no name of a model: give one of letters, digits, _, . and - with --name")
    facts = load_target(target_name(place))
    if vnni and not facts.kernels:
        raise RecipeError(f"{facts.name}: has no 8-bit kernels to choose from: leave --vnni out")
    delivered = delivered_files(place, built_there=(ENGINE,))
    config = _config(place, facts, name)
    model, place_beside = repository / name, repository.resolve().parent
    _check_place(model, version, config)
    try:
        if not place_beside.exists():
            place_beside.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix=f".{repository.resolve().name}.", dir=place_beside) as work:
            fresh = Path(work) / name
            (fresh / str(version)).mkdir(parents=True)
            (fresh / CONFIG).write_text(config, encoding="utf-8")
            _write_version(place, delivered, facts, fresh / str(version), vnni=vnni)
            model.parent.mkdir(parents=True, exist_ok=True)
            if model.exists():
                (fresh / str(version)).rename(model / str(version))
            else:
                fresh.rename(model)
    except OSError as error:
        raise StoreError(f"{model}: cannot be written ({error.strerror or error})") from error
    return repository / name


def _check_place(model: Path, version: int, config: str) -> None:
    """Raise RecipeError for a place in a compiled folder, and for a version or another model that exists."""
    check_outside(model)
    if not os.path.lexists(model):
        return
    if model.is_symlink() or not model.is_dir():
        raise RecipeError(f"{model}: exists and is no folder: choose another --name, or remove it")
    if os.path.lexists(model / str(version)):
        raise RecipeError(f"{model}: has a version {version}: choose another --version or --name, or remove it")
    if not (model / CONFIG).is_file() or read_text(model / CONFIG, most=MIB) != config:
        raise RecipeError(f"{model}: exists with another configuration: choose another --name, or remove it")


def _write_version(place: Path, delivered: Mapping[str, Path], target: Target, out: Path, *, vnni: bool) -> None:
    """Write the model's files. For a CPU its kernels are in the graph, as Triton passes no settings for them."""
    if find_runtime(target.runtime).executes == ENGINE:
        shutil.copyfile(delivered[ENGINE], out / "model.plan")
        return
    from intaglio.exporters.float_graph.onnx_file import read_proto

    read_proto(checked_file(place / "model.onnx"))  # raises RecipeError for a damaged or incomplete file
    if target.kernels:
        from intaglio.exporters.runtimes.onnxruntime.codes import largest_code
        from intaglio.exporters.runtimes.onnxruntime.session import SMALL_CODE, write_fused

        fast = vnni or largest_code(place / "model.onnx") <= SMALL_CODE
        write_fused(place / "model.onnx", out / "model.onnx", target.kernels[0 if fast else -1].settings)
        if not vnni and (wide := wide_int8_weights(out / "model.onnx")):
            raise TargetError(
                f"ONNX Runtime leaves {len(wide)} weights int8 on this CPU, such as {wide[0]}, and CPUs without VNNI"
                " add their products wrongly: write it on another machine, or with --vnni for a server that has it"
            )
        return
    for file, path in delivered.items():
        if file.startswith("model.onnx"):
            shutil.copyfile(path, out / file)


def wide_int8_weights(model: Path) -> list[str]:
    """Return int8 constants beyond SMALL_CODE in an integer product: two such products can exceed 16 bits."""
    import onnx

    from intaglio.exporters.runtimes.onnxruntime.codes import INTEGER_PRODUCTS
    from intaglio.exporters.runtimes.onnxruntime.session import SMALL_CODE

    graph = onnx.load(checked_file(model)).graph
    codes = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    read = {name for node in graph.node if node.op_type in INTEGER_PRODUCTS for name in node.input}
    wide = []
    for name in sorted(read & codes.keys()):
        values = onnx.numpy_helper.to_array(codes[name])
        if max(int(values.max()), -int(values.min())) > SMALL_CODE:
            wide.append(name)
    return wide


@dataclass(frozen=True)
class _Tensor:
    """Input or output as Triton sees it: without the batch axis, and with at least one axis."""

    name: str
    type: str
    dims: tuple[int, ...]
    without_axes: bool
    """True if the model's own tensor has no axis besides the batch."""


def _config(place: Path, target: Target, name: str) -> str:
    """Return the model's configuration; it is batched if all inputs and outputs begin with the batch."""
    graph = Graph.load(place)
    ends = {"input": graph.inputs, "output": graph.outputs}
    if empty := [f"{place / 'graph.json'}: {end}s: there is none" for end, specs in ends.items() if not specs]:
        raise RecipeError(*empty)
    _check(place, target, graph)
    batched = all(spec.shape[:1] == (BATCH,) for specs in ends.values() for spec in specs.values())
    largest = next(iter(tensorrt_builder(place).profile(graph).values()))[2][0] if batched else 0
    runtime = find_runtime(target.runtime)
    gpu = runtime.device == "cuda" or target.provider != "CPUExecutionProvider"
    return _rendered(
        {
            "name": name,
            "platform": runtime.platform,
            "max_batch_size": largest,
            "ends": [(end, [*_tensors(specs, batched=batched)]) for end, specs in ends.items()],
            "kind": "KIND_GPU" if gpu else "KIND_CPU",
            "timesteps": " ".join(f"{t:g}" for t in graph.timesteps) if STEP_INPUT in graph.inputs else "",
        }
    )


def _check(place: Path, target: Target, graph: Graph) -> None:
    """Raise RecipeError or TargetError for a target that Triton cannot serve."""
    specs = {**graph.inputs, **graph.outputs}
    if unknown := [f"{n}: {spec.dtype} is no type of Triton" for n, spec in specs.items() if spec.dtype not in _TYPES]:
        raise TargetError(*unknown)
    if find_runtime(target.runtime).executes != ENGINE:
        return
    engine = place / "engine.json"
    facts = Engine.load(place) if engine.is_file() else None
    if facts is None or facts.runtime != target.runtime:
        raise RecipeError(f"{place}: no engine.json of TensorRT in it: run its recipe with the step `tensorrt`")
    if not (place / "engine.plan").is_file():
        command = facts.command or "the step `tensorrt`"
        raise RecipeError(
            f"{place}: no engine.plan in it: build it there with the server's GPU and version of TensorRT: {command}"
        )
    if scalars := [n for n, spec in specs.items() if not spec.shape]:
        raise TargetError(
            f"{', '.join(scalars)}: the TensorRT backend of Triton cannot take scalars: choose schemes with a scale for"
            " each token, which need no `step`, or serve a target of ONNX Runtime"
        )


def _tensors(specs: Mapping[str, TensorSpec], *, batched: bool) -> Iterable[_Tensor]:
    for name, spec in specs.items():
        dims = tuple(axis if isinstance(axis, int) else -1 for axis in spec.shape[1 if batched else 0 :])
        # without a batch an empty reshape is refused, and ONNX Runtime's backend takes [1] for a scalar
        yield _Tensor(name, _TYPES[spec.dtype], dims or (1,), without_axes=batched and not dims)


def _rendered(about: Mapping[str, object]) -> str:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda text: json.dumps(text, ensure_ascii=False)
    text = (files("intaglio.exporters.deploy") / "triton.pbtxt.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(about)
