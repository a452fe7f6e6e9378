"""Delivers a finished chain: the files of the published artifacts, the recipe, and a manifest of their origin."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from intaglio.pipeline.artifact import A, AnyKey, Key
from intaglio.pipeline.errors import ContractError, RecipeError
from intaglio.pipeline.recipe import Recipe
from intaglio.pipeline.store import RunRecord, Store, file_digest, remove_tree

MANIFEST = "manifest.json"
VERSIONS = ("intaglio", "torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Provenance:
    """What the files of one target were made from."""

    recipe: Recipe
    start: Mapping[str, str]
    """Key name -> digest of what there was before the first step."""
    runs: tuple[RunRecord, ...]


def publish(folder: Path, store: Store, outputs: Mapping[AnyKey, str], provenance: Provenance) -> None:
    """Fills `folder`, which is never seen half-written. Raises RecipeError where it holds anything else."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise RecipeError(f"{folder}: is there and was not written by intaglio: move it, or give another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(f"publish-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}"):
        fresh, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
        remove_tree(fresh)
        fresh.mkdir()
        for key in sorted((key for key in outputs if key.published), key=str):
            _copy(store.open(outputs[key]), fresh, key)
        (fresh / "recipe.yaml").write_text(provenance.recipe.to_yaml(), encoding="utf-8")
        (fresh / MANIFEST).write_text(json.dumps(_manifest(fresh, provenance), indent=1) + "\n", encoding="utf-8")
        remove_tree(old)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        remove_tree(old)


def made_from(folder: Path, store: Store, key: Key[A]) -> A:
    """The artifact of the run that wrote `folder`, from the store. Raises RecipeError where it is not there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as e:
        raise RecipeError(f"{folder}: no {MANIFEST}: give one target's folder of what `intaglio run` wrote") from e
    digests: dict[str, str] = dict(manifest["start"])
    for step in manifest["steps"]:
        digests |= step["outputs"]
    digest = digests.get(key.name)
    if digest is None or not store.object_folder(digest).is_dir():
        raise RecipeError(
            f"{folder}: its {key} is not in {store.root}: name the store of its run with --store, or run its recipe"
            " again, which brings back what is missing"
        )
    return store.load(key, digest)


def _copy(source: Path, folder: Path, key: AnyKey) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = folder / file.relative_to(source)
        if copy.exists() or copy.name in (MANIFEST, "recipe.yaml"):
            raise ContractError(f"{key}: publishes {copy.name}, a name that is taken: give the file another")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _manifest(folder: Path, provenance: Provenance) -> dict[str, object]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "size_bytes": path.stat().st_size}
            for path in files
        },
        "seed": provenance.recipe.seed,
        "start": dict(provenance.start),
        "steps": [
            {"step": run.step, "pass": run.origin, "key": run.key, "outputs": dict(run.outputs)}
            for run in provenance.runs
        ],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
