"""Find the class of a pass: a name, `package.module:Class`, or `./file.py:Class` beside the recipe.

A name is an entry point of the group `intaglio.passes`, of this distribution or of any other. Metrics are found by name
only, in the group `intaglio.metrics`, and so are runtimes, in the group `intaglio.runtimes`.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from intaglio.pipeline.contract.metric import Metric
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.entry_points import METRICS, PASSES, RUNTIMES, named, named_runtimes
from intaglio.pipeline.errors import ContractError, IntaglioError, RecipeError, did_you_mean
from intaglio.pipeline.files import MIB, read_bytes
from intaglio.pipeline.runs.runtime import Runtime

MOST_SOURCE = 16 * MIB
"""Largest size in bytes of a Python file that is read."""


@dataclass(frozen=True)
class PassSource:
    """Pass class and its origin."""

    pass_class: type[Pass]
    origin: str
    """Origin as `module:Class`, or `file.py:Class` for a file beside the recipe."""
    source_sha256: str | None
    """Digest of the source; None for intaglio's own passes, whose `version` says when they change."""


def find_pass(reference: str, base: Path) -> PassSource:
    """Return the pass that a reference names. Raises RecipeError if it is missing, ContractError if it is no pass."""
    where, colon, class_name = reference.rpartition(":")
    if not colon:
        return _from_name(reference)
    if where.endswith(".py"):
        file = base / where
        if not file.is_file():
            raise RecipeError(f"{reference}: no file {file}: paths are relative to the recipe")
        module = _load_file(file)
        origin = f"{file.name}:{class_name}"
    else:
        module = _import(where, reference)
        origin = reference
    return _source(_member(module, class_name, reference), origin)


@cache
def named_passes() -> dict[str, EntryPoint]:
    """Return the entry points of all passes by name, sorted. Raises RecipeError if two distributions share a name."""
    return named(PASSES, "pass")


def pass_classes() -> dict[str, type[Pass] | None]:
    """Return the classes of all named passes; None for a pass that cannot be imported."""

    def found(name: str) -> type[Pass] | None:
        try:
            return _from_name(name).pass_class
        except IntaglioError:
            return None

    return {name: found(name) for name in named_passes()}


@cache
def named_metrics() -> dict[str, EntryPoint]:
    """Return the entry points of all metrics by name, sorted. Raises RecipeError if two distributions share a name."""
    return named(METRICS, "metric")


def _object_of(name: str, points: Mapping[str, EntryPoint], kind: str) -> Any:
    """Return what the entry point of this name points to, None if its module has no such name.

    Raises RecipeError if there is no such entry point, or if its module cannot be imported.
    """
    if name not in points:
        raise RecipeError(f"no {kind} {name!r}{did_you_mean(name, points)}")
    module_name, _, attribute = points[name].value.partition(":")
    return getattr(_import(module_name, name), attribute, None)


def find_metric(name: str) -> Metric:
    """Return the metric of this name. Raises RecipeError if it is missing, ContractError if it is no metric."""
    points = named_metrics()
    made = _object_of(name, points, "metric")
    if missing := [method for method in ("applies", "compare") if not callable(getattr(made, method, None))]:
        raise ContractError(f"metric {name}: {points[name].value} does not define {', '.join(missing)}")
    assert made is not None  # None has no such methods
    metric: Metric = made()
    return metric


@cache
def plugin_source(group: str, name: str) -> str | None:
    """Return distribution, version and digest of the source of a metric or runtime; None for intaglio's own.

    The digest is made once in a process, like the import of the module.
    """
    point = {METRICS: named_metrics, RUNTIMES: named_runtimes}[group]()[name]
    if _is_own(point.module):
        return None
    module = _import(point.module, name)
    source = "none" if module.__file__ is None else _source_sha256(module.__name__, Path(module.__file__))
    return f"{point.value} {'' if point.dist is None else f'{point.dist.name} {point.dist.version} '}{source}"


@cache
def find_runtime(name: str) -> Runtime:
    """Return the runtime of this name. Raises RecipeError if it cannot be found, ContractError if it is no Runtime."""
    points = named_runtimes()
    kind = _object_of(name, points, "runtime")
    if not (inspect.isclass(kind) and issubclass(kind, Runtime)):
        raise ContractError(f"runtime {name}: {points[name].value} is not a subclass of intaglio.Runtime")
    if missing := [*(["name"] if not hasattr(kind, "name") else []), *sorted(kind.__abstractmethods__)]:
        raise ContractError(f"runtime {name}: {points[name].value} does not define {', '.join(missing)}")
    return kind()


def runtimes() -> dict[str, Runtime]:
    """Return all runtimes that can be imported, by name and sorted."""
    found = {}
    for name in named_runtimes():
        with suppress(IntaglioError):
            found[name] = find_runtime(name)
    return found


def _from_name(name: str) -> PassSource:
    points = named_passes()
    if name not in points:
        raise RecipeError(f"no pass {name!r}{did_you_mean(name, points)}")
    module_name, _, class_name = points[name].value.partition(":")
    return _source(_member(_import(module_name, name), class_name, name), points[name].value)


def _import(module_name: str, reference: str) -> ModuleType:
    if "/" in module_name or module_name.startswith("."):
        raise RecipeError(f"{reference}: {module_name} is no Python file and no module: write ./file.py:Class")
    try:
        return importlib.import_module(module_name)
    except IntaglioError:
        raise
    except Exception as error:
        raise RecipeError(f"{reference}: cannot import {module_name}: {type(error).__name__}: {error}") from error


def _load_file(file: Path) -> ModuleType:
    """Load the module of a file, once for each content: the module's name depends on it."""
    source = read_bytes(file, most=MOST_SOURCE)
    digest = hashlib.sha256(str(file.resolve()).encode() + b"\0" + source).hexdigest()
    module_name = f"intaglio_file_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{digest[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pydantic and pickle look classes up by their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise RecipeError(f"{file}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _member(module: ModuleType, class_name: str, reference: str) -> type[Pass]:
    """Return the class after checking that it declares everything a pass must declare."""
    found = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Pass)]
        raise RecipeError(f"{reference}: no class {class_name!r}{did_you_mean(class_name, set(classes) - {'Pass'})}")
    if not (inspect.isclass(found) and issubclass(found, Pass)):
        raise ContractError(f"{reference}: {class_name} is not a subclass of intaglio.Pass")
    missing = [attribute for attribute in ("name", "requires", "provides") if not hasattr(found, attribute)]
    missing += sorted(found.__abstractmethods__)
    if missing:
        raise ContractError(f"{reference}: {class_name} does not define {', '.join(missing)}")
    return found


def _source(pass_class: type[Pass], origin: str) -> PassSource:
    module = pass_class.__module__
    source = None if _is_own(module) else _source_sha256(module, Path(inspect.getfile(pass_class)))
    return PassSource(pass_class, origin, source)


def _is_own(module_name: str) -> bool:
    """Return True for a module of intaglio, whose passes have a `version` in place of a digest."""
    return module_name.partition(".")[0] == "intaglio"


def _source_sha256(module_name: str, file: Path) -> str:
    """Return the digest of a module's file, or of all Python files of its top-level package."""
    depth = module_name.count(".") + (file.name == "__init__.py")
    if depth == 0:
        return hashlib.sha256(read_bytes(file, most=MOST_SOURCE)).hexdigest()
    package = file.parents[depth - 1]
    lines = (
        f"{path.relative_to(package).as_posix()} {hashlib.sha256(read_bytes(path, most=MOST_SOURCE)).hexdigest()}\n"
        for path in sorted(package.rglob("*.py"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
