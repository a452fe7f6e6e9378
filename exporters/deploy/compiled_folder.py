"""Find a target's folder in the results of a run, and the options that its recipe gave the engine's builder."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.pipeline.contract.recipe import Recipe, validation_problems
from intaglio.pipeline.errors import RecipeError, did_you_mean
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.output_files import kind_of
from intaglio.pipeline.runs.manifest import MANIFEST, Manifest, target_name
from intaglio.pipeline.runs.store import entries_below


def target_folder(folder: Path, target: str | None, runtimes: Collection[str], *, what: str, why: str) -> Path:
    """Return the folder of the wanted target: `folder`, or one in it. Its runtime must be in `runtimes`.

    Raises RecipeError, which says that other targets are not for `what`, and `why`.
    """
    if (folder / "graph.json").is_file():
        found = {target_name(folder): folder}
    else:
        there = sorted(path.parent for path in folder.glob("*/graph.json")) if folder.is_dir() else []
        found = {path.name: path for path in there}
    if not found:
        raise RecipeError(
            f"{folder}: no graph.json in it or in a folder of it: give a folder that `intaglio run` wrote"
        )
    if target is not None:
        if target not in found:
            raise RecipeError(f"{folder}: no target {target!r} in it{did_you_mean(target, found)}")
        found = {target: found[target]}
    fitting = {n: p for n, p in found.items() if n in target_names() and load_target(n).runtime in runtimes}
    if not fitting:
        raise RecipeError(f"{folder}: {', '.join(found)} is not for {what}: {why}")
    if len(fitting) > 1:
        raise RecipeError(f"{folder}: several targets for {what}: take one with --target: {', '.join(fitting)}")
    (place,) = fitting.values()
    return place


def delivered_name(place: Path) -> str:
    """Return RECIPE-TARGET for one target's folder."""
    return f"{Path(os.path.abspath(place)).parent.name}-{target_name(place)}"


def delivered_files(place: Path, *, built_there: Collection[str] = ()) -> Mapping[str, Path]:
    """Return the files of one target's folder that its manifest lists, by name, after checking each by its digest.

    built_there: names of files that may have been made since, such as an engine; those that exist are returned too.
    Raises RecipeError, which names all that is missing or changed, and every link, pipe and device in the folder.
    """
    manifest = Manifest.read(place)
    others = {path.relative_to(place).as_posix(): path for path in entries_below(place)[1]}
    kinds = {name: path.lstat().st_mode for name, path in others.items()}
    odd = [
        f"{printable(name)}: is {kind_of(kind)}, which no run delivers: move it out of the folder"
        for name, kind in kinds.items()
        if not stat.S_ISREG(kind) and (name not in manifest.files or name in built_there)
    ]
    changed = [
        f"{problem}: run the recipe again, which delivers it again" for problem in manifest.damage(place, built_there)
    ]
    if problems := [f"{printable(place)}: {problem}" for problem in (*odd, *changed)]:
        raise RecipeError(*problems)
    names = (manifest.files.keys() | {*built_there, MANIFEST}) & others.keys()
    return {name: others[name] for name in sorted(names)}


def tensorrt_builder(place: Path) -> BuildTensorRT:
    """Return the builder with the options from the recipe."""
    recipe = place / "recipe.yaml"
    steps = Recipe.read(recipe).steps if recipe.exists() else ()
    options = next((step.options for step in steps if step.uses == BuildTensorRT.name), {})
    try:
        return BuildTensorRT.model_validate(options)
    except ValidationError as error:
        problems = validation_problems(error, BuildTensorRT)
        raise RecipeError(*(f"{recipe}: {BuildTensorRT.name}: {problem}" for problem in problems)) from error
