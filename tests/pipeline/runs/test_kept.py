"""Artifacts that depend on the model alone are made once for all steps of a store."""

import pytest
from toys import NUMBERS, Numbers

from intaglio import Store
from intaglio.pipeline.errors import StoreError
from intaglio.pipeline.runs.kept import StoreKeep

MODEL, OTHER = "0" * 64, "1" * 64


def made(store: Store, model: str, about: dict[str, object], number: int) -> list[int]:
    return StoreKeep(store, model)(NUMBERS, about, lambda: Numbers([number])).values


def test_it_is_made_once_for_each_model_and_each_question(store):
    assert made(store, MODEL, {"start": "a", "device": "cpu"}, 1) == [1]
    assert made(store, MODEL, {"device": "cpu", "start": "a"}, 2) == [1]
    assert made(store, MODEL, {"device": "cpu", "start": "b"}, 3) == [3]
    assert made(store, OTHER, {"start": "a", "device": "cpu"}, 4) == [4]
    assert made(Store(store.root), MODEL, {"start": "a", "device": "cpu"}, 5) == [1]


def test_nothing_is_kept_of_a_failure(store):
    with pytest.raises(ZeroDivisionError):
        StoreKeep(store, MODEL)(NUMBERS, {}, lambda: Numbers([1 // 0]))
    assert made(store, MODEL, {}, 2) == [2]


def test_a_damaged_file_is_found_and_an_absent_one_is_made_anew(store):
    made(store, MODEL, {}, 1)
    (folder,) = (store.root / "objects").iterdir()
    (file,) = folder.iterdir()
    file.chmod(0o644)
    file.write_text("[7]")
    with pytest.raises(StoreError, match=f"object {folder.name} is damaged: .*delete .* and run again"):
        made(Store(store.root), MODEL, {}, 2)
    file.unlink()
    folder.rmdir()
    assert made(Store(store.root), MODEL, {}, 3) == [3]
