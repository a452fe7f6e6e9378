"""What a compiled folder says of itself: the digest of every file, and the steps that they come from."""

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
    """Its content."""

    model_config = ConfigDict(frozen=True)

    sha256: Digest
    size_bytes: int = Field(ge=0, lt=1 << 63)


class DeliveredStep(BaseModel):
    """A step of the chain, with the digests of what it made."""

    model_config = ConfigDict(frozen=True)

    step: str
    origin: str = Field(serialization_alias="pass", validation_alias=AliasChoices("pass", "origin"))
    key: Digest
    outputs: Mapping[str, Digest]


class Manifest(BaseModel):
    """`manifest.json` of one target."""

    model_config = ConfigDict(frozen=True)

    files: Mapping[str, DeliveredFile]
    """By their path below the folder, `/` between its parts."""
    seed: int
    start: Mapping[str, Digest]
    """Key name -> digest of what there was before the first step."""
    steps: tuple[DeliveredStep, ...]
    versions: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        (folder / MANIFEST).write_bytes(self.content)

    @property
    def content(self) -> bytes:
        """The bytes of its file."""
        return (self.model_dump_json(indent=1, by_alias=True) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises RecipeError where there is none, or none that can be read."""
        file = folder / MANIFEST
        if not file.exists():
            raise RecipeError(
                f"{printable(folder)}: no {MANIFEST}: give one target's folder of what `intaglio run` wrote"
            )
        content = read_bytes(file, most=MOST_JSON, inside=folder)
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(printable(part)[:80] for part in first["loc"]) or "the whole"
            raise RecipeError(f"{printable(file)}: is no manifest: {place}: {printable(first['msg'])}") from error

    @property
    def digests(self) -> dict[str, str]:
        """Key name -> digest of its last artifact."""
        found = dict(self.start)
        for step in self.steps:
            found |= step.outputs
        return found

    def departures(self, folder: Path) -> Iterator[str]:
        """What is missing, changed, or beside what was delivered. Follows no link, and nothing out of the folder."""
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
        """What was delivered and is missing or changed; names in `without` are not looked at."""
        there = {file.relative_to(folder).as_posix(): file for file in entries_below(folder)[1]}
        for name in self.files:
            if name not in without and (problem := self._problem(name, there)) is not None:
                yield f"{printable(name)}: {problem}"

    def intact(self, folder: Path) -> set[Path]:
        """Files of the folder that are as they were delivered, its own file among them."""
        there = {file.relative_to(folder).as_posix(): file for file in entries_below(folder)[1]}
        found = {there[name] for name in self.files if self._problem(name, there) is None}
        file = folder / MANIFEST
        own = not file.is_symlink() and read_bytes(file, most=MOST_JSON) == self.content
        return found | {file} if own else found

    def _problem(self, name: str, there: Mapping[str, Path]) -> str | None:
        """What is wrong with a delivered file; `there`: by name, all that is in the folder."""
        delivered, path = self.files[name], PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return "is outside of the folder"
        if (file := there.get(name)) is None:
            return "is missing"
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"is {kind_of(found.st_mode)}, where a file was delivered"
        if found.st_size != delivered.size_bytes:
            return f"has {found.st_size} bytes, delivered were {delivered.size_bytes}"
        try:
            digest = file_digest(file)
        except StoreError as error:
            return str(error)
        return None if digest == delivered.sha256 else f"has the sha256 {digest}, delivered was {delivered.sha256}"


def intact_files(folder: Path) -> set[Path]:
    """Files of a folder that its own manifest lists and that are as they were delivered: none where it has none."""
    try:
        return Manifest.read(folder).intact(folder)
    except RecipeError:
        return set()


def target_name(folder: Path) -> str:
    """The target that a folder is of, by its name; of a link by its own name, or else by that of what it leads to."""
    own = os.path.basename(os.path.abspath(folder))
    return own if own in target_names() else folder.resolve().name


def compiled_folders(folder: Path) -> list[Path]:
    """The folder itself where it is one target's, else those of its targets. Raises RecipeError where there is none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise RecipeError(f"{folder}: no {MANIFEST} in it or below: give a folder of what `intaglio run` wrote")
    return found
