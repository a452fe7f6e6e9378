"""A folder of artifacts addressed by content, and of records that say which step made which.

objects/<sha256 of the sorted file tree>/   immutable
runs/<key>.json                             written last, by rename: exists if and only if the step succeeded
scratch/<key>/                              checkpoints of an unfinished step; removed on success
staging/<key>/                              outputs on their way to objects/
locks/<key>                                 held while a step runs
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError
from safetensors import SafetensorError

from intaglio.pipeline.contract.artifact import A, Artifact, Key
from intaglio.pipeline.contract.run_record import DIGEST, RunRecord
from intaglio.pipeline.errors import ContractError, StoreError
from intaglio.pipeline.files import MOST_JSON, open_stream, printable, read_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that end when there is more room."""

log = logging.getLogger(__name__)


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

        Raises StoreError, and leaves nothing behind, where the disk does not take it; ContractError for an artifact
        that saves links, pipes or devices.
        """
        folder = self.root / "staging" / staging
        try:
            remove_tree(folder)
            folder.mkdir()
            artifact.save(folder)
            digest = self._moved(folder, type(artifact).__name__)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(f"a {type(artifact).__name__}", error) from error
        finally:
            remove_tree(folder)
        return digest

    def _moved(self, folder: Path, what: str) -> str:
        """Moves a saved artifact to objects/, read-only, and returns its digest."""
        folders, others = entries_below(folder)
        if odd := [path for path in others if not stat.S_ISREG(path.lstat().st_mode)]:
            raise ContractError(f"a {what} saves {printable(odd[0].relative_to(folder))}, which is no regular file")
        digest = tree_digest(folder)
        destination = self.object_folder(digest)
        if os.path.lexists(destination):
            return digest
        for each in folders:  # a copied folder may be read-only, and then can be neither moved nor removed
            each.chmod(each.stat().st_mode | stat.S_IRWXU)
        for each in others:
            each.chmod(0o444)
        try:
            folder.rename(destination)
            self._verified.add(digest)
        except OSError:
            if not destination.exists():  # else another run came first, with the same content
                raise
        return digest

    def load(self, key: Key[A], digest: str) -> A:
        """A fresh copy. Raises StoreError where the files are not what was stored, or are another artifact's."""
        folder = self.open(digest)
        try:
            return key.type.load(folder)
        except (OSError, LookupError, TypeError, ValueError) as error:
            found = next((record for record in self.records() if record.outputs.get(key.name) == digest), None)
            if found is None:
                raise
            raise StoreError(
                f"{self._record_path(found.key)}: its {key} is not one ({type(error).__name__}: {printable(error)}): "
                f"delete this record and run again; if that ends the same way, cure {key.type.__name__}.load"
            ) from error

    def open(self, digest: str) -> Path:
        """The folder of an object, verified when this store first reads it."""
        folder = self.object_folder(digest)
        if digest not in self._verified:
            try:
                found = tree_digest(folder) if folder.is_dir() else "nothing"
            except OSError as error:
                raise StoreError(f"{folder}: cannot be read ({error.strerror or error})") from error
            if found != digest:
                raise StoreError(
                    f"object {digest} is damaged: its files hash to {found}: delete {folder} and run again, "
                    "the step that made it runs once more"
                )
            self._verified.add(digest)
        return folder

    def find(self, key: str, outputs: Collection[str] = ()) -> RunRecord | None:
        """The record of a finished step whose outputs are all here.

        `outputs`: names of keys that it has to have. Raises StoreError where the record is none of such a step.
        """
        path = self._record_path(key)
        if not path.exists():
            return None
        record = _read_record(path)
        if missing := sorted(set(outputs) - record.outputs.keys()):
            raise StoreError(
                f"{path} is not a run record of {printable(record.step)}: delete it and run again "
                f"(it names no {', '.join(missing)})"
            )
        return record if all(self.object_folder(digest).is_dir() for digest in record.outputs.values()) else None

    def records(self) -> Iterator[RunRecord]:
        """All records, the oldest first."""
        found = [path for path in (self.root / "runs").iterdir() if re.fullmatch(rf"{DIGEST}\.json", path.name)]
        for path in sorted(found, key=lambda path: (path.lstat().st_mtime_ns, path.name)):
            yield _read_record(path)

    def finish(self, record: RunRecord) -> None:
        """The step succeeded: writes its record, then removes its scratch folder. Raises StoreError as `put` does."""
        try:
            write_atomically(self._record_path(record.key), record.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(f"the record of {record.step}", error) from error
        remove_tree(self.root / "scratch" / record.key)

    def scratch(self, key: str) -> Path:
        """The folder for checkpoints of an unfinished step: what an earlier run of the step left is still in it."""
        folder = self.root / "scratch" / key
        try:
            if folder.is_symlink() or not folder.is_dir():
                remove_tree(folder)
                folder.mkdir()
        except OSError as error:
            raise self._unwritable("a folder for checkpoints", error) from error
        return folder

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time; the system frees it when the process dies."""
        path = self.root / "locks" / name
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run on this store is at the same step: waiting for it")
            lock.acquire()
        except OSError as error:
            raise StoreError(f"{path}: cannot be locked ({error.strerror or error})") from error
        try:
            yield
        finally:
            lock.release()

    def _unwritable(self, what: str, error: Exception) -> StoreError:
        """The advice to make room is given only where there is none left."""
        full = any(os.strerror(code) in str(error) for code in FULL)
        advice = ": make room there, the same command goes on from here" if full else ""
        return StoreError(f"{self.root}: {what} cannot be written ({printable(error)}){advice}")

    def object_folder(self, digest: str) -> Path:
        """Where the object is, or would be. Raises StoreError for what is no digest, and could be any path."""
        if re.fullmatch(DIGEST, digest) is None:
            raise StoreError(f"{printable(digest)[:80]!r} is no digest of an object: it has 64 hexadecimal digits")
        return self.root / "objects" / digest

    def _record_path(self, key: str) -> Path:
        return self.root / "runs" / f"{key}.json"


def tree_digest(root: Path) -> str:
    """sha256 over one line a file, sorted by path: `<sha256> <size> <path>`. Empty folders do not count.

    Links, pipes and devices have a line that no file has, so that no object with one is ever taken for whole.
    """
    lines = {}
    for path in entries_below(root)[1]:
        name, found = path.relative_to(root).as_posix(), path.lstat()
        about = f"{file_digest(path)} {found.st_size}" if stat.S_ISREG(found.st_mode) else "- -"
        lines[name] = f"{about} {name.replace(chr(92), chr(92) * 2).replace(chr(10), chr(92) + 'n')}\n"
    text = "".join(lines[name] for name in sorted(lines))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a regular file. Raises StoreError for anything else, and where it cannot be read."""
    with open_stream(path, error=StoreError) as stream:
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
    """Removes the folder if it is there; of a link, or of what else is in its place, that alone."""
    if folder.is_dir() and not folder.is_symlink():
        for place, names, _ in os.walk(folder):  # nothing can be taken out of a folder that is read-only
            for each in (Path(place, name) for name in names):
                if not each.is_symlink():
                    each.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def files_below(root: Path) -> list[Path]:
    """All regular files of all folders in it, sorted. No link is followed."""
    return [path for path in entries_below(root)[1] if stat.S_ISREG(path.lstat().st_mode)]


def entries_below(root: Path) -> tuple[list[Path], list[Path]]:
    """All folders of all folders in it, and all else: files, links, pipes, devices; both sorted. No link is followed.

    Raises OSError where a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise error

    folders, others = list[Path](), list[Path]()
    for place, names, files in os.walk(root, onerror=unreadable):
        paths = [Path(place, name) for name in names]
        folders += [path for path in paths if not path.is_symlink()]
        others += [*(path for path in paths if path.is_symlink()), *(Path(place, file) for file in files)]
    return sorted(folders), sorted(others)


def _read_record(path: Path) -> RunRecord:
    """Raises StoreError where it is none, or the record of something else than its name says."""
    try:
        content = read_bytes(path, most=MOST_JSON, inside=path.parent, error=StoreError)
        record = RunRecord.model_validate_json(content)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        what = ": ".join((*(printable(part)[:80] for part in found["loc"]), printable(found["msg"])))
    except StoreError as error:
        what = str(error).removeprefix(f"{printable(path)}: ")
    else:
        if path.stem == record.key == hashlib.sha256(record.ingredients.encode()).hexdigest():
            return record
        what = "its name is not the sha256 of its ingredients"
    raise StoreError(f"{printable(path)} is not a run record: delete it and run again ({what})")
