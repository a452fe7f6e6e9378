"""Objects are whole and verified; records are whole or not there."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from harness import full_disk
from safetensors.numpy import save_file
from toys import NUMBERS, START, Numbers, toy_recipe

from intaglio.pipeline import Store, compile
from intaglio.pipeline.errors import StoreError
from intaglio.pipeline.store import RunRecord, tree_digest, write_atomically


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
        with pytest.raises(StoreError, match=r"a Numbers cannot be written \(.*File too large\): make room there"):
            store.put(Numbers([1, 2, 3]), staging="a")
        with pytest.raises(StoreError, match=r"the record of append cannot be written .*the same command goes on"):
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
