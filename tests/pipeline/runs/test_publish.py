"""A run replaces only what an earlier run delivered: whatever else lies in its folder stays, at a kill too."""

import errno
import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from toys import START, Text, toy_recipe

from intaglio import Store, compile
from intaglio.pipeline.errors import RecipeError, StoreError
from intaglio.pipeline.runs import replacement
from intaglio.pipeline.runs.manifest import Manifest, target_name
from intaglio.pipeline.runs.runner import StepEvent

TARGET = "onnxruntime-cpu"


def run(store: Store, out: Path, number: int = 1, **options: object) -> Path:
    compile(toy_recipe(("Append", {"number": number}), "Add"), store, start=START, out=out, **options)  # type: ignore[arg-type]  # tests only
    return out / TARGET


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """Results of a run, and what its user put beside them."""
    folder = run(store, tmp_path / "out")
    (folder / "my_notes.txt").write_text("notes")
    (folder / "drafts/empty").mkdir(parents=True)
    (folder / "drafts/plan.txt").write_text("draft")
    (folder / "drafts").chmod(0o755)
    (folder / "data").symlink_to("/nowhere")
    return folder


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


DELIVERED = ["manifest.json", "numbers.json", "recipe.yaml", "text.json"]
MINE = ["data", "drafts", "drafts/empty", "drafts/plan.txt", "my_notes.txt"]


def is_whole(folder: Path, *numbers: int) -> None:
    """The results of one of the runs, and all that is the user's; nothing beside the folder."""
    assert list(Manifest.read(folder).damage(folder)) == []
    assert json.loads((folder / "numbers.json").read_text())[1] in numbers
    assert listed(folder) == sorted(DELIVERED + MINE)
    assert (folder / "my_notes.txt").read_text() == "notes"
    assert (folder / "drafts/plan.txt").read_text() == "draft"
    assert os.readlink(folder / "data") == "/nowhere"


def test_what_the_user_put_into_the_folder_stays_and_is_named(
    store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (folder / "my_notes.txt").stat().st_ino
    with caplog.at_level(logging.INFO, "intaglio"):
        run(store, folder.parent, 2)
    is_whole(folder, 2)
    assert (folder / "my_notes.txt").stat().st_ino == before  # whoever has it open writes on into it
    assert f"{folder}: keeps files that no run wrote: data, drafts/plan.txt, my_notes.txt" in caplog.messages
    assert os.listdir(folder.parent) == [TARGET]


def test_a_delivered_file_that_the_user_changed_is_kept_under_another_name(
    store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "numbers.json").write_text("[1, 99]")
    with caplog.at_level(logging.INFO, "intaglio"):
        run(store, folder.parent, 2)
        run(store, folder.parent, 3)
    assert (folder / "numbers.json").read_text() == "[1, 3]"
    assert (folder / "numbers.json.kept").read_text() == "[1, 99]"
    assert (
        f"{folder}: keeps files that were changed since a run wrote them: numbers.json as numbers.json.kept"
        in caplog.messages
    )


def test_a_changed_manifest_and_a_link_in_a_file_s_place_are_kept_too(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(facts | {"note": "mine"}))
    (folder / "text.json").rename(tmp_path / "moved.json")
    (folder / "text.json").symlink_to(tmp_path / "moved.json")
    run(store, folder.parent, 2)
    assert json.loads((folder / "manifest.json.kept").read_text())["note"] == "mine"
    assert (folder / "text.json.kept").readlink() == tmp_path / "moved.json"
    assert not (folder / "text.json").is_symlink()
    assert (tmp_path / "moved.json").read_text() == "[2, 26]"


def test_a_folder_of_the_user_s_under_a_delivered_name_is_kept(store: Store, folder: Path) -> None:
    (folder / "numbers.json").unlink()
    (folder / "numbers.json").mkdir()
    for name in ("a", "b"):
        (folder / "numbers.json" / name).write_text(name)
    run(store, folder.parent, 2)
    assert (folder / "numbers.json").read_text() == "[1, 2]"
    assert [(folder / "numbers.json.kept" / name).read_text() for name in ("a", "b")] == ["a", "b"]


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "my web app"}', "{", "[]", '{"files": {"precious.txt": {"sha256": "../..", "size_bytes": 8}}}'],
)
def test_a_folder_with_somebody_else_s_manifest_is_refused_before_the_run(
    manifest: str, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / TARGET
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    (folder / "precious.txt").write_text("precious")
    ran: list[object] = []
    with pytest.raises(RecipeError, match=r"was not written by intaglio: move it, .*: is no manifest"):
        run(store, tmp_path / "out", on_step=ran.append)
    assert not ran
    assert listed(folder) == ["manifest.json", "precious.txt"]


def test_a_pipe_in_the_manifest_s_place_is_refused_at_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out" / TARGET).mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / TARGET / "manifest.json")
    with pytest.raises(RecipeError, match=r"was not written by intaglio.*is not a regular file"):
        run(store, tmp_path / "out")


def test_an_empty_folder_is_filled(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out" / TARGET).mkdir(parents=True)
    assert listed(run(store, tmp_path / "out")) == DELIVERED


def test_a_linked_folder_is_written_through(store: Store, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for number in (2, 3):
        run(store, folder.parent, number)
        assert folder.readlink() == tmp_path / "elsewhere"
        is_whole(tmp_path / "elsewhere", number)
    assert target_name(folder) == TARGET


def test_links_to_nowhere_in_a_circle_and_to_a_file_end_in_a_folder_or_an_error(store: Store, tmp_path: Path) -> None:
    link = tmp_path / "out" / TARGET
    link.parent.mkdir()
    link.symlink_to(tmp_path / "elsewhere/deeper")
    assert listed(run(store, tmp_path / "out")) == DELIVERED
    assert listed(tmp_path / "elsewhere/deeper") == DELIVERED
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(RecipeError, match=f"{TARGET}: cannot be read .*: choose another --out"):
        run(store, tmp_path / "out")
    link.unlink()
    (tmp_path / "file").write_text("mine")
    link.symlink_to(tmp_path / "file")
    with pytest.raises(RecipeError, match=f"{TARGET}: exists and is no folder"):
        run(store, tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_targets_that_lead_to_one_folder_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in (TARGET, "tensorrt-rtx"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "one")
    recipe = toy_recipe("Append", targets=(TARGET, "tensorrt-rtx"))
    with pytest.raises(RecipeError, match=f"tensorrt-rtx: leads to the same folder as .*{TARGET}"):
        compile(recipe, store, start=START, out=tmp_path / "out")


def test_results_in_the_store_and_a_store_in_the_results_are_refused(store: Store, folder: Path) -> None:
    with pytest.raises(RecipeError, match=f"{TARGET}: overlaps with the store {store.root}"):
        run(store, store.root / "objects")
    with pytest.raises(RecipeError, match="overlaps with the store"):
        run(Store(folder / "store"), folder.parent)


def test_names_that_are_no_utf_8_are_kept(store: Store, folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))
    odd.write_text("mine")
    run(store, folder.parent, 2)
    assert odd.read_text() == "mine"


def killed(place: int, store: Store, out: Path, number: int) -> bool:
    """Run in a process of its own; return True if it was killed before its `place`-th change of files at the end."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    left = place

    def counted(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def counting(*args: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **options)

        setattr(owner, name, counting)

    def begin(event: StepEvent) -> None:
        if (event.place.position, event.status) in ((2, "done"), (2, "hit")):
            for name in ("mkdir", "link", "rename", "unlink", "rmdir", "chmod", "open"):
                counted(os, name)
            counted(replacement, "_exchanged")

    try:
        run(store, out, number, on_step=begin)
        os._exit(0)
    finally:
        os._exit(1)


needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes that were forked")


@needs_fork
def test_a_kill_at_any_moment_leaves_old_or_new_results_and_all_files_of_the_user(store: Store, folder: Path) -> None:
    place = 1
    while killed(place, store, folder.parent, 2):
        is_whole(folder, 1, 2)
        run(store, folder.parent, 1)
        is_whole(folder, 1)
        assert os.listdir(folder.parent) == [TARGET]
        place += 1
    assert place > 40
    is_whole(folder, 2)


@needs_fork
def test_one_kill_after_the_other_leaves_nothing_but_results_and_files_of_the_user(store: Store, folder: Path) -> None:
    place, number = 1, 2
    while killed(place, store, folder.parent, number):
        is_whole(folder, *range(1, number + 1))
        place, number = place + 4, number + 1
    is_whole(folder, number)
    assert os.listdir(folder.parent) == [TARGET]


@needs_fork
def test_where_folders_cannot_be_exchanged_the_next_run_brings_back_what_a_kill_left(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "_exchanged", lambda a, b: False)
    places = iter(range(1, 1000, 2))
    while killed(next(places), store, folder.parent, 2):
        run(store, folder.parent, 1)
        is_whole(folder, 1)
        assert os.listdir(folder.parent) == [TARGET]


def test_the_older_folder_comes_back_where_the_new_one_cannot_be_renamed(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "_exchanged", lambda a, b: False)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == replacement.WHOLE:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StoreError, match=r"cannot be written \(Device or resource busy\): it is unchanged"):
        run(store, folder.parent, 2)
    is_whole(folder, 1)
    assert os.listdir(folder.parent) == [TARGET]


def test_without_second_names_of_files_they_are_moved(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    run(store, folder.parent, 2)
    is_whole(folder, 2)


def test_folders_beside_the_results_that_no_run_made_are_not_touched(store: Store, folder: Path) -> None:
    for name in (f".{TARGET}.new", f".{TARGET}.old", f".{TARGET}.intaglio-mine"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "precious.txt").write_text("precious")
    run(store, folder.parent, 2)
    is_whole(folder, 2)
    assert len(list(folder.parent.glob(".*/precious.txt"))) == 3


def test_a_delivered_name_that_is_no_utf_8_is_named_and_the_older_results_stay(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Text, "save", lambda self, root: Path(root, os.fsdecode(b"caf\xe9.txt")).write_text("1"))
    with pytest.raises(RecipeError, match=r"SUM: would deliver caf\\udce9\.txt, a name that is no UTF-8"):
        run(store, folder.parent, 2)
    is_whole(folder, 1)
    assert os.listdir(folder.parent) == [TARGET]
