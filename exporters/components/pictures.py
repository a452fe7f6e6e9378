"""Read the pictures that a recipe names in the arguments of a pipeline's call."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, PrivateAttr, ValidationInfo, model_validator

from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MIB, one_line, printable, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats of Pillow that are read."""
MOST_BYTES = 64 * MIB
"""Largest size of a picture's file."""
MOST_PIXELS = 1 << 24
"""Largest number of pixels of a picture."""
TEXTS = ("prompt", "negative_prompt")
"""Beginnings of the names of arguments that are texts, even if they end as the name of a file does."""


class CallsWithPictures(Pass):
    """Pass with the arguments of a pipeline's calls, in which paths of pictures stand for the pictures.

    The digests of the pictures are part of its key.
    """

    call: Mapping[str, JsonValue] = Field(
        {},
        description="arguments of the pipeline's call, which runs its models; without `prompt`, two default prompts; a"
        " picture is given by its path relative to the recipe, such as photo.png",
    )
    other_call: Mapping[str, JsonValue] | None = Field(
        None, description="arguments that differ in a second call; axes whose size differs there become dynamic"
    )
    pictures: Mapping[str, str] = Field(
        {},
        description="expected sha256 of pictures that the calls name, by their path; any that is not given",
        exclude_if=lambda digests: not digests,
    )
    _base: Path = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _digested(cls, written: object, info: ValidationInfo) -> object:
        """Read the pictures before anything runs, and put their digests into the options."""
        if not isinstance(written, dict):
            return written
        calls = [call for name in ("call", "other_call") if isinstance(call := written.get(name), dict)]
        try:
            found = _digests(calls, _base(info.context))
        except RecipeError as error:
            raise ValueError("; ".join(error.problems)) from error
        wanted = written.get("pictures")
        for name, digest in wanted.items() if isinstance(wanted, dict) else ():
            if found.get(name) != digest:
                raise ValueError(f"{name}: its sha256 is {found.get(name)}, not {digest}")
        return {**written, "pictures": found} if found else written

    def model_post_init(self, context: Mapping[str, Path] | None) -> None:
        """Keep the folder of the recipe, which paths of pictures are relative to."""
        self._base = _base(context)

    def opened(self, call: Mapping[str, JsonValue]) -> dict[str, Any]:
        """Return the arguments of a call with RGB images of Pillow in place of the paths of pictures.

        Raises RecipeError for a file that is missing or no picture.
        """

        def read(argument: str, value: JsonValue) -> Any:
            if isinstance(value, list):
                return [read(argument, each) for each in value]
            if not _is_picture(argument, value):
                return value
            path = self._base / str(value)
            return _picture(argument, path, _content(argument, path))

        return {argument: read(argument, value) for argument, value in call.items()}


def _base(context: Mapping[str, Path] | None) -> Path:
    return (context or {}).get("base", Path())


def _digests(calls: Iterable[Mapping[str, JsonValue]], base: Path) -> dict[str, str]:
    """Return the sha256 of each picture, by its path. Raises RecipeError for a file that is missing or no picture."""
    found = {}
    for argument, name in (each for call in calls for each in _named(call)):
        content = _content(argument, base / name)
        _picture(argument, base / name, content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _named(call: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """Yield the argument and the path of each picture, also of those in lists."""
    for argument, value in call.items():
        for each in value if isinstance(value, list) else [value]:
            if _is_picture(argument, each):
                yield argument, str(each)


def _is_picture(argument: str, value: JsonValue) -> bool:
    """Return True for a text that ends as the name of a picture, and is no prompt."""
    return isinstance(value, str) and value.lower().endswith(SUFFIXES) and not argument.startswith(TEXTS)


def _content(argument: str, path: Path) -> bytes:
    try:
        return read_bytes(path, most=MOST_BYTES)
    except RecipeError as error:
        raise RecipeError(*(f"{argument}: {problem}" for problem in error.problems)) from error


def _eight_bits(image: Any) -> Any:  # images of Pillow
    """Return gray values of 16 bits in 8 bits, which Pillow would cut off at 255 instead; other images as they are."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def _picture(argument: str, path: Path, content: bytes) -> Any:  # an image of Pillow
    """Return a picture in RGB, upright. Raises RecipeError for content that is no picture, or one too large."""
    from PIL import Image, ImageOps

    place = f"{argument}: {printable(path)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on damaged metadata
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height <= MOST_PIXELS:
                return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # Pillow raises any exception for a damaged file
        raise RecipeError(
            f"{place}: is no picture that can be read ({one_line(error)}): give a PNG, JPEG, WebP or BMP file"
        ) from error
    raise RecipeError(f"{place}: has {width} x {height} pixels, and at most {MOST_PIXELS:,} are read: make it smaller")
