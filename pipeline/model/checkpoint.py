"""Open the model that is compiled: a diffusers folder, a hub id, or a factory in a Python file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue

from intaglio.pipeline.errors import RecipeError, StoreError
from intaglio.pipeline.files import checked_file, one_line, printable, read_json_object, read_typed, write_typed
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.handed_over import copy_weights
from intaglio.pipeline.machine import machine_bytes
from intaglio.pipeline.model.configuration import check_float
from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.hub import download
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.lora import find_lora
from intaglio.pipeline.model.model_files import (
    ModelSize,
    Weights,
    blamed,
    boundary,
    check_settings,
    class_of,
    find_weights,
    is_listed,
    no_denoiser,
    other_model,
    pickled,
    single_file_cure,
)
from intaglio.pipeline.model.prepared import plain_weights_, prepare_, split_
from intaglio.pipeline.model.received import (
    call_copied_factory,
    call_factory,
    check_other_size,
    check_sample_shape,
    class_count,
    configured_shape,
)
from intaglio.pipeline.model.ref import ModelRef

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.recording import Recording
    from intaglio.pipeline.model.scheduler import Scheduler

SCHEDULER = "scheduler_config.json"
FEW = 0.25
"""Share of the machine's memory that weights in float32 may take: some steps hold a second, rounded model."""
STORED = "model"
"""Path of a model that is a copy in the store."""


@dataclass(frozen=True)
class _CheckpointFacts:
    """The content of checkpoint.json: the fields of the model's `ModelRef` except its path, and the entry."""

    ref: Mapping[str, JsonValue]
    entry: str


@dataclass(frozen=True)
class Checkpoint:
    """A model's files in a folder of their own, with its sampling settings. Nothing outside the folder is read."""

    root: Path
    ref: ModelRef
    entry: str = field(default="")
    """`file.py:factory` inside `root`, or empty for a diffusers folder."""
    recordings: Mapping[str, Path] = field(default_factory=dict)
    """Files of recorded conditions, by the field of `ref` that names them."""
    loras: tuple[Path, ...] = ()
    """Files of `ref.loras`."""

    @classmethod
    def resolve(cls, ref: ModelRef, base: Path) -> Checkpoint:
        """Find the model that a recipe in `base` names. Raises RecipeError if it does not exist or is no model."""
        try:
            return cls._resolved(ref, base)
        except (OSError, RuntimeError) as e:  # a name too long, no permission, links in a circle
            raise RecipeError(f"model: {one_line(ref.path)[:200]} cannot be read: {one_line(e.args[-1])[:200]}") from e

    @classmethod
    def _resolved(cls, ref: ModelRef, base: Path) -> Checkpoint:
        from intaglio.pipeline.model.recording import Recording

        named = {"conditions": ref.conditions, "other_size": ref.other_size}
        recordings = {role: (base / name).resolve() for role, name in named.items() if isinstance(name, str)}
        for role, path in recordings.items():
            if not path.exists():
                raise RecipeError(f"model: no file {named[role]} beside the recipe")
            Recording.check(path)
        loras = tuple(find_lora(lora.path, base) for lora in ref.loras)
        return replace(cls._find(ref, base), recordings=recordings, loras=loras)

    @classmethod
    def _find(cls, ref: ModelRef, base: Path) -> Checkpoint:
        if ref.path.startswith("hub:"):
            return cls._of_folder(download(ref.path, ref.folders), ref)
        file, colon, _ = ref.path.partition(":")
        if colon and file.endswith(".py"):
            path = (base / file).resolve()
            if not path.is_file():
                raise RecipeError(f"model: no file {file} beside the recipe")
            if ref.subfolder is not None:
                raise RecipeError("model.subfolder: only a diffusers folder has one: remove it, or name a folder")
            return cls(path.parent, ref, f"{path.name}:{ref.path.rpartition(':')[2]}")
        folder = base / ref.path
        if folder.is_file():
            raise RecipeError(f"model: {ref.path} is one file, and a folder is needed: {single_file_cure(ref.path)}")
        if not folder.is_dir():
            raise RecipeError(
                f"model: no folder {ref.path} beside the recipe: "
                "give a diffusers folder, `./file.py:factory` or `hub:owner/name`"
            )
        return cls._of_folder(folder.resolve(), ref)

    @classmethod
    def _of_folder(cls, folder: Path, ref: ModelRef) -> Checkpoint:
        found = cls(folder, ref)
        denoiser = found._denoiser_folder
        if denoiser is None and ref.subfolder is not None:
            raise RecipeError(f"model.subfolder: {ref.path} has no {ref.subfolder}/config.json of a diffusers class")
        if denoiser is None:
            raise RecipeError(f"model: {ref.path} {no_denoiser(folder)}")
        if denoiser == folder / "." and (advice := other_model(found.name)) is not None:
            raise RecipeError(f"model: {ref.path} is a {printable(found.name)}, which is no denoiser: {advice}")
        check_float(found.config(), denoiser / "config.json")
        if not is_listed(found.config()["_class_name"]):
            _ = found._diffusers_class()  # reports a class that is no model
        weights = found._weights
        if weights is not None:
            _ = weights.size  # reports damaged files and outside links now, with the user's path
        elif others := pickled(denoiser):
            raise found._no_weights(others)
        if (settings := folder / "scheduler" / SCHEDULER).is_file():
            check_settings(settings, found._inside)
        return found

    @cached_property
    def _inside(self) -> Path:
        """Folder that links of the model's files must stay in."""
        return boundary(self.root)

    @cached_property
    def _denoiser_folder(self) -> Path | None:
        for name in self.ref.folders:
            config = self.root / name / "config.json"
            if (config.is_file() or config.is_symlink()) and "_class_name" in self._read(config):
                return self.root / name
        return None

    def _read(self, file: Path) -> dict[str, object]:
        return read_json_object(file, inside=self._inside)

    @cached_property
    def _weights(self) -> Weights | None:
        """Return the weights of a folder's denoiser."""
        assert self._denoiser_folder is not None  # `resolve` checked it
        return find_weights(self._denoiser_folder, self._inside)

    def _no_weights(self, others: Sequence[str]) -> RecipeError:
        folder = self._denoiser_folder
        save = f"diffusers.{self.name}.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained(...)"
        only = f"the folder holds {', '.join(others[:3])}: save the weights as safetensors with {save}"
        advice = only if others else "download the model again"
        return RecipeError(f"model: no safetensors in {folder}, and no other weights are read: {advice}")

    def config(self) -> dict[str, object]:
        """Return the configuration of a folder's denoiser. Raises RecipeError if the file holds none."""
        assert self._denoiser_folder is not None  # `resolve` checked it
        return self._read(self._denoiser_folder / "config.json")

    @property
    def place(self) -> str:
        """Name of the pipeline's component that the denoiser is; empty for a folder of its own or a factory."""
        folder = None if self.entry else self._denoiser_folder
        return "" if folder is None or folder == self.root / "." else folder.name

    @property
    def name(self) -> str:
        """Name of the denoiser's diffusers class, or `file.py:factory`."""
        if self.entry:
            return self.entry
        return self.root.name if self._denoiser_folder is None else str(self.config()["_class_name"])

    def save(self, root: Path) -> None:
        """Copy the denoiser and its scheduler, or the factory's file, and what the recipe names beside them.

        A factory's weights are copied if they lie beside its file under the same name: model.py, model.safetensors.
        """
        files = root / "model"
        if self.entry:
            files.mkdir()
            name = self.entry.partition(":")[0]
            shutil.copyfile(checked_file(self.root / name), files / name)
            weights = (self.root / name).with_suffix(".safetensors")
            if weights.is_file():
                copy_weights([(checked_file(weights), files / weights.name)])
        else:
            self._save_folder(files)
        for role, path in self.recordings.items():
            shutil.copyfile(checked_file(path), files / f"{role}.safetensors")
        named: dict[str, object] = {role: f"{role}.safetensors" for role in self.recordings}
        if self.loras:
            copies = [f"lora.{position}.safetensors" for position in range(len(self.loras))]
            named["loras"] = [{"path": n, "scale": lora.scale} for n, lora in zip(copies, self.ref.loras, strict=True)]
            for copy, path in zip(copies, self.loras, strict=True):
                shutil.copyfile(checked_file(path), files / copy)
        ref = self.ref.model_dump(mode="json", exclude={"path", "loras"}) | named
        write_typed(root / "checkpoint.json", _CheckpointFacts(ref, self.entry), _CheckpointFacts)

    def _save_folder(self, files: Path) -> None:
        """Copy the files of a diffusers folder that are read, settings and weights, and no others."""
        folder = self._denoiser_folder
        assert folder is not None  # `resolve` checked it
        if self._weights is None:
            raise self._no_weights(pickled(folder))
        place = files if folder == self.root / "." else files / folder.name
        place.mkdir(parents=True)
        shutil.copyfile(checked_file(folder / "config.json", inside=self._inside), place / "config.json")
        self._weights.copy(place)
        settings = self.root / "scheduler" / SCHEDULER
        if settings.parent.is_dir():
            (files / "scheduler").mkdir()
            shutil.copyfile(checked_file(settings, inside=self._inside), files / "scheduler" / SCHEDULER)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        facts = read_typed(root / "checkpoint.json", _CheckpointFacts, error=StoreError)
        files, ref = root / "model", ModelRef.model_validate({**facts.ref, "path": STORED})
        recordings = {role: files / f"{role}.safetensors" for role in ("conditions", "other_size")}
        there = {role: path for role, path in recordings.items() if path.is_file()}
        return cls(files, ref, facts.entry, there, tuple(files / lora.path for lora in ref.loras))

    def open(self, *, weights: bool = True, stored: bool | None = None) -> DenoiserModel:
        """Return the denoiser in float32 and evaluation mode, its LoRAs fused, and how it is sampled.

        Without `weights`, the denoiser is on torch's meta device and no weights are read. `stored`: larger weights of a
        folder stay in their files, and are read each time that they are used; they cannot be trained or changed. None:
        they stay there if all weights in float32 would take more than the share FEW of the machine's memory. Raises
        RecipeError if the recipe leaves out something that the denoiser needs.
        """
        from intaglio.pipeline.model.form_search import formed
        from intaglio.pipeline.model.recording import Recording

        recorded = {role: Recording.load(path) for role, path in self.recordings.items()}
        usual, other = recorded.get("conditions"), recorded.get("other_size")
        made = self._call_factory() if self.entry else self._open_folder(usual, weights, stored)
        prepare_(made.module, self._scaled_loras, weights=weights)
        if usual is not None:
            made = usual.given_to(made)
        if other is not None:
            made = replace(made, other=SecondSize(other.sample_shape, other.conditions, other.shared))
        elif isinstance(self.ref.other_size, tuple):
            check_other_size(self.ref.other_size, made.sample_shape)
            made = replace(made, other=SecondSize(self.ref.other_size))
        _ = made.names  # reports missing inputs now, before anything runs
        return formed(made, self.ref.sampling_steps)

    def stored_module(self) -> nn.Module:
        """Return the module of a folder as `open(stored=True)` does, but call nothing. Raises RecipeError likewise."""
        module: nn.Module = self._weighed(stored=True).eval()
        prepare_(module, self._scaled_loras)
        return module

    @property
    def _scaled_loras(self) -> tuple[tuple[Path, float], ...]:
        return tuple((path, lora.scale) for lora, path in zip(self.ref.loras, self.loras, strict=True))

    def layers(self) -> tuple[Layer, ...]:
        """Return the layer table, without reading a folder's weights. Raises RecipeError as `open` does."""
        return layer_table(self.empty())

    def parameter_count(self) -> int:
        """Return the number of parameters of the denoiser. Reads and raises what `layers` does."""
        return sum(parameter.numel() for parameter in self.empty().parameters())

    @cached_property
    def stored_count(self) -> int:
        """Number of parameters that stay in the model's files with `open(stored=True)`."""
        from intaglio.pipeline.model.stored_weights import stored_count

        return 0 if self.entry or self._weights is None else stored_count(self._unfilled(), self._weights)

    def empty(self) -> nn.Module:
        """Return the denoiser, without weights if it is in a folder. Raises RecipeError as `open` does."""
        module = plain_weights_(self._call_factory().module) if self.entry else self._unfilled()
        split_(module)
        return module

    def _unfilled(self) -> nn.Module:
        """Return a folder's denoiser as its class makes it, without weights.

        Raises RecipeError if the files hold weights of other shapes or types than the denoiser's.
        """
        from intaglio.pipeline.model.empty_model import empty_model
        from intaglio.pipeline.model.stored_weights import check_fit

        empty = empty_model(self._diffusers_class(), self.config(), self._size, self._called)
        if self._weights is not None:
            check_fit(empty, self._weights, self._called)
        return plain_weights_(empty)

    @property
    def is_large(self) -> bool:
        """Return True if a folder's weights in float32 take more than the share FEW of the machine's memory.

        Raises RecipeError for weights that cannot be read.
        """
        weights = None if self.entry else self._weights
        return weights is not None and 4 * weights.size.elements > FEW * machine_bytes()

    @property
    def has_weights(self) -> bool:
        """Return True if there are weights for `open` to read, or a factory that makes the model."""
        return bool(self.entry) or self._weights is not None

    @property
    def _size(self) -> ModelSize:
        """Size of a folder's weights; without weights, the bound for any model."""
        from intaglio.pipeline.model.empty_model import ANY_MODEL

        return ANY_MODEL if self._weights is None else self._weights.size

    def _diffusers_class(self) -> Any:
        """Return the diffusers class of the denoiser."""
        import diffusers

        return class_of(self.config()["_class_name"], diffusers.ModelMixin)

    @property
    def _called(self) -> str:
        """Name of a folder's denoiser in messages: the path in the recipe, even if a copy is read."""
        return f"{self.name} of {self._place(self._denoiser_folder)}"

    def _place(self, folder: Path | None) -> str:
        assert folder is not None  # `resolve` checked it
        inner = folder.relative_to(self.root).as_posix()
        if self.ref.path == STORED:  # the copy in the store has no path of the user
            return "the model's folder" if inner == "." else f"the model's folder {inner}"
        return self.ref.path if inner == "." else f"{self.ref.path}/{inner}"

    def _open_folder(self, recording: Recording | None, weights: bool, stored: bool | None) -> DenoiserModel:
        module: Any = self._weighed(stored) if weights else self.empty()
        shape = configured_shape(module.config) if recording is None else recording.sample_shape
        check_sample_shape(shape, self._called)
        return DenoiserModel(module.eval(), self._scheduler(), tuple(shape), class_count(module))

    def _weighed(self, stored: bool | None) -> Any:
        """Return the denoiser with all its weights. Raises RecipeError if some are missing or not in safetensors."""
        import torch

        from intaglio.pipeline.model.stored_weights import fill_

        kind, folder, weights = self._diffusers_class(), self._denoiser_folder, self._weights
        assert folder is not None  # `resolve` checked it
        if weights is None:
            raise self._no_weights(pickled(folder))
        empty = self._unfilled()  # raises if the model would be much larger than its weights
        if stored is None:
            stored = self.is_large
        if stored and fill_(empty, weights):
            return empty
        settings = {"use_safetensors": True, "torch_dtype": torch.float32, "local_files_only": True}
        with blamed(self._called, {str(folder): self._place(folder)}):
            module, info = kind.from_pretrained(folder, output_loading_info=True, variant=weights.variant, **settings)
        if missing := sorted(info["missing_keys"]):
            raise RecipeError(
                f"model: {len(missing)} weights of {self.name} are not in {self._place(folder)}, such as"
                f" {printable(missing[0])}: download it again"
            )
        return module

    def _scheduler(self) -> Scheduler:
        import diffusers

        folder = self.root / "scheduler"
        if not folder.is_dir():
            return diffusers.DDIMScheduler()  # type: ignore[no-any-return]  # diffusers has no types
        origin = f"the scheduler of {self._place(folder)}"
        with blamed(origin, {str(folder): self._place(folder)}):
            settings = self._read(folder / SCHEDULER)
            kind = class_of(settings["_class_name"], diffusers.SchedulerMixin)
            return kind.from_config(settings)  # type: ignore[no-any-return]  # diffusers has no types

    def _call_factory(self) -> DenoiserModel:
        file, _, name = self.entry.partition(":")
        call = call_copied_factory if self.ref.path == STORED else call_factory
        return call(self.root / file, name)
