"""Find the files of a model that may come from anywhere, and read the sizes in their headers."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.files import MIB, checked_file, one_line, open_safetensors, printable, read_json_object
from intaglio.pipeline.handed_over import copy_weights

STEM = "diffusion_pytorch_model"
"""File name that diffusers gives to the weights of a model."""
STEMS = (STEM, "model")
"""File names of weights in diffusers and in transformers."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FOREIGN = (*PICKLED, "*.msgpack", "*.h5", "*.onnx*", "*.py")
"""Patterns of files of a model that are not read."""
MOST_COMPONENTS = 64
"""Largest number of a pipeline's folders that a message names."""
OTHER_MODELS = {
    "controlnets": "name the folder of the UNet or transformer that it controls, and record the control inputs"
    " with intaglio.record",
    "autoencoders": "name the folder of the whole pipeline, and compile what is around the denoiser with it",
}
"""Advice for a model of one of these packages of diffusers."""
MOST_VOCABULARY = 256 * MIB
"""Largest size in bytes of a file beside a component's weights, such as its tokens."""
MOST_SETTING = 10**5
"""Largest whole number in a scheduler's settings: a scheduler keeps tables of that length."""


class TensorPlace(NamedTuple):
    """One tensor of a model's files, as the header of its file declares it; `dtype` in safetensors' words."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class ModelSize(NamedTuple):
    """Number of tensors of a model, and number of values in all of them."""

    tensors: int
    elements: int


@dataclass(frozen=True)
class Weights:
    """The weights of one model in safetensors: one file, or an index and its shards."""

    folder: Path
    stem: str
    index: str | None
    files: tuple[str, ...]
    variant: str | None
    """`fp16` if the folder holds only weights saved under that variant; None for plain weights."""
    inside: Path
    shards: Mapping[str, str] | None = None
    """File of every tensor, as the index declares it; None without an index."""

    @cached_property
    def places(self) -> tuple[TensorPlace, ...]:
        """Return every tensor of the model; with an index, only those that it names: diffusers reads no others.

        Raises RecipeError for a file that is no safetensors file, for a link that leads out of the model, for a tensor
        that two files hold, and for one that is not in the file that the index names.
        """
        found: dict[str, TensorPlace] = {}
        for file in (self.folder / name for name in self.files):
            with open_safetensors(file, inside=self.inside) as opened:
                for name in opened.keys():  # noqa: SIM118  # no dict
                    if name in found:
                        raise RecipeError(
                            f"{printable(self.folder)}: both {found[name].file.name} and {file.name} hold"
                            f" {printable(name)}: they are not of one model: download the model again"
                        )
                    part = opened.get_slice(name)
                    found[name] = TensorPlace(name, file, tuple(part.get_shape()), part.get_dtype())
        if self.shards is None:
            return tuple(found.values())
        lost = [name for name, file in self.shards.items() if name not in found or found[name].file.name != file]
        if lost:
            raise RecipeError(
                f"{printable(self.folder / str(self.index))}: {len(lost)} of {len(self.shards)} tensors are not in the"
                f" files that it names, such as {printable(lost[0])}, which is not in"
                f" {printable(self.shards[lost[0]])}: download the model again"
            )
        return tuple(place for name, place in found.items() if name in self.shards)

    @property
    def size(self) -> ModelSize:
        """Return the size that the headers declare. Raises RecipeError as `places` does."""
        return ModelSize(len(self.places), sum(math.prod(place.shape) for place in self.places))

    def copy(self, to: Path) -> None:
        """Copy the weights under their plain names: without a variant in the name of the index or of the only file.

        Raises OSError, before anything is written, if the disk has too little room.
        """
        plain = {name: f"{self.stem}.safetensors" if self.index is None else name for name in self.files}
        copy_weights((checked_file(self.folder / name, inside=self.inside), to / plain[name]) for name in self.files)
        if self.index is not None:
            source = checked_file(self.folder / self.index, inside=self.inside)
            shutil.copyfile(source, to / f"{self.stem}.safetensors.index.json")


def boundary(folder: Path) -> Path:
    """Return the folder that a model's links must stay in: its own, or its repository's in the hub's cache.

    In that cache, a snapshot's files are links to `../../blobs`.
    """
    resolved = folder.resolve()
    around = (resolved, *resolved.parents)
    caches = (each for each in around if re.fullmatch("models--.+", each.name) and (each / "blobs").is_dir())
    return next(caches, resolved)


def find_weights(folder: Path, inside: Path, stems: Collection[str] = (STEM,)) -> Weights | None:
    """Return the weights that diffusers reads from a model's folder, or None if there are none.

    Plain weights come first, then the only variant. Raises RecipeError for several variants without plain weights,
    and for a file that is no index.
    """
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    for stem in stems:
        found = {variant: name for name in names if (variant := _variant(name, stem)) is not None}
        # diffusers prefers an index to a file, so an index replaces it here
        found |= {v: name for name in names if name.endswith(".json") and (v := _variant(name, stem)) is not None}
        if not found:
            continue
        if "" not in found and len(found) > 1:
            raise RecipeError(
                f"model: {printable(folder)} holds the variants {', '.join(sorted(found))} and no plain weights:"
                " keep one of them"
            )
        variant = "" if "" in found else next(iter(found))
        name = found[variant]
        if not name.endswith(".json"):
            return Weights(folder, stem, None, (name,), variant or None, inside)
        shards = _shards(folder / name, inside)
        return Weights(folder, stem, name, tuple(sorted({*shards.values()})), variant or None, inside, shards)
    return None


def _variant(name: str, stem: str) -> str | None:
    """Return the variant of a weight file or index: empty for plain weights, None for any other file."""
    found = re.fullmatch(
        rf"{stem}(?:\.(?P<file>\w+))?\.safetensors(?:\.index(?:\.(?P<index>\w+))?\.json)?", name, re.ASCII
    )
    return None if found is None else found["file"] or found["index"] or ""


def _shards(index: Path, inside: Path) -> Mapping[str, str]:
    """Return the file of every tensor that an index names.

    Raises RecipeError if the index names none, or a file that is not beside it.
    """
    placed = read_json_object(index, inside=inside).get("weight_map")
    shards = {name: str(file) for name, file in placed.items()} if isinstance(placed, dict) else {}
    if not shards:
        raise RecipeError(f"{printable(index)}: has no weight_map that names the files of the weights")
    for name in sorted({*shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise RecipeError(f"{printable(index)}: names {printable(name)!r}, which is no safetensors file beside it")
        if not os.path.lexists(index.parent / name):
            raise RecipeError(f"{printable(index)}: names {name}, which is not beside it: download the model again")
    return shards


def pickled(folder: Path) -> list[str]:
    """Return the names of pickled weight files, which are never read: unpickling can run foreign code."""
    return sorted(each.name for each in folder.iterdir() if any(fnmatch(each.name, kind) for kind in PICKLED))


def copy_model(folder: Path, to: Path, inside: Path) -> None:
    """Copy the files of one component of a pipeline: settings, vocabularies, and its weights in safetensors.

    Subfolders, files that are not regular, links out of `inside` and names that are not UTF-8 are left out: no loader
    of diffusers or transformers asks for them. Raises RecipeError for weights that cannot be read.
    """
    to.mkdir(parents=True)
    for each in sorted(folder.iterdir()):
        weights = each.name.endswith(".safetensors") or ".safetensors.index." in each.name
        foreign = any(fnmatch(each.name, kind) for kind in FOREIGN)
        if weights or foreign or not each.is_file() or each.name != printable(each.name):
            continue
        if each.resolve().is_relative_to(inside):
            shutil.copyfile(checked_file(each, most=MOST_VOCABULARY), to / each.name)
    if (found := find_weights(folder, inside, STEMS)) is not None:
        found.copy(to)


def check_settings(file: Path, inside: Path) -> None:
    """Raise RecipeError if a whole number in a scheduler's settings is larger than MOST_SETTING."""
    for name, value in read_json_object(file, inside=inside).items():
        if isinstance(value, int) and abs(value) > MOST_SETTING:
            raise RecipeError(
                f"{printable(file)}: {printable(name)} is {value}, but at most {MOST_SETTING} is accepted"
            )


@contextmanager
def blamed(origin: str, called: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn each exception inside into a RecipeError of one line that names `origin`, a file or model of the user.

    `called` maps paths in the message to the names that replace them. Errors of intaglio pass unchanged.
    """
    try:
        yield
    except IntaglioError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may exit the process
        text = one_line(error)
        for path, name in (called or {}).items():
            text = text.replace(path, name)
        raise RecipeError(f"model: {origin} raised {type(error).__name__}: {text}") from error


def class_of(name: object, kind: type) -> Any:
    """Return the diffusers class of this name. Raises RecipeError if there is none of that kind."""
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise RecipeError(
            f"model: diffusers {diffusers.__version__} has no {kind.__name__} {one_line(name)[:80]}, which the model's"
            " configuration names as its _class_name: install the version of diffusers that wrote the model"
        )
    return found


def is_listed(name: object) -> bool:
    """Return True if diffusers lists a model of this name. It is not imported for it, which takes seconds."""
    found = find_spec("diffusers")
    if found is None or found.origin is None:
        return False
    return f'"{name}"' in Path(found.origin).with_name("models").joinpath("__init__.py").read_text(encoding="utf-8")


def other_model(name: str) -> str | None:
    """Return advice for a diffusers model that is no denoiser; None for a denoiser."""
    import diffusers

    found = getattr(diffusers, name, None)
    place = str(getattr(found, "__module__", "")).split(".")
    if place[:2] != ["diffusers", "models"]:
        return None
    return OTHER_MODELS.get(place[2])


def no_denoiser(folder: Path) -> str:
    """Describe the contents of a folder without a denoiser, and give advice."""
    single = sorted(each.name for each in folder.glob("*.safetensors"))
    if single:
        return f"holds no denoiser's folder, but {printable(single[0])}: {single_file_cure(printable(single[0]))}"
    kinds = {}
    for config in sorted(folder.glob("*/config.json"))[:MOST_COMPONENTS]:
        with suppress(RecipeError):
            if isinstance(kind := read_json_object(config, inside=boundary(folder)).get("_class_name"), str):
                kinds[printable(config.parent.name)] = printable(kind)
    there = f", there is {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}" if kinds else ""
    return (
        "holds no denoiser: none of transformer/config.json, unet/config.json, ./config.json names a diffusers"
        f" class{there}"
    )


def single_file_cure(path: str) -> str:
    """Explain how to convert a single-file checkpoint into a folder."""
    return (
        "convert it with the diffusers pipeline that it belongs to, such as"
        f" StableDiffusionPipeline.from_single_file({path!r}).save_pretrained(...)"
    )
