"""Files by anyone are opened in one way: regular, bounded, in UTF-8."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from intaglio.pipeline.errors import RecipeError, StoreError
from intaglio.pipeline.files import checked_file, printable, read_bytes, read_json, read_json_object, read_text


def test_a_file_up_to_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"1234")
    assert read_bytes(file, most=4) == b"1234"
    with pytest.raises(RecipeError, match=r"a\.bin: has 4 bytes, the most that is read is 3"):
        read_bytes(file, most=3)


def test_a_sparse_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(RecipeError, match="1073741824 bytes"):
        read_text(tmp_path / "big", most=1 << 20)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_fifo, _device, _folder, _circle, lambda path: None])
def test_what_is_no_regular_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "it.json")
    with pytest.raises(RecipeError, match=r"it\.json: (is not a regular file|is a folder|cannot be read)"):
        read_json(tmp_path / "it.json")
    with pytest.raises(StoreError, match=r"it\.json"):
        checked_file(tmp_path / "it.json", error=StoreError)


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "private.txt").write_text("only mine")
    (tmp_path / "model/a.txt").write_text("a")
    (tmp_path / "model/out.txt").symlink_to(tmp_path / "private.txt")
    (tmp_path / "model/in.txt").symlink_to("a.txt")
    assert read_text(tmp_path / "model/in.txt", most=10, inside=tmp_path / "model") == "a"
    with pytest.raises(RecipeError, match=r"out\.txt: is a link out of"):
        read_text(tmp_path / "model/out.txt", most=10, inside=tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff{}", "is not text in UTF-8: invalid start byte at byte 0"),
        (b"{", r"is not JSON: Expecting property name enclosed in double quotes \(line 1, column 2\)"),
        (b"[" * 100_000, "lists and objects are nested too deep in each other"),
        (b"1" * 5000, "a number with more than 4300 digits"),
    ],
)
def test_json_that_is_none_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(RecipeError, match=r"it\.json: " + said):
        read_json(tmp_path / "it.json")


def test_a_list_is_no_json_object(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text("[1]")
    with pytest.raises(RecipeError, match=r"it\.json: holds a list where a JSON object is expected"):
        read_json_object(tmp_path / "it.json")


def test_control_characters_are_printed_as_escapes() -> None:
    assert printable("a\x1b]0;t\x07\n\udce9é") == r"a\x1b]0;t\x07\n\udce9é"
