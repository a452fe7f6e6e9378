"""Read the groups of entry points in which this distribution, and any other, names what it adds to intaglio."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from intaglio.pipeline.errors import RecipeError

PASSES = "intaglio.passes"
METRICS = "intaglio.metrics"
RUNTIMES = "intaglio.runtimes"
COMMANDS = "intaglio.commands"


def named(group: str, kind: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, sorted. Raises RecipeError if two distributions provide one name."""
    owners: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=group):
        owners.setdefault(point.name, {})[f"{_owner(point)} ({point.value})"] = point
    clashes = [
        f"{kind} {name!r} is provided twice, by {' and by '.join(sorted(points))}: uninstall one of them"
        for name, points in sorted(owners.items())
        if len(points) > 1
    ]
    if clashes:
        raise RecipeError(*clashes)
    return {name: next(iter(points.values())) for name, points in sorted(owners.items())}


@cache
def named_runtimes() -> Mapping[str, EntryPoint]:
    """Return the entry points of all runtimes, as `named` does."""
    return named(RUNTIMES, "runtime")


@cache
def named_commands() -> Mapping[str, EntryPoint]:
    """Return the entry points of all commands outside the core, as `named` does."""
    return named(COMMANDS, "command")


def runtime_folders() -> tuple[Path, ...]:
    """Return the folder of every module that has a runtime, each once. No runtime is imported, only its package."""
    folders = {}
    for point in named_runtimes().values():
        try:
            spec = find_spec(point.module)
        except ImportError:  # its package cannot be imported, which `doctor` says
            continue
        if spec is not None and spec.origin is not None:
            folders[Path(spec.origin).parent] = True
    return tuple(folders)


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed distribution"
