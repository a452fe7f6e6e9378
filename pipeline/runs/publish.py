"""Deliver a finished chain: the files of published artifacts, the recipe, and a manifest of their origin."""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.contract.artifact import A, AnyKey, Key
from intaglio.pipeline.errors import ContractError, RecipeError, StoreError
from intaglio.pipeline.files import printable
from intaglio.pipeline.runs.manifest import MANIFEST, DeliveredFile, DeliveredStep, Manifest
from intaglio.pipeline.runs.registry import runtimes
from intaglio.pipeline.runs.replacement import replacing
from intaglio.pipeline.runs.store import Store, entries_below, file_digest, files_below
from intaglio.pipeline.runs.versions import find_version

RECIPE = "recipe.yaml"
VERSIONS = ("intaglio", "torch", "diffusers", "onnx")
"""Distributions whose versions are in a manifest, besides those that runtimes need to compile anything."""


def check_folders(folders: Collection[Path], store: Store) -> None:
    """Raise RecipeError if `publish` could not write all folders, so that the error comes before a run."""
    places: dict[Path, Path] = {}
    root = store.root.resolve()
    for folder in folders:
        place = check_folder(folder)
        if (other := places.setdefault(place, folder)) is not folder:
            raise RecipeError(f"{folder}: leads to the same folder as {other}: give each target a folder of its own")
        if place.is_relative_to(root) or root.is_relative_to(place):
            raise RecipeError(f"{folder}: overlaps with the store {store.root}: choose another --out or --store")


def check_folder(folder: Path) -> Path:
    """Return the folder to write to, with links resolved. Raises RecipeError if `publish` could not write it."""
    name = printable(folder)
    try:
        place = folder.resolve()
        if place.exists():
            _check_ours(folder, place)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise RecipeError(f"{name}: cannot be read ({error}): choose another --out") from error
    there = next(parent for parent in place.parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise RecipeError(f"{name}: cannot be made, as {there} cannot be written to: choose another --out")
    return place


def _check_ours(folder: Path, place: Path) -> None:
    name = printable(folder)
    if not place.is_dir():
        raise RecipeError(f"{name}: exists and is no folder: move it, or choose another --out")
    if not os.access(place, os.W_OK | os.X_OK | os.R_OK):
        raise RecipeError(f"{name}: cannot be written to: choose another --out")
    folders, others = entries_below(place)
    device = place.stat().st_dev
    if os.path.ismount(place) or any(each.lstat().st_dev != device for each in (*folders, *others)):
        raise RecipeError(f"{name}: is or contains a mount point, and cannot be replaced: choose another --out")
    if not (folders or others):
        return
    try:
        Manifest.read(place)
    except RecipeError as error:
        why = f" ({error})" if (place / MANIFEST).exists() else ""
        raise RecipeError(
            f"{name}: exists and was not written by intaglio: move it, or choose another --out{why}"
        ) from error


def publish(folder: Path, store: Store, outputs: Mapping[AnyKey, str], provenance: Provenance) -> None:
    """Replace the results in `folder` atomically; links are followed.

    Files that its manifest does not list stay, and so do listed files that were changed. Raises RecipeError if the
    folder holds files and no manifest, StoreError if the disk cannot be written.
    """
    place = check_folder(folder)
    with store.lock(f"publish-{hashlib.sha256(os.fsencode(place)).hexdigest()}"):
        try:
            with replacing(place) as fresh:
                for key in sorted((key for key in outputs if key.published), key=str):
                    _copy(store.open(outputs[key]), fresh, key)
                (fresh / RECIPE).write_text(provenance.recipe.to_yaml(), encoding="utf-8")
                _manifest(fresh, provenance).write(fresh)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}): it is unchanged; the results are in "
                f"{store.root}, and a run with another --out writes them"
            ) from error


def made_from(folder: Path, store: Store, key: Key[A]) -> A:
    """Load from the store an artifact of the run that wrote `folder`. Raises RecipeError if it is missing."""
    digest = Manifest.read(folder).digests.get(key.name)
    if digest is None or not store.object_folder(digest).is_dir():
        raise RecipeError(
            f"{folder}: its {key} is not in {store.root}: name the store of its run with --store, or run its recipe"
            " again to restore it"
        )
    return store.load(key, digest)


def _copy(source: Path, folder: Path, key: AnyKey) -> None:
    for file in files_below(source):
        name = file.relative_to(source)
        copy = folder / name
        if str(name).encode(errors="ignore") != os.fsencode(name):
            raise RecipeError(f"{key}: would deliver {printable(name)}, a name that is no UTF-8: rename that file")
        if copy.exists() or copy.name in (MANIFEST, RECIPE):
            raise ContractError(
                f"{key}: delivers the file {copy.name}, but another file of the results has this name: rename one of"
                " them"
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _manifest(folder: Path, provenance: Provenance) -> Manifest:
    return Manifest(
        files={
            path.relative_to(folder).as_posix(): DeliveredFile(sha256=file_digest(path), size_bytes=path.stat().st_size)
            for path in files_below(folder)
        },
        seed=provenance.recipe.seed,
        start=provenance.start,
        steps=tuple(
            DeliveredStep(step=run.step, origin=run.origin, key=run.key, outputs=run.outputs) for run in provenance.runs
        ),
        versions={name: found for name in _distributions() if (found := find_version(name)) is not None},
    )


def _distributions() -> tuple[str, ...]:
    """Return the distributions whose versions a manifest records."""
    needed = (package for runtime in runtimes().values() for package in runtime.packages if package.compiles)
    return (*VERSIONS, *(name for package in needed for name in package.distributions))
