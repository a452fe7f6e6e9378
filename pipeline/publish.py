"""Delivers a finished chain: the files of the published artifacts, the recipe, and a manifest of their origin."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from intaglio.pipeline.artifact import A, AnyKey, Key
from intaglio.pipeline.errors import ContractError, RecipeError, StoreError
from intaglio.pipeline.manifest import MANIFEST, DeliveredFile, DeliveredStep, Manifest
from intaglio.pipeline.provenance import Provenance
from intaglio.pipeline.store import Store, file_digest, files_below, remove_tree
from intaglio.pipeline.versions import find_version

RECIPE = "recipe.yaml"
VERSIONS = ("intaglio", "torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu")


def check_folder(folder: Path) -> None:
    """Raises RecipeError where `publish` could not write: better before a run than behind it."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise RecipeError(f"{folder}: is there and was not written by intaglio: move it, or give another --out")
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RecipeError(f"{folder}: cannot be made, as {there} cannot be written to: give another --out")


def publish(folder: Path, store: Store, outputs: Mapping[AnyKey, str], provenance: Provenance) -> None:
    """Fills `folder`, which is never seen half-written.

    Raises RecipeError where it holds anything else, StoreError where the disk does not take it.
    """
    check_folder(folder)
    with store.lock(f"publish-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}"):
        fresh, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
        try:
            remove_tree(fresh)
            fresh.mkdir(parents=True)
            for key in sorted((key for key in outputs if key.published), key=str):
                _copy(store.open(outputs[key]), fresh, key)
            (fresh / RECIPE).write_text(provenance.recipe.to_yaml(), encoding="utf-8")
            _manifest(fresh, provenance).write(fresh)
            remove_tree(old)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            remove_tree(old)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error.strerror or error}): the same command writes it again"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def made_from(folder: Path, store: Store, key: Key[A]) -> A:
    """The artifact of the run that wrote `folder`, from the store. Raises RecipeError where it is not there."""
    digest = Manifest.read(folder).digests.get(key.name)
    if digest is None or not store.object_folder(digest).is_dir():
        raise RecipeError(
            f"{folder}: its {key} is not in {store.root}: name the store of its run with --store, or run its recipe"
            " again, which brings back what is missing"
        )
    return store.load(key, digest)


def _copy(source: Path, folder: Path, key: AnyKey) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = folder / file.relative_to(source)
        if copy.exists() or copy.name in (MANIFEST, RECIPE):
            raise ContractError(f"{key}: publishes {copy.name}, a name that is taken: give the file another")
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
        versions={name: found for name in VERSIONS if (found := find_version(name)) is not None},
    )
