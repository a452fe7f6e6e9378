"""Open a diffusers pipeline's folder around a denoiser, component by component."""

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
"""Methods of their models that pipelines call."""


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *FOREIGN)


@dataclass(frozen=True)
class PipelineFolder:
    """Folder of a diffusers pipeline as `save_pretrained` writes it; the MODEL is its denoiser, or one of them."""

    root: Path

    @classmethod
    def around(cls, model: Checkpoint) -> PipelineFolder:
        """Return the folder that holds the model. Raises RecipeError if it is no pipeline's folder."""
        if model.entry or not (model.root / INDEX).is_file():
            raise RecipeError(
                f"model: {model.ref.path} has no {INDEX}: only a whole pipeline, as diffusers' save_pretrained"
                " writes it, has components to compile"
            )
        return cls(model.root)

    def save(self, root: Path) -> None:
        """Copy the index and the folders of all components but the denoisers."""
        inside = boundary(self.root)
        shutil.copyfile(checked_file(self.root / INDEX, inside=inside), root / INDEX)
        for name in self.classes():
            if name not in self.denoisers and (self.root / name).is_dir():
                copy_model(self.root / name, root / name, inside)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        return cls(root)

    def classes(self) -> dict[str, tuple[str, str]]:
        """Return the library and the class of each component that is there, by name."""
        return {
            name: (value[0], value[1])
            for name, value in self.index().items()
            if _is_class(value) and value[0] is not None
        }

    def absent(self) -> list[str]:
        """Return the names of components that the pipeline does without."""
        return [name for name, value in self.index().items() if _is_class(value) and value[0] is None]

    def settings(self) -> dict[str, object]:
        """Return the arguments of the pipeline that are no components."""
        return {n: v for n, v in self.index().items() if not n.startswith("_") and not _is_class(v)}

    @property
    def denoiser(self) -> str:
        """Name of the component that is the denoiser."""
        if (found := next((name for name in DENOISER_FOLDERS if name in self.classes()), None)) is None:
            raise RecipeError(f"model: {INDEX} names neither a transformer nor a unet: it is no index of a denoiser")
        return found

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Names of the components of the denoiser's class: one, or several that share the steps of a sample."""
        kinds = self.classes()
        return tuple(name for name, kind in kinds.items() if kind == kinds[self.denoiser])

    def kind(self) -> Any:
        """Return the pipeline's class. Raises RecipeError if diffusers has no class of its name."""
        return _named("diffusers", str(self.index().get("_class_name")))

    def component_class(self, name: str) -> Any:
        """Return the class of a component. Raises RecipeError if it is not installed."""
        library, kind = self.classes()[name]
        return _named(library, kind)

    def open(self, denoiser: nn.Module, without: Collection[str]) -> Any:
        """Open the pipeline in float32 with this denoiser, leaving out the components in `without`.

        The denoiser takes the place of every denoiser of the pipeline.
        """
        import torch

        given = {**dict.fromkeys(self.denoisers, denoiser), **dict.fromkeys((*self.absent(), *without))}
        pipe = self.kind().from_pretrained(
            self.root, **given, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def index(self) -> dict[str, Any]:
        """Return the content of the pipeline's index."""
        index = read_json_object(self.root / INDEX, inside=boundary(self.root))
        for name, value in index.items():
            if _is_class(value) and Path(name).name != name:
                place = printable(self.root / INDEX)
                raise RecipeError(
                    f"model: {place}: {printable(name)!r} is no name of a component: download the model again"
                )
        return index


def _is_class(value: object) -> bool:
    """Return True if an entry of an index names a library and a class, or neither; other entries are settings."""
    return isinstance(value, list) and len(value) == 2 and {type(each) for each in value} in ({str}, {type(None)})


def _named(library: str, kind: str) -> Any:
    """Return the class that an index names; a pipeline's own models are in a module of the pipeline's name."""
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
    """Return the class `module:name`. Raises RecipeError if it is not installed or its library has no models."""
    module, _, name = returns.partition(":")
    try:
        if module.partition(".")[0] not in LIBRARIES:
            raise ImportError(f"only classes of {' and '.join(LIBRARIES)} are loaded")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise RecipeError(f"compiled with outputs of the class {returns}, which cannot be imported: {e}") from e


def is_generator(value: object) -> bool:
    """Return True for a torch generator or a list of them: a graph draws no random numbers."""
    import torch

    return isinstance(value, torch.Generator) or (isinstance(value, list) and any(map(is_generator, value)))
