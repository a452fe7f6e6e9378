"""Describe a compiled folder: the digest of every file, and the steps that made them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from intaglio.pipeline.contract.run_record import Digest
from intaglio.pipeline.errors import RecipeError, StoreError
from intaglio.pipeline.files import MOST_JSON, printable, read_bytes
from intaglio.pipeline.formats.target import target_names
from intaglio.pipeline.output_files import kind_of
from intaglio.pipeline.runs.store import entries_below, file_digest

MANIFEST = "manifest.json"


class DeliveredFile(BaseModel):
    """Digest and size of one delivered file."""

    model_config = ConfigDict(frozen=True)

    sha256: Digest
    size_bytes: int = Field(ge=0, lt=1 << 63)


class DeliveredStep(BaseModel):
    """Step of the chain, with the digests of its outputs."""

    model_config = ConfigDict(frozen=True)

    step: str
    origin: str = Field(serialization_alias="pass", validation_alias=AliasChoices("pass", "origin"))
    key: Digest
    outputs: Mapping[str, Digest]


class Manifest(BaseModel):
    """Content of `manifest.json`, one for each target."""

    model_config = ConfigDict(frozen=True)

    files: Mapping[str, DeliveredFile]
    """Delivered files by path below the folder, with `/` between the parts."""
    seed: int
    start: Mapping[str, Digest]
    """Digests of the artifacts before the first step, by key name."""
    steps: tuple[DeliveredStep, ...]
    versions: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        (folder / MANIFEST).write_bytes(self.content)

    @property
    def content(self) -> bytes:
        """Return the bytes of the manifest's file."""
        return (self.model_dump_json(indent=1, by_alias=True) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder. Raises RecipeError if it is missing or unreadable."""
        file = folder / MANIFEST
        if not file.exists():
            raise RecipeError(
                f"{printable(folder)}: no {MANIFEST}: give the folder of one target that `intaglio run` wrote"
            )
        content = read_bytes(file, most=MOST_JSON, inside=folder)
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(printable(part)[:80] for part in first["loc"])
            said = f"{place}: {printable(first['msg'])}" if place else printable(first["msg"])
            raise RecipeError(f"{printable(file)}: is no manifest: {said}") from error

    @property
    def digests(self) -> dict[str, str]:
        """Return the digest of each key's last artifact, by key name."""
        found = dict(self.start)
        for step in self.steps:
            found |= step.outputs
        return found

    def departures(self, folder: Path) -> Iterator[str]:
        """Yield a line for each missing, changed or added file. Follows no link out of the folder."""
        yield from self.damage(folder)
        folders, others = entries_below(folder)
        for name in sorted(each.relative_to(folder).as_posix() for each in others):
            kind = (folder / name).lstat().st_mode
            if name == MANIFEST and not stat.S_ISREG(kind):
                yield f"{name}: is {kind_of(kind)}, where a file was delivered"
            elif name not in self.files and name != MANIFEST:
                yield f"{printable(name)}: was not delivered" + ("" if stat.S_ISREG(kind) else f": {kind_of(kind)}")
        for each in folders:
            if not any(each.iterdir()):
                yield f"{printable(each.relative_to(folder))}: was not delivered: an empty folder"

    def damage(self, folder: Path, without: Collection[str] = ()) -> Iterator[str]:
        """Yield a line for each delivered file that is missing or changed, except names in `without`."""
        there = {file.relative_to(folder).as_posix(): file for file in entries_below(folder)[1]}
        for name in self.files:
            if name not in without and (problem := self._problem(name, there)) is not None:
                yield f"{printable(name)}: {problem}"

    def intact(self, folder: Path) -> set[Path]:
        """Return the files that are unchanged since delivery, the manifest among them."""
        there = {file.relative_to(folder).as_posix(): file for file in entries_below(folder)[1]}
        found = {there[name] for name in self.files if self._problem(name, there) is None}
        file = folder / MANIFEST
        own = not file.is_symlink() and read_bytes(file, most=MOST_JSON) == self.content
        return found | {file} if own else found

    def _problem(self, name: str, there: Mapping[str, Path]) -> str | None:
        """Describe the problem of a delivered file, or return None; `there`: all files of the folder, by name."""
        delivered, path = self.files[name], PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return "is outside of the folder"
        if (file := there.get(name)) is None:
            return "is missing"
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"is {kind_of(found.st_mode)}, where a file was delivered"
        if found.st_size != delivered.size_bytes:
            return f"has {found.st_size} bytes, but {delivered.size_bytes} were delivered"
        try:
            digest = file_digest(file)
        except StoreError as error:
            return str(error)
        return None if digest == delivered.sha256 else f"has the sha256 {digest}, not {delivered.sha256}"


def intact_files(folder: Path) -> set[Path]:
    """Return the files that the folder's manifest lists and that are unchanged; none without a manifest."""
    try:
        return Manifest.read(folder).intact(folder)
    except RecipeError:
        return set()


def target_name(folder: Path) -> str:
    """Return the name of a folder's target: a link's own name, or else that of the folder behind it."""
    own = os.path.basename(os.path.abspath(folder))
    return own if own in target_names() else folder.resolve().name


def compiled_folders(folder: Path) -> list[Path]:
    """Return the folder if it is one target's, else its targets' folders. Raises RecipeError if there is none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise RecipeError(f"{folder}: no {MANIFEST} in it or below: give a folder that `intaglio run` wrote")
    return found
