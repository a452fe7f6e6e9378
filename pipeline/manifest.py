"""What a compiled folder says of itself: the digest of every file, and the steps that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.store import file_digest, files_below

MANIFEST = "manifest.json"


class DeliveredFile(BaseModel):
    """Its content."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size_bytes: int


class DeliveredStep(BaseModel):
    """A step of the chain, with the digests of what it made."""

    model_config = ConfigDict(frozen=True)

    step: str
    origin: str = Field(serialization_alias="pass", validation_alias=AliasChoices("pass", "origin"))
    key: str
    outputs: Mapping[str, str]


class Manifest(BaseModel):
    """`manifest.json` of one target."""

    model_config = ConfigDict(frozen=True)

    files: Mapping[str, DeliveredFile]
    """By their path below the folder, `/` between its parts."""
    seed: int
    start: Mapping[str, str]
    """Key name -> digest of what there was before the first step."""
    steps: tuple[DeliveredStep, ...]
    versions: Mapping[str, str]

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises RecipeError where there is none, or none that can be read."""
        try:
            text = (folder / MANIFEST).read_bytes()
        except OSError as error:
            raise RecipeError(
                f"{folder}: no {MANIFEST}: give one target's folder of what `intaglio run` wrote"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise RecipeError(f"{folder / MANIFEST}: is no manifest: {place}: {first['msg']}") from error

    @property
    def digests(self) -> dict[str, str]:
        """Key name -> digest of its last artifact."""
        found = dict(self.start)
        for step in self.steps:
            found |= step.outputs
        return found

    def departures(self, folder: Path) -> Iterator[str]:
        """What is missing, changed, or beside what was delivered. Follows no link, and nothing out of the folder."""
        there = {file.relative_to(folder).as_posix(): file for file in files_below(folder)}
        for name, delivered in self.files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                yield f"{name}: is outside of the folder"
            elif (file := there.get(name)) is None:
                yield f"{name}: is missing"
            elif file.is_symlink():
                yield f"{name}: is a link, where a file was delivered"
            elif (size := file.stat().st_size) != delivered.size_bytes:
                yield f"{name}: has {size} bytes, delivered were {delivered.size_bytes}"
            elif (digest := file_digest(file)) != delivered.sha256:
                yield f"{name}: has the sha256 {digest}, delivered was {delivered.sha256}"
        for name in sorted(there.keys() - self.files.keys() - {MANIFEST}):
            yield f"{name}: was not delivered"


def compiled_folders(folder: Path) -> list[Path]:
    """The folder itself where it is one target's, else those of its targets. Raises RecipeError where there is none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise RecipeError(f"{folder}: no {MANIFEST} in it or below: give a folder of what `intaglio run` wrote")
    return found
