"""Record the inputs that a pipeline gives its denoiser, so that the denoiser runs without the pipeline.

Shapes: M recorded rows, R rows of one call.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import open_safetensors, parse_json, printable
from intaglio.pipeline.model.arguments import flatten
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.model_files import blamed
from intaglio.pipeline.model.received import check_sample_shape
from intaglio.pipeline.model.ref import DENOISER_FOLDERS
from intaglio.pipeline.output_files import whole_file

if TYPE_CHECKING:
    import torch
    from torch import nn

SAMPLES = ("hidden_states", "sample")
"""Names of the argument with the noisy sample in diffusers."""


@dataclass(frozen=True)
class Recording:
    """Recorded inputs of a denoiser, except sample and timestep, and the shape of one sample."""

    sample_shape: tuple[int, ...]
    timestep_scale: float = 1.0
    schedule: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    null: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)

    def given_to(self, model: DenoiserModel) -> DenoiserModel:
        """Return the model with the recorded inputs in place of its own."""
        return replace(
            model,
            sample_shape=self.sample_shape,
            timestep_scale=self.timestep_scale,
            schedule=self.schedule,
            conditions=self.conditions,
            null=self.null,
            shared=self.shared,
            constants=self.constants,
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file: conditions by name, others under `null.` and `shared.`, the rest as metadata.

        Raises RecipeError if `path` is a link, a folder, a pipe or a device, or its folder does not exist.
        """
        from safetensors.torch import save_file

        tensors = {
            **self.conditions,
            **{f"null.{name}": tensor for name, tensor in self.null.items()},
            **{f"shared.{name}": tensor for name, tensor in self.shared.items()},
        }
        settings = {name: getattr(self, name) for name in ("sample_shape", "timestep_scale", "schedule", "constants")}
        text = json.dumps(settings, sort_keys=True)
        with whole_file(Path(path)) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"intaglio": text})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises RecipeError for another file, and for a tensor with NaN."""
        with open_safetensors(path, framework="pt") as file:
            settings = _settings(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        if wrong := [name for name, tensor in tensors.items() if tensor.isnan().any()]:
            raise RecipeError(f"model: {printable(path)}: {printable(wrong[0])} has NaN: record it again")
        parts: dict[str, dict[str, torch.Tensor]] = {"null": {}, "shared": {}, "": {}}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            part = head if head in ("null", "shared") and rest else ""
            parts[part][rest if part else name] = tensor
        return cls(
            settings.sample_shape,
            settings.timestep_scale,
            settings.schedule,
            parts[""],
            parts["null"],
            parts["shared"],
            settings.constants,
        )

    @staticmethod
    def check(path: Path) -> None:
        """Raise RecipeError if a file is no recording, by its header alone."""
        with open_safetensors(path) as file:
            _settings(file.metadata() or {}, path)


class _Settings(BaseModel):
    """Metadata of a recording."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    sample_shape: tuple[int, ...]
    timestep_scale: float
    schedule: dict[str, float]
    constants: dict[str, object]


def _settings(metadata: Mapping[str, str], path: Path) -> _Settings:
    """Read the metadata of a recording. Raises RecipeError for a file that is no recording."""
    name = printable(path)
    if "intaglio" not in metadata:
        raise RecipeError(f"model: {name} was not written by intaglio.record: it names no sample shape")
    try:
        settings = _Settings.model_validate(parse_json(metadata["intaglio"], source=name))
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(f"model: {name}: {printable(place)}: {first['msg']}: record it again") from e
    check_sample_shape(settings.sample_shape, name)
    return settings


def record(
    pipe: Any,  # a diffusers pipeline, or an object that is called like one
    call: Mapping[str, Any],
    null: Mapping[str, Any] | None = None,
    *,
    shared: Sequence[str] = (),
) -> Recording:
    """Record the denoiser's inputs in `pipe(**call)`, and its null rows in `pipe(**null)`.

    Switch guidance off in both calls. The calls at the first timestep of each run are kept. A tensor with as many rows
    as the sample is a condition, unless `shared` names it; any other tensor is shared by all rows. Raises RecipeError
    for a pipeline without a denoiser or a scheduler, for a call that fails, and for inputs that cannot be kept.
    """
    import torch

    denoiser = next((d for n in DENOISER_FOLDERS if (d := getattr(pipe, n, None)) is not None), None)
    if denoiser is None:
        raise RecipeError(f"{type(pipe).__name__} has no {' or '.join(DENOISER_FOLDERS[:2])} to record")
    if not hasattr(getattr(pipe, "scheduler", None), "set_timesteps"):
        raise RecipeError(f"{type(pipe).__name__} has no scheduler, so the timesteps of its calls are unknown")
    with _noting_schedule(pipe.scheduler) as schedule:
        usual = _first_calls(denoiser, pipe, call)
    sample_name = next((name for name in SAMPLES if name in usual[0]), next(iter(usual[0])))
    sample, timestep = usual[0][sample_name], usual[0].get("timestep")
    if not isinstance(sample, torch.Tensor):
        raise RecipeError(
            f"{type(denoiser).__name__} gets its samples as {sample_name}, which is no tensor: they cannot be recorded"
        )
    rows, common, constants = _divide(usual, sample_name, shared)
    null_rows = {} if null is None else _divide(_first_calls(denoiser, pipe, null), sample_name, shared)[0]
    scale = 1.0
    if timestep is not None and float(pipe.scheduler.timesteps[0]):
        scale = _first(timestep) / float(pipe.scheduler.timesteps[0])
    return Recording(tuple(sample.shape[1:]), scale, schedule, rows, null_rows, common, constants)


def _first_calls(denoiser: nn.Module, pipe: Any, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run the pipeline and return the flat inputs of the denoiser's calls at the first timestep."""
    signature = inspect.signature(denoiser.forward)
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(flatten(signature.bind(*args, **kwargs).arguments)))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    with hook, blamed(f"a call of {type(pipe).__name__}"):
        pipe(**call)
    if not seen:
        raise RecipeError(f"{type(pipe).__name__} did not call its {type(denoiser).__name__}")
    return [inputs for inputs in seen if _same(inputs.get("timestep"), seen[0].get("timestep"))]


@contextmanager
def _noting_schedule(scheduler: Any) -> Iterator[dict[str, float]]:
    """Yield a dict that collects the float arguments of `set_timesteps`, such as `mu`."""
    noted: dict[str, float] = {}
    original = scheduler.set_timesteps

    @wraps(original)  # pipelines look at its signature
    def noting(*args: Any, **kwargs: Any) -> None:
        noted.update({n: v for n, v in kwargs.items() if isinstance(v, float)})
        original(*args, **kwargs)

    scheduler.set_timesteps = noting
    try:
        yield noted
    finally:
        del scheduler.set_timesteps


def _same(a: object, b: object) -> bool:
    return a is b or (a is not None and b is not None and _first(a) == _first(b))


def _first(timestep: Any) -> float:  # a tensor or a number
    import torch

    return float(torch.as_tensor(timestep).reshape(-1)[0])


def _divide(
    calls: Sequence[Mapping[str, Any]], sample_name: str, shared: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, object]]:
    """Return the rows of all calls, the tensors that all rows share, and the constants."""
    import torch

    rows: dict[str, torch.Tensor] = {}
    common: dict[str, torch.Tensor] = {}
    constants: dict[str, object] = {}
    for name, first in calls[0].items():
        if name in (sample_name, "timestep", "return_dict") or first is None:
            continue
        if not isinstance(first, torch.Tensor):
            constants[name] = as_constant(name, first)
        elif name in shared or first.ndim == 0 or len(first) != len(calls[0][sample_name]):
            common[name] = _kept(first)
        else:
            found = [call.get(name) for call in calls]
            if not all(isinstance(each, torch.Tensor) and each.shape[1:] == first.shape[1:] for each in found):
                raise RecipeError(f"{name} has another shape in each call of the denoiser: record without guidance")
            rows[name] = torch.cat([_kept(each) for each in found if each is not None])
    return rows, common, constants


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU, in float32 if it is floating point."""
    kept = tensor.detach().cpu()
    return kept.float() if kept.is_floating_point() else kept


def as_constant(name: str, value: object) -> object:
    """Return the value as JSON restores it. Raises RecipeError for a value that JSON cannot hold."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as e:
        raise RecipeError(f"{name} is a {type(value).__name__}: only numbers, texts and their lists can be kept") from e
