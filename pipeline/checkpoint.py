"""The model that is compiled: a diffusers folder, a hub id, or a factory in a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.plan import Layer

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.denoiser import Scheduler

DENOISER_FOLDERS = ("transformer", "unet", ".")


class ModelRef(BaseModel):
    """Where the model is, and how it is sampled: a recipe's `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a diffusers folder, `./file.py:factory`, or a hub id as `hub:owner/name`")
    sampling_steps: int = Field(20, ge=1, le=1000, description="denoising steps of the sampler")
    guidance: float = Field(1.0, ge=1.0, description="classifier-free guidance; 1.0 is none")


@dataclass(frozen=True)
class Factory:
    """What a model factory returns: a denoiser that is a plain nn.Module, and how to sample it.

    `module(sample, timestep[, class_labels])` returns the predicted noise, or a tuple that begins with it.
    `sample_shape` is one sample without its batch axis. `classes` counts the classes, the null class not among them.
    """

    module: nn.Module
    scheduler: Scheduler
    sample_shape: tuple[int, ...]
    classes: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model's files in a folder of their own, with its sampling settings. Nothing outside the folder is read."""

    root: Path
    ref: ModelRef
    entry: str = field(default="")
    """`file.py:factory` inside `root`, or empty for a diffusers folder."""

    @classmethod
    def resolve(cls, ref: ModelRef, base: Path) -> Checkpoint:
        """Find the model that a recipe in `base` names. Raises RecipeError when it is not there or is no model."""
        if ref.path.startswith("hub:"):
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"]
            return cls._of_folder(Path(snapshot_download(ref.path.removeprefix("hub:"), allow_patterns=patterns)), ref)
        file, colon, _ = ref.path.partition(":")
        if colon and file.endswith(".py"):
            path = (base / file).resolve()
            if not path.is_file():
                raise RecipeError(f"model: no file {file} beside the recipe")
            return cls(path.parent, ref, f"{path.name}:{ref.path.rpartition(':')[2]}")
        folder = base / ref.path
        if not folder.is_dir():
            raise RecipeError(
                f"model: no folder {ref.path} beside the recipe: "
                "give a diffusers folder, `./file.py:factory` or `hub:owner/name`"
            )
        return cls._of_folder(folder.resolve(), ref)

    @classmethod
    def _of_folder(cls, folder: Path, ref: ModelRef) -> Checkpoint:
        found = cls(folder, ref)
        if found._denoiser_folder is None:
            places = ", ".join(f"{name}/config.json" for name in DENOISER_FOLDERS)
            raise RecipeError(f"model: {ref.path} holds no denoiser: none of {places} names a diffusers class")
        return found

    @cached_property
    def _denoiser_folder(self) -> Path | None:
        for name in DENOISER_FOLDERS:
            config = self.root / name / "config.json"
            if config.is_file() and "_class_name" in json.loads(config.read_text()):
                return self.root / name
        return None

    @property
    def name(self) -> str:
        """The diffusers class of the denoiser, or `file.py:factory`."""
        if self.entry:
            return self.entry
        return self.root.name if self._denoiser_folder is None else _class_name(self._denoiser_folder)

    def save(self, root: Path) -> None:
        """Copy the denoiser and its scheduler, or the factory's file."""
        files = root / "model"
        if self.entry:
            files.mkdir()
            shutil.copy(self.root / self.entry.partition(":")[0], files)
        else:
            assert self._denoiser_folder is not None  # `resolve` made sure
            keep = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.py")
            shutil.copytree(self._denoiser_folder, files / self._denoiser_folder.name, ignore=keep)
            if (self.root / "scheduler").is_dir():
                shutil.copytree(self.root / "scheduler", files / "scheduler", ignore=keep)
        settings = {"ref": self.ref.model_dump(mode="json", exclude={"path"}), "entry": self.entry}
        (root / "checkpoint.json").write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        settings = json.loads((root / "checkpoint.json").read_text())
        return cls(root / "model", ModelRef(path="model", **settings["ref"]), settings["entry"])

    def open(self) -> Factory:
        """The denoiser in float32 and evaluation mode, its scheduler, and the shape of a sample."""
        if self.entry:
            return self._call_factory()
        import diffusers

        assert self._denoiser_folder is not None  # `resolve` made sure
        kind = getattr(diffusers, self.name, None)
        if kind is None:
            raise RecipeError(f"model: diffusers {diffusers.__version__} has no class {self.name}")
        import torch

        module = kind.from_pretrained(
            self._denoiser_folder, use_safetensors=True, torch_dtype=torch.float32, local_files_only=True
        )
        return Factory(module.eval(), self._scheduler(), _sample_shape(module.config), _class_count(module.config))

    def _scheduler(self) -> Scheduler:
        import diffusers

        folder = self.root / "scheduler"
        if not folder.is_dir():
            return diffusers.DDIMScheduler()  # type: ignore[no-any-return]  # diffusers has no types
        config = json.loads((folder / "scheduler_config.json").read_text())
        return getattr(diffusers, config["_class_name"]).from_pretrained(folder)  # type: ignore[no-any-return]  # diffusers has no types

    def _call_factory(self) -> Factory:
        file, _, name = self.entry.partition(":")
        spec = importlib.util.spec_from_file_location(f"intaglio_model_{Path(file).stem}", self.root / file)
        if spec is None or spec.loader is None:
            raise RecipeError(f"model: {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        factory: Callable[[], Factory] | None = getattr(module, name, None)
        if factory is None:
            raise RecipeError(f"model: {file} has no function {name}")
        made = factory()
        if not isinstance(made, Factory):
            raise RecipeError(f"model: {self.entry} returned a {type(made).__name__}, not an intaglio Factory")
        made.module.eval()
        return made


def layer_table(module: nn.Module) -> tuple[Layer, ...]:
    """Every Linear and every ungrouped Conv2d, in the model's own order."""
    from torch import nn

    layers = []
    for name, child in module.named_modules():
        match child:
            case nn.Linear():
                layers.append(
                    Layer(name=name, op="linear", shape=tuple(child.weight.shape), bias=child.bias is not None)
                )
            case nn.Conv2d(groups=1, padding_mode="zeros"):
                padded = any(child._reversed_padding_repeated_twice)
                shape, bias = tuple(child.weight.shape), child.bias is not None
                layers.append(Layer(name=name, op="conv", shape=shape, bias=bias, padded=padded))
    return tuple(layers)


def _class_name(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])


def _sample_shape(config: Any) -> tuple[int, ...]:  # a diffusers FrozenDict
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (config["in_channels"], height, width)


def _class_count(config: Any) -> int | None:  # a diffusers FrozenDict
    """Classes without the null class: a DiT adds one for it, a UNet counts it among its class embeddings."""
    if config.get("num_embeds_ada_norm") is not None:
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]) - 1
    return None


def input_names(module: nn.Module) -> tuple[str, str, str | None]:
    """Names of the noisy sample, the timestep and the class labels, if any, among the arguments of `forward`."""
    names = list(inspect.signature(module.forward).parameters)
    labels = "class_labels" if "class_labels" in names else None
    return names[0], "timestep" if "timestep" in names else names[1], labels
