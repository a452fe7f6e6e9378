"""Every file that somebody else may have written is opened in one way: no other place opens or parses a file."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "passes", "exporters")
METHODS = {"read_text", "read_bytes", "model_validate_json"}
"""Methods that open or parse a file, whatever they are called on; `open` as well, unless it only writes."""
FUNCTIONS = {"open", "fdopen", "load_file", "safe_open", "safe_load", "load_external_data_for_tensor"}
"""Functions that do, by their own name or as those of a module."""
OF_MODULES = {
    "json": {"load", "loads"},
    "yaml": {"load", "load_all", "compose", "parse", "scan"},
    "onnx": {"load"},
    "ir": {"load"},
    "onnx_ir": {"load"},
    "torch": {"load"},
    "np": {"load", "loadtxt", "genfromtxt"},
    "numpy": {"load", "loadtxt", "genfromtxt"},
    "pickle": {"load", "loads"},
    "Image": {"open"},
    "tarfile": {"open"},
    "zipfile": {"ZipFile"},
    "io": {"open"},
    "os": {"open"},
}
"""Functions of modules that do."""
CHECKED = {"checked_file", "dumps"}
"""A call whose first argument is a call of one of these gets a path that was checked, or what was just made."""
DEVICE = "runs on the device without intaglio, on files that kit packed"
PACKAGE = "a file of the package"
PERMITTED = {
    "pipeline/files.py": "opens all files",
    "pipeline/contract/yaml_text.py": "parses text that was read, within its limits",
    "pipeline/output_files.py:whole_file": "writes a file",
    "pipeline/cli/doctor.py:_cpu_info": "a file of /proc",
    "pipeline/runs/manifest.py:read": "text that was read, within its limits",
    "pipeline/machine.py:machine_bytes": "a file of /sys",
    "pipeline/runs/memory.py:resident_bytes": "a file of /proc",
    "exporters/starter/steps.py:amounts_of": "text that was made in this package",
    "passes/assign/knapsack.py:_silenced": "the null device",
    "pipeline/runs/store.py:_read_record": "text that was read, within its limits",
    "pipeline/formats/target.py:_parse": PACKAGE,
    "passes/imports/torch_file.py:check_torch_file": "a stream of a file that was checked",
    "passes/imports/torch_file.py:load_torch_file": "a stream of a file that was checked",
    "exporters/runtimes/tensorrt/kit_scripts/build.py:main": DEVICE,
    "exporters/runtimes/tensorrt/kit_scripts/run.py:_check": DEVICE,
    "exporters/runtimes/tensorrt/kit_scripts/run.py:main": DEVICE,
    "exporters/runtimes/tensorrt/kit_scripts/run.py:read_case": DEVICE,
    "exporters/float_graph/onnx_file.py:read_proto": "tensors whose files were checked",
    "exporters/lint/inference.py:_limit": "a file of /proc",
    "exporters/lint/inference.py:_read": "the other process, which is intaglio too",
    "exporters/lint/inference.py:serve": "the other process, which is intaglio too",
    "exporters/report/difference.py:_picture": "the bytes of a file that was read",
    "exporters/components/pictures.py:_picture": "the bytes of a file that was read",
    "exporters/deploy/kit.py:_content": PACKAGE,
    "exporters/deploy/kit.py:_is_kit": "a stream of a file that was checked",
    "pipeline/model/model_files.py:is_listed": "a file of diffusers",
    "pipeline/cli/console.py:open_standard_streams": "/dev/null in the place of a closed stream",
    "exporters/deploy/kit.py:_rendered": PACKAGE,
    "exporters/deploy/kit.py:_write_archive": "writes the archive",
    "exporters/float_graph/export_float.py:_interface": "the text that diffusers makes of a configuration",
    "exporters/runtimes/onnxruntime/build.py:run": "what ONNX Runtime wrote a moment ago",
    "exporters/measure/profile.py:run": "what ONNX Runtime wrote a moment ago",
    "exporters/deploy/triton.py:_rendered": PACKAGE,
}
"""Every other place that opens or parses a file, by file or `file:function`, with the reason."""


def _calls(file: Path) -> Iterator[tuple[str, ast.Call, str]]:
    """Yield every call that opens or parses a file: the function that it is in, the call, and what it calls."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            within = child.name if named else inside
            if isinstance(child, ast.Call) and (called := _opening(child)):
                yield inside, child, called
            yield from walk(child, within)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "")


def _opening(call: ast.Call) -> str | None:
    """Return what the call calls, if that opens or parses a file to read it."""
    match call.func:
        case ast.Name(id=name):
            return name if name in FUNCTIONS and not _writes(call.args[1:2]) else None
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in OF_MODULES:
            return f"{module}.{name}" if name in OF_MODULES[module] | FUNCTIONS - {"open"} else None
        case ast.Attribute(value=receiver, attr="open"):
            named = ast.unparse(receiver).endswith(("path", "file"))
            mode = call.args[:1] and isinstance(call.args[0], ast.Constant)
            return ".open" if (mode or named) and not _writes(call.args[:1]) else None
        case ast.Attribute(attr=name):
            return f".{name}" if name in METHODS | FUNCTIONS else None
    return None


def _writes(mode: list[ast.expr]) -> bool:
    """Return True if a file is opened in a mode that reads nothing."""
    match mode:
        case [ast.Constant(value=str(text))]:
            return text[:1] in ("w", "a", "x") and "+" not in text
    return False


def _checked(argument: ast.expr) -> bool:
    """Return True for a call of one of `CHECKED`."""
    match argument:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in CHECKED
    return False


def _found() -> dict[str, list[str]]:
    """Return the calls by `file:function`."""
    found: dict[str, list[str]] = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for inside, call, called in _calls(file):
                checked = bool(call.args) and _checked(call.args[0])
                if not checked:
                    place = f"{file.relative_to(ROOT).as_posix()}:{inside}"
                    found.setdefault(place, []).append(f"{called}, line {call.lineno}")
    return found


def test_only_the_module_of_files_opens_files() -> None:
    found = {place: calls for place, calls in _found().items() if place.partition(":")[0] not in PERMITTED}
    assert {place: calls for place, calls in found.items() if place not in PERMITTED} == {}


def test_every_permitted_place_is_there() -> None:
    found = _found()
    files = {place.partition(":")[0] for place in found}
    assert {place for place in PERMITTED if place not in found and (":" in place or place not in files)} == set()
