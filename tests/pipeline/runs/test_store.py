"""Objects are whole and verified; records are whole or not there."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from harness import full_disk
from safetensors.numpy import save_file
from toys import NUMBERS, START, Numbers, Text, toy_recipe

from intaglio import Store, compile
from intaglio.pipeline.contract.artifact import Artifact
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.errors import ContractError, StoreError
from intaglio.pipeline.handed_over import copy_weights, place_file
from intaglio.pipeline.runs.store import file_digest, remove_tree, tree_digest, write_atomically


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_digest_is_of_paths_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "tree/b").mkdir(parents=True)
    (tmp_path / "tree/empty").mkdir()
    (tmp_path / "tree/b/x").write_bytes(b"1")
    (tmp_path / "tree/a").write_bytes(b"")
    one, nothing = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"").hexdigest()
    expected = hashlib.sha256(f"{nothing} 0 a\n{one} 1 b/x\n".encode()).hexdigest()
    assert tree_digest(tmp_path / "tree") == expected


def test_equal_content_is_stored_once(store: Store) -> None:
    digests = {store.put(Numbers([1, 2]), staging=name) for name in ("a", "b")}
    assert len(digests) == len(list((store.root / "objects").iterdir())) == 1
    assert store.load(NUMBERS, digests.pop()) == Numbers([1, 2])


def test_a_flipped_byte_is_found_and_running_again_heals_it(store: Store) -> None:
    recipe = toy_recipe("Append", "Mutate")
    digest = compile(recipe, store, start=START)["onnxruntime-cpu"].outputs[NUMBERS]
    file = store.object_folder(digest) / "numbers.json"
    file.chmod(0o644)
    file.write_text("[1, 3]")
    fresh = Store(store.root)
    with pytest.raises(StoreError, match=f"object {digest} is damaged.*delete .*{digest} and run again"):
        fresh.load(NUMBERS, digest)
    file.unlink()
    file.parent.rmdir()
    assert compile(recipe, fresh, start=START)["onnxruntime-cpu"][NUMBERS] == Numbers([1, 1])


def test_objects_are_read_only(store: Store) -> None:
    digest = store.put(Numbers([1]), staging="a")
    assert (store.open(digest) / "numbers.json").stat().st_mode & 0o222 == 0


@dataclass(frozen=True)
class Copied(Artifact):
    """An artifact whose file is elsewhere, as that of a graph is."""

    path: Path

    def save(self, root: Path) -> None:
        place_file(self.path, root / "file")

    @classmethod
    def load(cls, root: Path) -> "Copied":
        return cls(root / "file")


def test_a_file_that_a_step_made_in_its_scratch_folder_is_moved(store: Store) -> None:
    file = store.scratch("a") / "file"
    file.write_text("large")
    number = file.stat().st_ino
    stored = store.open(store.put(Copied(file), staging="a")) / "file"
    assert (stored.stat().st_ino, file.exists()) == (number, False)


def test_a_file_of_the_user_is_copied_and_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    users, scratch = tmp_path / "users", store.scratch("a")
    users.write_text("large")
    (scratch / "link").symlink_to(users)
    (scratch / "name").hardlink_to(users)
    (store.scratch("b") / "file").write_text("large")  # another step's, which may still need it
    mode = users.stat().st_mode
    for path in (users, scratch / "link", scratch / "name", store.scratch("b") / "file"):
        stored = store.open(store.put(Copied(path), staging="a")) / "file"
        assert not stored.samefile(users)
        assert path.read_text() == "large"
        remove_tree(stored.parent)
    assert users.stat().st_mode == mode


class Weighed(Numbers):
    """Two weight files that are links to one file, as in the hub's cache."""

    def __init__(self, file: Path) -> None:
        super().__init__([])
        self.file = file

    def save(self, root: Path) -> None:
        copy_weights((self.file, root / name) for name in ("first", "second"))


def test_weights_that_the_store_has_are_not_copied_again(store: Store, tmp_path: Path) -> None:
    blob, link = tmp_path / "blob", tmp_path / "link"
    blob.write_bytes(bytes(4096))
    link.symlink_to(blob)
    digest = store.put(Weighed(link), staging="a")
    assert [(store.open(digest) / name).read_bytes() for name in ("first", "second")] == [bytes(4096)] * 2
    with full_disk(5):
        assert store.put(Weighed(link), staging="a") == digest
    (folder := tmp_path / "saved").mkdir()
    Weighed(blob).save(folder)
    assert tree_digest(folder) == digest
    blob.write_bytes(b"other" * 4096)
    with full_disk(5), pytest.raises(StoreError, match="cannot be written"):
        store.put(Weighed(link), staging="a")
    assert not list((store.root / "staging").iterdir())
    other = store.put(Weighed(link), staging="a")
    assert other != digest
    assert (store.open(other) / "second").read_bytes() == blob.read_bytes() == b"other" * 4096


def test_a_damaged_record_is_named(store: Store) -> None:
    compile(toy_recipe("Append"), store, start=START)
    (record,) = (store.root / "runs").iterdir()
    record.write_text("{")
    with pytest.raises(StoreError, match=f"{record.name} is not a run record: delete it"):
        compile(toy_recipe("Append"), store, start=START)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made a store"):
        Store(tmp_path / "file" / "store")


def test_a_full_disk_leaves_nothing_behind_and_the_same_command_goes_on(store: Store) -> None:
    record = RunRecord(step="append", origin="o", key=sha256("{}"), ingredients="{}", outputs={}, seconds=1.0)
    with full_disk(5):
        with pytest.raises(StoreError, match=r"a Numbers cannot be written \(.*File too large\): free space there"):
            store.put(Numbers([1, 2, 3]), staging="a")
        with pytest.raises(StoreError, match=r"the record of append cannot be written .*run the same command again"):
            store.finish(record)
    assert not list((store.root / "staging").iterdir())
    assert not list((store.root / "runs").iterdir())
    store.finish(record)
    assert store.load(NUMBERS, store.put(Numbers([1, 2, 3]), staging="a")) == Numbers([1, 2, 3])


class Weights(Numbers):
    def save(self, root: Path) -> None:
        save_file({"weight": np.zeros(4096, np.float32)}, root / "weights.safetensors")


def test_weights_that_the_disk_does_not_take_are_an_error_of_the_store(store: Store) -> None:
    with full_disk(4096), pytest.raises(StoreError, match=r"a Weights cannot be written .*File too large"):
        store.put(Weights([]), staging="a")
    assert not list((store.root / "staging").iterdir())


def rewritten(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Changes what a record says."""

    def write(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Puts something else in a record's place."""

    def write(path: Path) -> None:
        path.rename(path.parents[1] / "moved.json")
        make(path)

    return write


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 30)


NOT_ITS_KEY = "its name is not the sha256 of its ingredients"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(b"\xff"), "Invalid JSON"),
        (lambda path: path.write_bytes(b"[" * 100_000), "Invalid JSON"),
        (lambda path: path.write_text("[]"), "Input should be an object"),
        (sparse, "has 1073741824 bytes: at most 16777216 are read"),
        (rewritten(lambda content: content.update(outputs={})), "it names no NUMBERS"),
        (rewritten(lambda content: content.update(outputs={"NUMBERS": "../../elsewhere"})), "outputs: NUMBERS: String"),
        (rewritten(lambda content: content.update(outputs={"NUMBERS": "A" * 64})), "outputs: NUMBERS: String"),
        (rewritten(lambda content: content.update(outputs={"NUMBERS": "0" * 64 + "\n"})), "outputs: NUMBERS: String"),
        (rewritten(lambda content: content.update(outputs=[["NUMBERS", "0" * 64]])), "outputs: Input should be"),
        (rewritten(lambda content: content.update(key="../" + "0" * 61)), "key: String should match"),
        (rewritten(lambda content: content.update(key="0" * 64)), NOT_ITS_KEY),
        (rewritten(lambda content: content.update(ingredients="[]")), NOT_ITS_KEY),
        (rewritten(lambda content: content.update(seconds=-1)), "seconds: Input should be greater"),
        (rewritten(lambda content: content.update(seconds=float("nan"))), "seconds: Input should be"),
        (rewritten(lambda content: content.update(seconds=1e300)), "seconds: Input should be less"),
        (rewritten(lambda content: content.update(peak_bytes=10**400)), "peak_bytes: "),
        (replaced(os.mkfifo), "is not a regular file"),
        (replaced(Path.mkdir), "is a folder, not a file"),
        (replaced(lambda path: path.symlink_to("/etc/hostname")), "is a link out of"),
    ],
)
def test_an_odd_record_is_named_and_running_again_without_it_heals(
    damage: Callable[[Path], None], why: str, store: Store
) -> None:
    compile(toy_recipe("Append"), store, start=START)
    (record,) = (store.root / "runs").iterdir()
    damage(record)
    with pytest.raises(StoreError, match=r"is not a run record.*: delete it and run again") as caught:
        compile(toy_recipe("Append"), store, start=START)
    assert str(record) in str(caught.value)
    assert why in str(caught.value)
    remove_tree(record)
    assert compile(toy_recipe("Append"), store, start=START)["onnxruntime-cpu"][NUMBERS] == Numbers([1, 1])


def test_a_record_that_is_a_link_to_nowhere_is_written_again(store: Store, tmp_path: Path) -> None:
    compile(toy_recipe("Append"), store, start=START)
    (record,) = (store.root / "runs").iterdir()
    record.unlink()
    record.symlink_to(tmp_path / "nowhere")
    compile(toy_recipe("Append"), store, start=START)
    assert not record.is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_files_of_others_among_the_records_are_not_read(store: Store) -> None:
    (store.root / "runs/mine.json").write_text("mine")
    compile(toy_recipe("Append"), store, start=START)
    assert [record.step for record in store.records()] == ["append"]


def test_a_record_that_names_another_artifact_is_named(store: Store) -> None:
    compile(toy_recipe("Append"), store, start=START)
    (append,) = (store.root / "runs").iterdir()
    other = store.put(Text([1, 1]), staging="a")
    rewritten(lambda content: content.update(outputs={"NUMBERS": other}))(append)
    with pytest.raises(
        StoreError, match=rf"{append.name}: the stored NUMBERS cannot be read \(FileNotFoundError.*delete this"
    ):
        compile(toy_recipe("Append", "Mutate"), Store(store.root), start=START)


@pytest.mark.parametrize("digest", ["../../elsewhere", "", "0" * 63, "0" * 64 + "\n", "G" * 64, "/" * 64])
def test_what_is_no_digest_leads_to_no_path(digest: str, store: Store) -> None:
    for method in (store.open, store.object_folder, lambda digest: store.load(NUMBERS, digest)):
        with pytest.raises(StoreError, match="is no digest of an object: it has 64 hexadecimal digits"):
            method(digest)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/etc/fonts")]
)
def test_an_object_with_a_link_or_a_pipe_is_damaged_and_read_at_once(
    make: Callable[[Path], None], store: Store
) -> None:
    digest = store.put(Numbers([1]), staging="a")
    make(store.object_folder(digest) / "more")
    with pytest.raises(StoreError, match=f"object {digest} is damaged"):
        Store(store.root).open(digest)
    remove_tree(store.object_folder(digest))
    make(store.object_folder(digest))
    with pytest.raises(StoreError, match=f"object {digest} is damaged.*delete {store.object_folder(digest)}"):
        Store(store.root).open(digest)


class Linking(Numbers):
    def save(self, root: Path) -> None:
        (root / "numbers.json").symlink_to("/etc/hostname")


def test_an_artifact_that_saves_a_link_is_refused(store: Store) -> None:
    with pytest.raises(ContractError, match=r"a Linking saves numbers\.json, which is no regular file"):
        store.put(Linking([]), staging="a")
    assert not list((store.root / "staging").iterdir())


class OddNames(Numbers):
    def save(self, root: Path) -> None:
        for name in (b"caf\xe9", b"two\nlines", b"back\\slash"):
            (root / os.fsdecode(name)).write_text("1")
        (root / "sealed").mkdir()
        (root / "sealed/file").write_text("1")
        (root / "sealed").chmod(0o555)


def test_files_of_any_name_and_in_read_only_folders_are_kept(store: Store) -> None:
    digest = store.put(OddNames([]), staging="a")
    assert Store(store.root).open(digest).is_dir()
    lines = (rb"back\\slash", b"caf\xe9", b"sealed/file", rb"two\nlines")
    text = b"".join(sha256("1").encode() + b" 1 " + line + b"\n" for line in lines)
    assert digest == hashlib.sha256(text).hexdigest()
    assert store.put(OddNames([]), staging="b") == digest
    assert not list((store.root / "staging").iterdir())


def test_links_in_the_places_of_work_are_removed_and_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    key = sha256("{}")
    for place in ("staging", "scratch"):
        (store.root / place / key).symlink_to(tmp_path / "mine")
    store.put(Numbers([1]), staging=key)
    assert list(store.scratch(key).iterdir()) == []
    store.finish(RunRecord(step="append", origin="o", key=key, ingredients="{}", outputs={}, seconds=1.0))
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_a_digest_of_a_pipe_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe: is not a regular file"):
        file_digest(tmp_path / "pipe")


def test_a_lock_that_cannot_be_held_is_named(store: Store) -> None:
    (store.root / "locks/start").mkdir()
    with pytest.raises(StoreError, match="locks/start: cannot be locked"), store.lock("start"):
        pass


class Refused(Numbers):
    def save(self, root: Path) -> None:
        raise PermissionError(13, "Permission denied", "model")


def test_the_advice_to_make_room_is_given_where_room_is_what_is_missing(store: Store) -> None:
    with pytest.raises(StoreError, match=r"a Refused cannot be written \(.*Permission denied: 'model'\)$"):
        store.put(Refused([]), staging="a")
