"""Files by anyone are opened in one way: regular, bounded, in UTF-8."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from intaglio.pipeline.errors import RecipeError, StoreError
from intaglio.pipeline.files import (
    OPTIONAL,
    checked_file,
    damage_of,
    load_tensors,
    open_safetensors,
    printable,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    read_typed,
    write_typed,
)


def test_a_file_up_to_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"1234")
    assert read_bytes(file, most=4) == b"1234"
    with pytest.raises(RecipeError, match=r"a\.bin: has 4 bytes: at most 3 are read"):
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


@dataclass(frozen=True)
class _Point:
    name: str
    at: tuple[int, ...]
    weight: float = 1.0


def test_a_typed_file_gives_the_dataclass_and_whole_numbers_where_fractions_are_meant(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('{"a": {"name": "a", "at": [1, 2], "weight": 3}}')
    assert read_typed(tmp_path / "it.json", dict[str, _Point]) == {"a": _Point("a", (1, 2), 3.0)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "Input should be an object"),
        ("null", "Input should be an object"),
        ("", "Invalid JSON: EOF while parsing a value"),
        ('{"a": {}}', "a: name: is missing; a: at: is missing"),
        ('{"a": {"name": 1, "at": []}}', "a: name: Input should be a valid string"),
        ('{"a": {"name": "a", "at": ["1"]}}', "a: at: 0: Input should be a valid integer"),
        ('{"a": {"name": "a", "at": [1.5]}}', "a: at: 0: Input should be a valid integer"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        ('{"a": {"name": "a", "at": [' + "1" * 5000 + "]}}", "Invalid JSON: number out of range"),
        ('{"\\u001b[31m": 1}', r"it.json: is damaged: \\x1b\[31m: Input should be"),
    ],
)
def test_a_typed_file_of_other_types_is_refused_by_its_name_and_place(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(RecipeError, match=said) as raised:
        read_typed(tmp_path / "it.json", dict[str, _Point])
    assert "it.json" in str(raised.value)


@dataclass(frozen=True)
class _Four:
    a: int
    b: int
    c: int
    d: int


def test_places_beyond_the_third_are_counted(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"a: is missing; b: is missing; c: is missing; and 1 more$"):
        read_typed(tmp_path / "it.json", _Four)


def test_a_list_is_read_up_to_its_first_wrong_element(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(json.dumps(["1"] * 1_000_000))
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"it\.json: is damaged: 0: Input should be a valid integer$"):
        read_typed(tmp_path / "it.json", list[int])
    assert time.process_time() - began < 2


@pytest.mark.parametrize("read", [read_json, lambda file: read_typed(file, list[int])])
def test_more_values_than_are_read_are_refused_before_any_is_made(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "it.json").write_text("[" + "0," * 2_000_001 + "0]")
    with pytest.raises(RecipeError, match=r"it\.json: holds up to 2000002 values: at most 2000000 are read"):
        read(tmp_path / "it.json")


def test_what_a_damaged_file_makes_of_the_code_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.json: is damaged: 'scale' is missing"), damage_of(tmp_path / "a.json"):
        {}["scale"]


def _safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "length", "said"),
    [
        (b"{}", 1 << 60, "its header would have 1152921504606846976 bytes: at most 16777216 are read"),
        (b"{}", 30, "invalid header length"),
        (b"[]", None, "invalid JSON in header"),
        (b'{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4]}}', None, "for tensor"),
        (b'{"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}', None, "Dtype not understood: F6_E2M3"),
    ],
)
def test_a_safetensors_file_that_lies_is_named(header: bytes, length: int | None, said: str, tmp_path: Path) -> None:
    file = _safetensors(tmp_path / "a.safetensors", header, length, b"\0" * (3 if b"F6" in header else 4))
    with pytest.raises(RecipeError, match=rf"a\.safetensors: is not a safetensors file: .*{said}"):
        load_tensors(file)


def test_tensors_and_their_names_are_read_of_regular_files_alone(tmp_path: Path) -> None:
    header = b'{"__metadata__": {"by": "me"}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}'
    file = _safetensors(tmp_path / "a.safetensors", header, data=b"\1\2")
    assert load_tensors(file)["a"].tolist() == [1, 2]
    with open_safetensors(file, framework="np") as opened:
        assert (list(opened.keys()), opened.metadata()) == (["a"], {"by": "me"})
    os.mkfifo(tmp_path / "b.safetensors")
    with pytest.raises(RecipeError, match=r"b\.safetensors: is not a regular file"):
        load_tensors(tmp_path / "b.safetensors")


@dataclass(frozen=True)
class Saved:
    a: float
    b: Annotated[int | None, OPTIONAL] = None
    c: tuple[int, ...] = ()


@dataclass(frozen=True)
class Whole(Saved):
    data: bytes = field(default=b"", kw_only=True)


def test_a_file_has_the_fields_of_the_named_class_and_optional_ones_where_they_say_something(tmp_path: Path) -> None:
    write_typed(tmp_path / "a.json", Whole(0.5, data=b"1"), Saved, indent=None)
    write_typed(tmp_path / "b.json", Whole(0.5, 0, (1,)), Saved, indent=None)
    assert (tmp_path / "a.json").read_bytes() == b'{"a": 0.5, "c": []}\n'
    assert (tmp_path / "b.json").read_bytes() == b'{"a": 0.5, "b": 0, "c": [1]}\n'
    assert read_typed(tmp_path / "a.json", Saved) == Saved(0.5)
    assert read_typed(tmp_path / "b.json", Saved) == Saved(0.5, 0, (1,))


def test_a_field_with_a_default_may_be_missing_where_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 0.5}')
    assert read_typed(tmp_path / "a.json", Saved) == Saved(0.5)
    with pytest.raises(RecipeError, match=r"a\.json: is damaged: c: is missing$"):
        read_typed(tmp_path / "a.json", Saved, may_lack=("b",))
