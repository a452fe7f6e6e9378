"""The model that is compiled: a diffusers folder, a hub id, or a factory in a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.errors import IntaglioError, RecipeError, did_you_mean
from intaglio.pipeline.lora import find_lora, fuse_lora_
from intaglio.pipeline.plan import Layer
from intaglio.pipeline.prepared import own_forward, plain_weights_

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.record import Recording
    from intaglio.pipeline.scheduler import Scheduler

DENOISER_FOLDERS = ("transformer", "unet", ".")


class LoraRef(BaseModel):
    """One style LoRA, an entry of a recipe's `model.loras`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="a safetensors file as diffusers' save_lora_weights or save_lora_adapter writes it, or its folder"
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="factor of its change of the weights")


class ModelRef(BaseModel):
    """Where the model is, and how it is sampled: a recipe's `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a diffusers folder, `./file.py:factory`, or a hub id as `hub:owner/name`")
    sampling_steps: int = Field(20, ge=1, le=1000, description="denoising steps of the sampler")
    guidance: float = Field(1.0, ge=1.0, description="classifier-free guidance; 1.0 is none")
    conditions: str | None = Field(
        None,
        description="what a folder's denoiser takes beside sample and timestep: a file of intaglio.pipeline.record",
    )
    other_size: tuple[int, ...] | str | None = Field(
        None,
        description="a second size of a folder's calls: one sample's shape, or a second file of conditions;"
        " axes that have another size there are dynamic",
    )
    loras: tuple[LoraRef, ...] = Field(
        (), description="style LoRAs, fused into the denoiser's weights in this order before anything is measured"
    )


@dataclass(frozen=True)
class CallSize:
    """Another size at which a denoiser is called. What is not named is as in the usual call."""

    sample_shape: tuple[int, ...]
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Factory:
    """What a model factory returns: a denoiser that is a plain nn.Module, and how to sample it.

    `module(sample, timestep, ...)` returns the predicted noise, or a tuple or an output that begins with it.
    `sample_shape` is one sample without its batch axis. `classes` counts the classes, the null class not among them.

    Further inputs are named by their path in the arguments: `added_cond_kwargs.text_embeds`, `image_rotary_emb.0`.
    `conditions`: M rows each, drawn together for the samples; `null`: the rows for guidance, as many or one for all;
    a condition without null rows keeps its own. `shared`: tensors that the rows of a call have in common, such as
    position tables. `constants`: arguments that are no tensors.
    `sample_name` and `timestep_name` are found in the signature where they are not given; the timestep is the
    scheduler's times `timestep_scale`. `schedule`: what else the scheduler's `set_timesteps` is given, such as `mu`.
    Axes whose size is another in `other` are dynamic in the graph.
    """

    module: nn.Module
    scheduler: Scheduler
    sample_shape: tuple[int, ...]
    classes: int | None = None
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    null: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    sample_name: str | None = None
    timestep_name: str | None = None
    timestep_scale: float = 1.0
    schedule: Mapping[str, float] = field(default_factory=dict)
    other: CallSize | None = None

    def __post_init__(self) -> None:
        counts = {name: len(rows) for name, rows in self.conditions.items()}
        problems = []
        if len(set(counts.values())) > 1:
            problems.append(f"model: conditions have different numbers of rows: {counts}")
        for name, rows in self.null.items():
            if name not in counts:
                problems.append(f"model: null rows for {name}, which is no condition")
            elif len(rows) not in (1, counts[name]):
                problems.append(f"model: {len(rows)} null rows for {name}: give 1, or {counts[name]} as it has itself")
        if problems:
            raise RecipeError(*problems)

    @cached_property
    def names(self) -> InputNames:
        """Raises RecipeError for arguments that are required and not given."""
        return input_names(self)


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
        """Find the model that a recipe in `base` names. Raises RecipeError when it is not there or is no model."""
        named = {"conditions": ref.conditions, "other_size": ref.other_size}
        recordings = {role: (base / name).resolve() for role, name in named.items() if isinstance(name, str)}
        for role, path in recordings.items():
            if not path.is_file():
                raise RecipeError(f"model: no file {named[role]} beside the recipe")
        loras = tuple(find_lora(lora.path, base) for lora in ref.loras)
        return replace(cls._find(ref, base), recordings=recordings, loras=loras)

    @classmethod
    def _find(cls, ref: ModelRef, base: Path) -> Checkpoint:
        if ref.path.startswith("hub:"):
            from huggingface_hub import snapshot_download

            tokens = ["*/*.txt", "*/*.model"]
            patterns = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", *tokens]
            with _blamed(ref.path):
                folder = Path(snapshot_download(ref.path.removeprefix("hub:"), allow_patterns=patterns))
            return cls._of_folder(folder, ref)
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
            if config.is_file():
                with _blamed(str(config)):
                    if "_class_name" in json.loads(config.read_text(encoding="utf-8")):
                        return self.root / name
        return None

    @property
    def config_file(self) -> Path:
        """Of a folder's denoiser."""
        assert self._denoiser_folder is not None  # `resolve` made sure
        return self._denoiser_folder / "config.json"

    @property
    def name(self) -> str:
        """The diffusers class of the denoiser, or `file.py:factory`."""
        if self.entry:
            return self.entry
        return self.root.name if self._denoiser_folder is None else _class_name(self._denoiser_folder)

    def save(self, root: Path) -> None:
        """Copy the denoiser and its scheduler, or the factory's file, and what the recipe names beside them."""
        files = root / "model"
        if self.entry:
            files.mkdir()
            shutil.copy(self.root / self.entry.partition(":")[0], files)
        else:
            assert self._denoiser_folder is not None  # `resolve` made sure
            keep = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.py")
            alone = self._denoiser_folder == self.root / "."
            place = files / (DENOISER_FOLDERS[0] if alone else self._denoiser_folder.name)
            shutil.copytree(self._denoiser_folder, place, ignore=keep)
            if (self.root / "scheduler").is_dir():
                shutil.copytree(self.root / "scheduler", files / "scheduler", ignore=keep)
        for role, path in self.recordings.items():
            shutil.copy(path, files / f"{role}.safetensors")
        named: dict[str, object] = {role: f"{role}.safetensors" for role in self.recordings}
        if self.loras:
            named["loras"] = [
                {"path": f"lora.{position}.safetensors", "scale": lora.scale}
                for position, lora in enumerate(self.ref.loras)
            ]
            for position, path in enumerate(self.loras):
                shutil.copy(path, files / f"lora.{position}.safetensors")
        ref = self.ref.model_dump(mode="json", exclude={"path", "loras"}) | named
        (root / "checkpoint.json").write_text(json.dumps({"ref": ref, "entry": self.entry}, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        settings = json.loads((root / "checkpoint.json").read_text())
        files, ref = root / "model", ModelRef(path="model", **settings["ref"])
        recordings = {role: files / f"{role}.safetensors" for role in ("conditions", "other_size")}
        there = {role: path for role, path in recordings.items() if path.is_file()}
        return cls(files, ref, settings["entry"], there, tuple(files / lora.path for lora in ref.loras))

    def open(self, *, weights: bool = True) -> Factory:
        """The denoiser in float32 and evaluation mode, its LoRAs fused, its scheduler, conditions and sample shape.

        Without `weights` it is on torch's meta device, and no weights are read. Raises RecipeError where it needs to be
        told more.
        """
        from intaglio.pipeline.record import Recording

        recorded = {role: Recording.load(path) for role, path in self.recordings.items()}
        usual, other = recorded.get("conditions"), recorded.get("other_size")
        made = self._call_factory() if self.entry else self._open_folder(usual, weights)
        plain_weights_(made.module)
        if not weights:
            made.module.to("meta")
        for position, (lora, path) in enumerate(zip(self.ref.loras, self.loras, strict=True) if weights else ()):
            fuse_lora_(made.module, path, lora.scale, f"model.loras[{position}]")
        if usual is not None:
            made = usual.given_to(made)
        if other is not None:
            made = replace(made, other=CallSize(other.sample_shape, other.conditions, other.shared))
        elif isinstance(self.ref.other_size, tuple):
            made = replace(made, other=CallSize(self.ref.other_size))
        _ = made.names  # what is missing is said here, before anything runs
        return made

    def layers(self) -> tuple[Layer, ...]:
        """The layer table. A folder's weights are not read. Raises RecipeError as `open` does."""
        return layer_table(self.empty())

    def parameter_count(self) -> int:
        """Of the denoiser. Reads and raises what `layers` does."""
        return sum(parameter.numel() for parameter in self.empty().parameters())

    def empty(self) -> nn.Module:
        """The denoiser, of a folder without its weights. Raises RecipeError as `open` does."""
        if self.entry:
            return plain_weights_(self._call_factory().module)
        import accelerate

        kind, folder = self._diffusers_class()
        with _blamed(f"{self.name} of {folder}"), accelerate.init_empty_weights():
            module: nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True))
        return plain_weights_(module)

    def _diffusers_class(self) -> tuple[Any, Path]:
        """Of the denoiser, and its folder."""
        import diffusers

        assert self._denoiser_folder is not None  # `resolve` made sure
        return _class_of(self.name, diffusers.ModelMixin), self._denoiser_folder

    def _open_folder(self, recording: Recording | None, weights: bool) -> Factory:
        module = self._weighed() if weights else self.empty()
        shape = _sample_shape(module.config) if recording is None else recording.sample_shape
        return Factory(module.eval(), self._scheduler(), shape, _class_count(module.config))

    def _weighed(self) -> Any:
        """The denoiser with all of its weights. Raises RecipeError where some are not there, or none in safetensors."""
        import torch

        kind, folder = self._diffusers_class()
        if not any(folder.glob("*.safetensors")):
            raise RecipeError(f"model: no safetensors in {folder}, and no other weights are read: save them as such")
        settings = {"use_safetensors": True, "torch_dtype": torch.float32, "local_files_only": True}
        with _blamed(f"{self.name} of {folder}"):
            module, info = kind.from_pretrained(folder, output_loading_info=True, **settings)
        if missing := sorted(info["missing_keys"]):
            raise RecipeError(
                f"model: {len(missing)} weights of {self.name} are not in {folder}, such as {missing[0]}: get it again"
            )
        return module

    def _scheduler(self) -> Scheduler:
        import diffusers

        folder = self.root / "scheduler"
        if not folder.is_dir():
            return diffusers.DDIMScheduler()  # type: ignore[no-any-return]  # diffusers has no types
        with _blamed(f"the scheduler of {folder}"):
            name = _class_name(folder, "scheduler_config.json")
            return _class_of(name, diffusers.SchedulerMixin).from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]  # diffusers has no types

    def _call_factory(self) -> Factory:
        file, _, name = self.entry.partition(":")
        spec = importlib.util.spec_from_file_location(f"intaglio_model_{Path(file).stem}", self.root / file)
        if spec is None or spec.loader is None:
            raise RecipeError(f"model: {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        with _blamed(self.entry):
            _Uncompiled(spec.name, str(self.root / file)).exec_module(module)
        factory: Callable[[], Factory] | None = getattr(module, name, None)
        if factory is None:
            functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
            raise RecipeError(f"model: {file} has no function {name}{did_you_mean(name, functions)}")
        with _blamed(self.entry):
            made = factory()
        if not isinstance(made, Factory):
            raise RecipeError(f"model: {self.entry} returned a {type(made).__name__}, not an intaglio Factory")
        made.module.eval()
        return made


class _Uncompiled(SourceFileLoader):
    """Leaves no compiled file beside the source: a folder of the store holds what was put there, and nothing more."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Written nowhere."""


@contextmanager
def _blamed(origin: str) -> Iterator[None]:
    """What the user's files raise is said to come from them."""
    try:
        yield
    except IntaglioError:
        raise
    except Exception as error:
        raise RecipeError(f"model: {origin} raised {type(error).__name__}: {error}") from error


def _class_of(name: object, kind: type) -> Any:
    """The class of diffusers with this name. Raises RecipeError where it has none of that kind."""
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise RecipeError(f"model: diffusers {diffusers.__version__} has no {kind.__name__} {name}")
    return found


def layer_table(module: nn.Module) -> tuple[Layer, ...]:
    """List every Linear and every ungrouped Conv2d, in the model's own order, under its first name.

    `unquantizable` names the layers with weights that are not in the table.
    """
    from torch import nn

    layers = []
    for name, child in module.named_modules():
        if own_forward(child):
            continue
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


def _class_name(folder: Path, file: str = "config.json") -> str:
    return str(json.loads((folder / file).read_text(encoding="utf-8"))["_class_name"])


def _sample_shape(config: Any) -> tuple[int, ...]:  # a diffusers FrozenDict
    size = config.get("sample_size")
    if size is None:
        raise RecipeError(
            "model: its configuration has no sample_size: name a file of intaglio.pipeline.record in `conditions`"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return (config["in_channels"], height, width)


def _class_count(config: Any) -> int | None:  # a diffusers FrozenDict
    """Classes without the null class: a DiT adds one for it, a UNet counts it among its class embeddings."""
    if config.get("num_embeds_ada_norm") is not None:
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]) - 1
    return None


@dataclass(frozen=True)
class InputNames:
    """Arguments of a denoiser: the sample, the timestep if it has one, and those that are None as nobody gave them."""

    sample: str
    timestep: str | None
    absent: tuple[str, ...]


def input_names(model: Factory) -> InputNames:
    """The timestep is the argument of this name, or else the only one that is required and not given.

    Raises RecipeError for arguments that are required and not given.
    """
    parameters = inspect.signature(model.module.forward).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    sample = model.sample_name or next(iter(named))
    flat = (
        *model.conditions,
        *model.shared,
        *model.constants,
        *(("class_labels",) if model.classes is not None else ()),
    )
    given = {sample, *(name.partition(".")[0] for name in flat)}
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    timestep = model.timestep_name or ("timestep" if "timestep" in named else None)
    if timestep is None and len(missing) == 1:
        timestep = missing[0]
    if left := [name for name in missing if name != timestep]:
        raise missing_inputs(type(model.module).__name__, left)
    return InputNames(
        sample, timestep, tuple(n for n, p in named.items() if p.default is None and n not in {*given, timestep})
    )


def missing_inputs(kind: str, names: Sequence[str]) -> RecipeError:
    """What to do about inputs that a denoiser needs and nobody gave."""
    return RecipeError(
        f"model: {kind} also takes {', '.join(names)}, which nobody gave: name a file of intaglio.pipeline.record in"
        " `conditions`, or give them in the Factory, as conditions, shared or constants"
    )
