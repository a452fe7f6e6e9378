"""A folder of artifacts addressed by content, and of records that say which step made which.

objects/<sha256 of the sorted file tree>/   immutable
runs/<key>.json                             written last, by rename: exists if and only if the step succeeded
scratch/<key>/                              checkpoints of an unfinished step; removed on success
staging/<key>/                              outputs on their way to objects/
locks/<key>                                 held while a step runs
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from intaglio.pipeline.artifact import A, Artifact, Key
from intaglio.pipeline.errors import StoreError

log = logging.getLogger(__name__)


class RunRecord(BaseModel):
    """One step that succeeded: what it was made from, what came out, and how long it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    origin: str
    key: str
    ingredients: str
    """The JSON text that `key` is the sha256 of."""
    outputs: Mapping[str, str]
    """Key name -> digest."""
    seconds: float
    peak_bytes: int | None = None
    """The most memory that the process held at once, what it held before among it; None where that is not known."""


class Store:
    """Only whole objects and whole records are ever visible, whatever kills the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        try:
            for folder in ("objects", "runs", "scratch", "staging", "locks"):
                (root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{root}: cannot be made a store ({error}): give another folder with --store") from error

    def put(self, artifact: Artifact, *, staging: str) -> str:
        """Saves the artifact and returns its digest. The caller holds the lock of the same name as `staging`.

        Raises StoreError, and leaves nothing behind, where the disk does not take it.
        """
        folder = self.root / "staging" / staging
        remove_tree(folder)
        folder.mkdir()
        try:
            artifact.save(folder)
        except (OSError, SafetensorError) as error:
            remove_tree(folder)
            raise self._unwritable(f"a {type(artifact).__name__}", error) from error
        digest = tree_digest(folder)
        destination = self.object_folder(digest)
        if not destination.exists():
            for file in files_below(folder):
                file.chmod(0o444)
            try:
                folder.rename(destination)
                self._verified.add(digest)
            except OSError:
                if not destination.exists():  # else another run came first, with the same content
                    raise
        remove_tree(folder)
        return digest

    def load(self, key: Key[A], digest: str) -> A:
        """A fresh copy. Raises StoreError where the files are not what was stored."""
        return key.type.load(self.open(digest))

    def open(self, digest: str) -> Path:
        """The folder of an object, verified when this store first reads it."""
        folder = self.object_folder(digest)
        if digest not in self._verified:
            found = tree_digest(folder) if folder.is_dir() else "nothing"
            if found != digest:
                raise StoreError(
                    f"object {digest} is damaged: its files hash to {found}: delete {folder} and run again, "
                    "the step that made it runs once more"
                )
            self._verified.add(digest)
        return folder

    def find(self, key: str) -> RunRecord | None:
        """The record of a finished step whose outputs are all here."""
        path = self._record_path(key)
        if not path.exists():
            return None
        record = _read_record(path)
        return record if all(self.object_folder(digest).is_dir() for digest in record.outputs.values()) else None

    def records(self) -> Iterator[RunRecord]:
        """All records, the oldest first."""
        for path in sorted((self.root / "runs").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            yield _read_record(path)

    def finish(self, record: RunRecord) -> None:
        """The step succeeded: writes its record, then removes its scratch folder. Raises StoreError as `put` does."""
        try:
            write_atomically(self._record_path(record.key), record.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(f"the record of {record.step}", error) from error
        remove_tree(self.root / "scratch" / record.key)

    def scratch(self, key: str) -> Path:
        folder = self.root / "scratch" / key
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time; the system frees it when the process dies."""
        lock = FileLock(self.root / "locks" / name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run on this store is at the same step: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _unwritable(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"{self.root}: {what} cannot be written ({error}): make room there, the same command goes on from here"
        )

    def object_folder(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def _record_path(self, key: str) -> Path:
        return self.root / "runs" / f"{key}.json"


def tree_digest(root: Path) -> str:
    """sha256 over one line a file, sorted by path: `<sha256> <size> <path>`. Empty folders do not count."""
    lines = [
        f"{file_digest(file)} {file.stat().st_size} {file.relative_to(root).as_posix()}\n" for file in files_below(root)
    ]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line.split(" ", 2)[2])).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """The file is there with the whole text, or as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def remove_tree(folder: Path) -> None:
    """Removes the folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def files_below(root: Path) -> list[Path]:
    """All files of all folders in it."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def _read_record(path: Path) -> RunRecord:
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise StoreError(f"{path} is not a run record: delete it and run again ({error.errors()[0]['msg']})") from error
