"""Pack a compiled TensorRT target into one archive, for a device that has TensorRT, but not intaglio."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from intaglio.exporters.deploy.compiled_folder import delivered_files, delivered_name, target_folder, tensorrt_builder
from intaglio.exporters.runtimes.tensorrt.build import Profile, shape_flags
from intaglio.exporters.runtimes.tensorrt.kit_scripts.build import LOW_MEMORY_MIB
from intaglio.exporters.runtimes.tensorrt.runtime import MODULES, TensorRT
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import open_stream, printable
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.output_files import check_output, check_outside, whole_file
from intaglio.pipeline.runs.manifest import target_name
from intaglio.pipeline.runs.registry import find_runtime
from intaglio.pipeline.runs.store import file_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]

SUMS = "SHA256SUMS"
ENGINE = "engine.plan"
MOST_README = 1 << 16
"""Bytes at the beginning of a file that show whether it is a kit."""
SEED = 0
NEIGHBOURS = 3
"""Number of calls with slightly changed inputs, for all cases together; there are at most three cases."""
TOLERANCE_FACTOR = 3
"""Largest allowed ratio of the engine's error to the change of the outputs that one rounding of the inputs causes.

The inputs are rounded to float16.

One code that is rounded differently changes all later values, whether in the engine or in the comparison. In ONNX's
reference evaluator, which rounds after every float16 operator, the ratio is 0.9 to 1.1 for two tiny models.
"""
TOLERANCE_MIN = 0.01
TOLERANCE_REASON = (
    f"{TOLERANCE_FACTOR} times what one float16 rounding of the inputs changes, and at least {TOLERANCE_MIN:g}"
)

_EPOCH = 315532800  # 1980-01-01: some versions of tar warn about time 0
_EXECUTABLE = frozenset({"build.sh", "build.py", "run.py"})

Content: TypeAlias = Path | bytes
"""Content of a file in the archive: an existing file, or bytes."""


def write_kit(folder: Path, out: Path | None = None, target: str | None = None) -> Path:
    """Write the archive and return its path; the same folder gives the same bytes.

    `folder`: one target's folder, or that of all targets together with `target`. Only files in its manifest are packed.
    Raises RecipeError for a folder that is no compiled TensorRT target, for files that changed since the run, and if
    `out` exists and is no kit.
    """
    place = target_folder(folder, target, MODULES, what="TensorRT", why="a kit is for TensorRT's targets")
    name = delivered_name(place)
    if not name.isprintable():
        raise RecipeError(
            f"{printable(place)}: its name, {printable(name)}, would name the folder in the archive, and has characters"
            " that no tool prints: rename it"
        )
    out = Path(f"{name}.tar.gz") if out is None else out
    _check_out(out)
    _write_archive(out, name, _content(place, name))
    return out


def _check_out(out: Path) -> None:
    """Raise RecipeError if `out` exists and is no kit, or lies in a compiled folder or below a file."""
    check_outside(out)
    if not os.path.lexists(out):
        above = next(each for each in out.absolute().parents if os.path.lexists(each))
        if not above.is_dir():
            raise RecipeError(f"{printable(out)}: {printable(above)} is no folder: choose another --out")
        return
    check_output(out)
    if out.stat().st_size and not _is_kit(out):
        raise RecipeError(f"{printable(out)}: exists and is no kit: move it, or choose another --out")


def _is_kit(file: Path) -> bool:
    """Return True if the archive begins as all kits do: with README.md and SHA256SUMS in one folder."""
    try:
        with open_stream(file) as stream, gzip.GzipFile(fileobj=stream) as packed:
            start = io.BytesIO(packed.read(MOST_README))
        with tarfile.open(fileobj=start, mode="r:") as archive:
            first = [Path(entry.name).parts for entry in (archive.next(), archive.next()) if entry is not None]
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError):
        return False
    return [parts[1:] for parts in first] == [("README.md",), (SUMS,)] and len({parts[0] for parts in first}) == 1


def _content(folder: Path, name: str) -> dict[str, Content]:
    """Return all files of the kit except the list of sums."""
    delivered = delivered_files(folder)
    target, graph, builder = load_target(target_name(folder)), Graph.load(folder), tensorrt_builder(folder)
    runtime = find_runtime(target.runtime)
    assert isinstance(runtime, TensorRT)  # target_folder finds no other
    module = runtime.packages[0].module
    engine, model = delivered.get(ENGINE), {n: path for n, path in delivered.items() if n.startswith("model.onnx")}
    profile = builder.profile(graph)
    shapes = {n: profile[n] if n in profile else (_fixed(spec.shape),) * 3 for n, spec in graph.inputs.items()}
    cases = _cases(graph, {n: usual for n, (_, usual, _) in shapes.items()})
    selftest = {f"selftest/{i}.npz": _npz(case) for i, case in enumerate(cases)}
    raw = {f"selftest/{i}.bin": n for i, n in enumerate(graph.inputs)}
    tolerance = max(TOLERANCE_MIN, TOLERANCE_FACTOR * max(case.neighbour_rel_l2 for case in cases))
    facts = {
        "target": target.name,
        "module": module,
        "version": target.runtime_version,
        "workspace_mib": builder.workspace_mib,
        "profile": profile,
        "selftest": list(selftest),
        "tolerance": float(f"{tolerance:.2e}"),
    }
    about = facts | {
        "name": name,
        "description": target.description,
        "low_memory_mib": LOW_MEMORY_MIB,
        "build_shapes": shape_flags(profile),
        "call_flags": _call_flags(profile, raw),
        "has_engine": engine is not None,
        "weights": sum(path.stat().st_size for path in model.values()),
        "inputs": [(n, spec.dtype, *map(_written, shapes[n])) for n, spec in graph.inputs.items()],
        "timesteps": [f"{t:g}" for t in graph.timesteps] if STEP_INPUT in graph.inputs else [],
        "tolerance_reason": TOLERANCE_REASON,
    }
    scripts = files("intaglio.exporters.runtimes.tensorrt") / "kit_scripts"
    content: dict[str, Content] = {
        **model,
        **selftest,
        "kit.json": (json.dumps(facts, indent=1) + "\n").encode(),
        "README.md": _rendered("README.md.j2", about),
        "build.py": (scripts / "build.py").read_bytes(),
        "run.py": (scripts / "run.py").read_bytes(),
    }
    if not runtime.ahead:  # trtexec is part of TensorRT; an engine runs only on the kind of GPU that built it
        content |= {file: cases[0].inputs[n].tobytes() for file, n in raw.items()}
        content["build.sh"] = _rendered("build.sh.j2", about)
    elif engine is not None:
        content[ENGINE] = engine
    return content


@dataclass(frozen=True)
class Case:
    """Call with its outputs in ONNX Runtime on the CPU, and their change when inputs change by one rounding."""

    inputs: Arrays
    outputs: Arrays
    neighbour_rel_l2: float


def _cases(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> list[Case]:
    """Compute calls at the first, the middle and the last step if layers have a scale for each, else one call."""
    import numpy as np

    from intaglio.exporters.runtimes.calls import check_callable, noise_feed
    from intaglio.exporters.runtimes.onnxruntime.session import graph_session
    from intaglio.exporters.runtimes.tensorrt.kit_scripts.run import compare

    check_callable(graph)
    session = graph_session(graph, optimize=False)
    names = [output.name for output in session.get_outputs()]
    last = len(graph.timesteps) - 1
    steps = sorted({0, last // 2, last}) if STEP_INPUT in graph.inputs and last > 0 else [0]
    cases = []
    for step in steps:
        rng = np.random.default_rng([SEED, step])
        inputs = noise_feed(graph, shapes, rng, step)
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        distance = 0.0
        for _ in range(NEIGHBOURS // len(steps)):
            found = session.run(None, _rounded_otherwise(inputs, graph.timestep, rng))
            distance = max(distance, *map(compare, found, outputs.values()))
        cases.append(Case(inputs, outputs, distance))
    return cases


def _rounded_otherwise(inputs: Arrays, timestep: str | None, rng: np.random.Generator) -> Arrays:
    """Change floating-point inputs by at most half a unit in float16's last place; timesteps stay."""
    import numpy as np

    def moved(x: NDArray[np.generic]) -> NDArray[np.generic]:
        return (x.astype(np.float64) * (1 + rng.uniform(-1, 1, x.shape) * 2.0**-11)).astype(x.dtype)

    return {n: moved(x) if x.dtype.kind == "f" and n != timestep else x for n, x in inputs.items()}


def _npz(case: Case) -> bytes:
    """Write the arrays as npz, with `i.` before the names of inputs and `o.` before those of outputs."""
    import numpy as np

    stream = io.BytesIO()
    arrays = {f"i.{n}": x for n, x in case.inputs.items()} | {f"o.{n}": y for n, y in case.outputs.items()}
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _fixed(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in shape if isinstance(axis, int))


def _written(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _call_flags(profile: Profile, raw: Mapping[str, str]) -> list[str]:
    """Return trtexec's flags for a call of the usual size on the files of its inputs: random numbers are no indices."""
    shapes = ",".join(f"{name}:{'x'.join(map(str, usual))}" for name, (_, usual, _) in profile.items())
    inputs = ",".join(f"{name}:{file}" for file, name in raw.items())
    return [*([f"--shapes={shapes}"] if shapes else []), f"--loadInputs={inputs}"]


def _rendered(template: str, about: Mapping[str, object]) -> bytes:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda text: "'" + text.replace("'", "'\\''") + "'"
    environment.filters["megabytes"] = lambda size_bytes: f"{size_bytes / 1e6:.1f} MB"
    text = (files("intaglio.exporters.runtimes.tensorrt") / "kit_scripts" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(about).encode()


def _write_archive(out: Path, name: str, content: Mapping[str, Content]) -> None:
    """Write the archive with sorted names, one time and no owner, so that equal content gives equal bytes.

    The file is complete or unchanged at every moment.
    """
    sums = "".join(f"{_digest(content[file])}  {file}\n" for file in sorted(content))
    content = {**content, SUMS: sums.encode()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(out) as partial,
        partial.open("wb") as stream,
        gzip.GzipFile("", "wb", 1, stream, mtime=0) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
    ):
        for file in sorted(content):
            _add(archive, f"{name}/{file}", content[file])


def _add(archive: tarfile.TarFile, name: str, content: Content) -> None:
    entry = tarfile.TarInfo(name)
    entry.mtime, entry.mode = _EPOCH, 0o755 if Path(name).name in _EXECUTABLE else 0o644
    if isinstance(content, Path):
        with open_stream(content) as stream:
            entry.size = os.fstat(stream.fileno()).st_size
            archive.addfile(entry, stream)
    else:
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def _digest(content: Content) -> str:
    return file_digest(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
