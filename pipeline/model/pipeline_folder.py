"""Opens a diffusers pipeline's folder around a denoiser, component by component."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import checked_file, one_line, printable, read_json_object
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.model_files import FOREIGN, boundary, copy_model
from intaglio.pipeline.model.ref import DENOISER_FOLDERS

if TYPE_CHECKING:
    from torch import nn


INDEX = "model_index.json"


LIBRARIES = ("diffusers", "transformers")


METHODS = ("forward", "encode", "decode")
"""What pipelines call of their models."""


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *FOREIGN)


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers pipeline as `save_pretrained` writes it, but for its denoiser, which is the MODEL."""

    root: Path

    @classmethod
    def around(cls, model: Checkpoint) -> PipelineFolder:
        """The folder that the model is in. Raises RecipeError where that is no pipeline's."""
        if model.entry or not (model.root / INDEX).is_file():
            raise RecipeError(
                f"model: {model.ref.path} has no {INDEX}: only a whole pipeline, as diffusers' save_pretrained"
                " writes it, has components to compile"
            )
        return cls(model.root)

    def save(self, root: Path) -> None:
        """Copy the index and the folders of all components but the denoiser."""
        inside = boundary(self.root)
        shutil.copyfile(checked_file(self.root / INDEX, inside=inside), root / INDEX)
        for name in self.classes():
            if name != self.denoiser and (self.root / name).is_dir():
                copy_model(self.root / name, root / name, inside)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        return cls(root)

    def classes(self) -> dict[str, tuple[str, str]]:
        """By component that is there, its library and its class in it."""
        return {
            name: (value[0], value[1])
            for name, value in self.index().items()
            if _is_class(value) and value[0] is not None
        }

    def absent(self) -> list[str]:
        """Components that the pipeline does without."""
        return [name for name, value in self.index().items() if _is_class(value) and value[0] is None]

    def settings(self) -> dict[str, object]:
        """What the pipeline is made with beside its components."""
        return {n: v for n, v in self.index().items() if not n.startswith("_") and not _is_class(v)}

    @property
    def denoiser(self) -> str:
        """The component that is the denoiser."""
        if (found := next((name for name in DENOISER_FOLDERS if name in self.classes()), None)) is None:
            raise RecipeError(f"model: {INDEX} names neither a transformer nor a unet: it is of no pipeline")
        return found

    def kind(self) -> Any:
        """The pipeline's class. Raises RecipeError where diffusers has none of its name."""
        return _named("diffusers", str(self.index().get("_class_name")))

    def component_class(self, name: str) -> Any:
        """Raises RecipeError where the class is not installed."""
        library, kind = self.classes()[name]
        return _named(library, kind)

    def open(self, denoiser: nn.Module, without: Collection[str]) -> Any:
        """The pipeline in torch and float32, these components left out."""
        import torch

        given = {self.denoiser: denoiser, **dict.fromkeys(without)}
        pipe = self.kind().from_pretrained(
            self.root, **given, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def index(self) -> dict[str, Any]:
        """What the pipeline is made of."""
        index = read_json_object(self.root / INDEX, inside=boundary(self.root))
        for name, value in index.items():
            if _is_class(value) and Path(name).name != name:
                place = printable(self.root / INDEX)
                raise RecipeError(f"model: {place}: {printable(name)!r} is no name of a component: get the model again")
        return index


def _is_class(value: object) -> bool:
    """Whether an entry of an index names a library and a class, or neither; others are settings."""
    return isinstance(value, list) and len(value) == 2 and {type(each) for each in value} in ({str}, {type(None)})


def _named(library: str, kind: str) -> Any:
    """A class by the name that an index has for it: a pipeline's own models are in a module of the pipeline's name."""
    module = library if library in LIBRARIES else f"diffusers.pipelines.{library}"
    named = f"{printable(kind)} of {printable(library)}"
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError, RuntimeError) as e:  # RuntimeError: an import of diffusers' own
        raise RecipeError(f"model: {INDEX} names {named}, which is not installed here: {one_line(e)}") from e
    if not isinstance(found, type):
        raise RecipeError(f"model: {INDEX} names {named}, which is no class")
    return found


def output_class(returns: str) -> Any:
    """The class that `module:name` is. Raises RecipeError where it is not installed, or of no library of models."""
    module, _, name = returns.partition(":")
    try:
        if module.partition(".")[0] not in LIBRARIES:
            raise ImportError(f"only {' and '.join(LIBRARIES)} have outputs")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise RecipeError(f"compiled with outputs of the class {returns}, which is not here: {e}") from e


def is_generator(value: object) -> bool:
    """One of torch, or a list of them: nothing is drawn in a graph."""
    import torch

    return isinstance(value, torch.Generator) or (isinstance(value, list) and any(map(is_generator, value)))
