"""Store artifacts in a folder, addressed by content, with records of the steps that made them.

objects/<sha256 of the sorted file tree>/   immutable
runs/<key>.json                             written last, by rename: exists if and only if the step succeeded
scratch/<key>/                              checkpoints of an unfinished step; removed on success
staging/<key>/                              outputs before they are moved to objects/
locks/<key>                                 held while a step runs
chosen/<sha256 of what was asked>.json      amounts that were chosen for a run that has to end in time
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError

from intaglio.pipeline.contract.artifact import A, Artifact, Key
from intaglio.pipeline.contract.run_record import DIGEST, RunRecord
from intaglio.pipeline.errors import ContractError, StoreError
from intaglio.pipeline.files import MOST_JSON, open_stream, printable, read_bytes, read_json_object
from intaglio.pipeline.handed_over import copies_put_off, copy_weights, handed_over

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""System errors that more free space resolves."""
NO_COPIES: Mapping[Path, Path] = MappingProxyType({})
"""The copies of a folder that is complete."""

log = logging.getLogger(__name__)


class Store:
    """Folder of artifacts and records. Only complete objects and records are visible, even if a process is killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        try:
            for folder in ("objects", "runs", "scratch", "staging", "locks", "chosen"):
                (root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{root}: cannot be made a store ({error}): give another folder with --store") from error

    def put(self, artifact: Artifact, *, staging: str) -> str:
        """Save the artifact and return its digest. The caller holds the lock of the same name as `staging`.

        Files that a graph has in the scratch folder of this name are moved, all others are copied. Weights that the
        store has already are not copied again.

        Raises StoreError, and leaves nothing behind, if the disk cannot be written; ContractError if the artifact saves
        links, pipes or devices.
        """
        folder = self.root / "staging" / staging
        try:
            remove_tree(folder)
            folder.mkdir()
            with handed_over(self.root / "scratch" / staging), copies_put_off() as copies:
                artifact.save(folder)
            if copies and self.object_folder(digest := tree_digest(folder, copies)).is_dir():
                return digest
            copy_weights((source, to) for to, source in copies.items())
            digest = self._moved(folder, type(artifact).__name__)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(f"a {type(artifact).__name__}", error) from error
        finally:
            remove_tree(folder)
        return digest

    def _moved(self, folder: Path, what: str) -> str:
        """Move a saved artifact to objects/, read-only, and return its digest."""
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
            if not destination.exists():  # if it exists, another run has stored the same content
                raise
        return digest

    def load(self, key: Key[A], digest: str) -> A:
        """Load a fresh copy. Raises StoreError if the files have changed or belong to another artifact."""
        folder = self.open(digest)
        try:
            return key.type.load(folder)
        except (OSError, LookupError, TypeError, ValueError) as error:
            found = next((record for record in self.records() if record.outputs.get(key.name) == digest), None)
            if found is None:
                raise
            raise StoreError(
                f"{self._record_path(found.key)}: the stored {key} cannot be read ({type(error).__name__}: "
                f"{printable(error)}): delete this record and run again; if it fails again, correct"
                f" {key.type.__name__}.load"
            ) from error

    def open(self, digest: str) -> Path:
        """Return the folder of an object, verified when this store first reads it."""
        folder = self.object_folder(digest)
        if digest not in self._verified:
            try:
                found = tree_digest(folder) if folder.is_dir() else "nothing"
            except OSError as error:
                raise StoreError(f"{folder}: cannot be read ({error.strerror or error})") from error
            if found != digest:
                raise StoreError(
                    f"object {digest} is damaged: its files hash to {found}: delete {folder} and run again to "
                    "make it once more"
                )
            self._verified.add(digest)
        return folder

    def find(self, key: str, outputs: Collection[str] = ()) -> RunRecord | None:
        """Return the record of a finished step whose outputs all exist, or None.

        `outputs`: names of keys that the record must have. Raises StoreError if it lacks one.
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

    def size_bytes(self, digests: Collection[str]) -> int:
        """Return the size in bytes of the objects that the store has of these."""
        folders = (self.object_folder(digest) for digest in digests)
        return sum(file.lstat().st_size for folder in folders if folder.is_dir() for file in files_below(folder))

    def records(self) -> Iterator[RunRecord]:
        """Yield all records, the oldest first."""
        found = [path for path in (self.root / "runs").iterdir() if re.fullmatch(rf"{DIGEST}\.json", path.name)]
        for path in sorted(found, key=lambda path: (path.lstat().st_mtime_ns, path.name)):
            yield _read_record(path)

    def finish(self, record: RunRecord) -> None:
        """Write the record of a finished step, then remove its scratch folder. Raises StoreError as `put` does."""
        try:
            write_atomically(self._record_path(record.key), record.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(f"the record of {record.step}", error) from error
        remove_tree(self.root / "scratch" / record.key)

    def choice(self, asked: str) -> dict[str, object] | None:
        """Return what was chosen when this was asked; None if it never was, or if the file is damaged."""
        try:
            return read_json_object(self._choice_path(asked), inside=self.root, error=StoreError)
        except StoreError:
            return None

    def choose(self, asked: str, chosen: Mapping[str, JsonValue]) -> None:
        """Keep what was chosen when this was asked. Raises StoreError as `put` does."""
        try:
            write_atomically(self._choice_path(asked), json.dumps(dict(chosen)) + "\n")
        except OSError as error:
            raise self._unwritable("the chosen amounts", error) from error

    def _choice_path(self, asked: str) -> Path:
        return self.root / "chosen" / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"

    def scratch(self, key: str) -> Path:
        """Return the folder for checkpoints of an unfinished step, with the files of an earlier run of it."""
        folder = self.root / "scratch" / key
        try:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                remove_tree(folder)
            folder.mkdir(exist_ok=True)  # another process of the run may have made it just now
        except OSError as error:
            raise self._unwritable("a folder for checkpoints", error) from error
        return folder

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock that one process has at a time; the system frees it when the process dies."""
        path = self.root / "locks" / name
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run holds the lock %s of this store: waiting for it", path.name)
            lock.acquire()
        except OSError as error:
            raise StoreError(f"{path}: cannot be locked ({error.strerror or error})") from error
        try:
            yield
        finally:
            lock.release()

    def _unwritable(self, what: str, error: Exception) -> StoreError:
        """Make an error for a failed write, with advice to free space only if the disk is full."""
        full = any(os.strerror(code) in str(error) for code in FULL)
        advice = ": free space there, then run the same command again" if full else ""
        return StoreError(f"{self.root}: {what} cannot be written ({printable(error)}){advice}")

    def object_folder(self, digest: str) -> Path:
        """Return the folder where the object is or would be. Raises StoreError if `digest` is not a digest."""
        if re.fullmatch(DIGEST, digest) is None:
            raise StoreError(f"{printable(digest)[:80]!r} is no digest of an object: it has 64 hexadecimal digits")
        return self.root / "objects" / digest

    def _record_path(self, key: str) -> Path:
        return self.root / "runs" / f"{key}.json"


def tree_digest(root: Path, copies: Mapping[Path, Path] = NO_COPIES) -> str:
    """Return the sha256 over one line per file, sorted by path: `<sha256> <size> <path>`. Empty folders do not count.

    `copies` has, for files that are still empty, the file that is to be copied there. Links, pipes and devices have a
    line that no regular file can have, so an object with one never counts as complete.
    """
    lines = {}
    for path in entries_below(root)[1]:
        content = copies.get(path, path)
        name, found = path.relative_to(root).as_posix(), content.lstat()
        about = f"{file_digest(content)} {found.st_size}" if stat.S_ISREG(found.st_mode) else "- -"
        lines[name] = f"{about} {name.replace(chr(92), chr(92) * 2).replace(chr(10), chr(92) + 'n')}\n"
    text = "".join(lines[name] for name in sorted(lines))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a regular file. Raises StoreError for anything else, and if it cannot be read."""
    with open_stream(path, error=StoreError) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it holds either the whole text or its old content at every moment."""
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
    """Remove the folder if it exists; remove only the link, or the file, if that is in its place."""
    if folder.is_dir() and not folder.is_symlink():
        for place, names, _ in os.walk(folder):  # files cannot leave a read-only folder
            for each in (Path(place, name) for name in names):
                if not each.is_symlink():
                    each.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def files_below(root: Path) -> list[Path]:
    """Return all regular files below a folder, sorted. No link is followed."""
    return [path for path in entries_below(root)[1] if stat.S_ISREG(path.lstat().st_mode)]


def entries_below(root: Path) -> tuple[list[Path], list[Path]]:
    """Return all folders below a folder, and all other entries, both sorted. No link is followed.

    The others are files, links, pipes and devices. Raises OSError if a folder cannot be read.
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
    """Read a record. Raises StoreError if the file is not a record, or is the record of another key."""
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
