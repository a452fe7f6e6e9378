"""Record the inputs that a pipeline gives its denoiser, so that the denoiser runs without the pipeline.

Shapes: M recorded rows, R rows of one call.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import open_safetensors, parse_json, printable
from intaglio.pipeline.model.call_form import CallForm
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.layout import Layout
from intaglio.pipeline.model.observed import Observation, SeenStep, find_denoiser, observe
from intaglio.pipeline.model.received import check_sample_shape
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.output_files import whole_file

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.scheduler import Schedule

TUPLE, DICT = "()", "{}"
"""Keys of tuples, and of dicts whose keys are no texts, in the constants of a file."""
START = "start."
"""Name, in a file, of the samples at the denoiser's first step. No name of an input ends with a dot."""


@dataclass(frozen=True)
class Recording:
    """Recorded inputs of a denoiser, except sample and timestep, and the shape of one sample, as in `DenoiserModel`."""

    sample_shape: tuple[int, ...]
    timestep_scale: float = 1.0
    schedule: Schedule = field(default_factory=dict)
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    null: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    form: CallForm | None = None
    steps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    timestep_offset: float = 0.0
    times: tuple[float, ...] = ()
    start: torch.Tensor | None = None
    output_scale: float = 1.0
    sample_name: str | None = None
    timestep_name: str | None = None

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
            form=self.form,
            steps=self.steps,
            timestep_offset=self.timestep_offset,
            times=self.times,
            start=self.start,
            output_scale=self.output_scale,
            sample_name=self.sample_name or model.sample_name,
            timestep_name=self.timestep_name or model.timestep_name,
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
            **({} if self.start is None else {START: self.start}),
        }
        named = {name: getattr(self, name) for name in _Settings.model_fields}
        constants = {name: _as_json(name, value) for name, value in self.constants.items()}
        settings = _Settings.model_validate({**named, "constants": constants})
        text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
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
        start = tensors.pop(START, None)
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
            {name: _restored(value) for name, value in settings.constants.items()},
            settings.form,
            settings.steps,
            settings.timestep_offset,
            settings.times,
            start,
            settings.output_scale,
            settings.sample_name,
            settings.timestep_name,
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
    schedule: dict[str, float | tuple[float, ...]]
    constants: dict[str, object]
    form: CallForm | None = None
    steps: dict[str, tuple[float, ...]] = {}
    timestep_offset: float = 0.0
    times: tuple[float, ...] = ()
    output_scale: float = 1.0
    sample_name: str | None = None
    timestep_name: str | None = None


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
    denoiser: str | None = None,
) -> Recording:
    """Record the denoiser's inputs in `pipe(**call)`, and its null rows in `pipe(**null)`.

    `denoiser` names the pipeline's component that is recorded; without it, this is the transformer or the UNet. Where
    two denoisers share the steps, each is recorded alone: at its own timesteps, from the samples that it begins with.

    Switch guidance off in both calls. A tensor with as many rows as the sample, or with several for each row of the
    sample, is a condition, unless `shared` names it. All rows share any other tensor.
    Conditions that differ from step to step are kept for each step, other inputs are those of the first step. If the
    scheduler moves only a part of the denoiser's sample, the rest is a condition with the sample's name. Raises
    RecipeError for a pipeline without a denoiser or a scheduler, for a call that fails, and for inputs that cannot be
    kept.
    """
    module = find_denoiser(pipe, call, denoiser)
    seen = observe(pipe, module, call)
    times = pipe.scheduler.timesteps
    layout = Layout.of(module, seen, shared, whole_steps=not times.is_floating_point())
    scale, offset = layout.affine(seen, float(times[0]))
    usual = _conditions(layout, seen)
    without = {} if null is None else _conditions(layout, observe(pipe, module, null))
    parameters = inspect.signature(module.forward).parameters
    own, start = _own_steps(pipe, module, seen)
    common, constants = _others(layout, seen, {n for n, p in parameters.items() if p.default is p.empty})
    return Recording(
        tuple(layout.flat(seen.first)[layout.sample].shape[1:]),
        scale,
        seen.schedule,
        *_tables(usual, without),
        common,
        constants,
        form=layout.form,
        steps={name: times for name in usual if len(times := _timeline(name, usual, without)) > 1},
        timestep_offset=offset,
        times=own,
        start=start,
        output_scale=layout.output_scale(seen),
        sample_name=layout.sample,
        timestep_name=layout.timestep,
    )


def _own_steps(pipe: Any, denoiser: nn.Module, seen: Observation) -> tuple[tuple[float, ...], torch.Tensor | None]:
    """Return the timesteps of a denoiser that shares the steps with others of its class, and its first samples.

    The samples (M, ...) are those that enter its first step, None where they are noise. A denoiser that is called at
    every step has no timesteps of its own.
    """
    alike = [part for part in vars(pipe).values() if type(part) is type(denoiser) and part is not denoiser]
    times = [step.timestep for step in seen.steps if step.timestep is not None]
    if not seen.others or not alike or len(times) < len(seen.steps):
        return (), None
    begins = float(pipe.scheduler.timesteps[0]) == times[0]
    state = seen.steps[0].state
    return tuple(times), None if begins or state is None else _kept(state)


@dataclass(frozen=True)
class _Condition:
    """Rows (M, ...) of a condition at timesteps of the denoiser; only the first if they stay the same."""

    rows: Sequence[torch.Tensor]
    timesteps: tuple[float, ...]

    def at(self, timestep: float) -> torch.Tensor:
        """Return the rows at the nearest timestep."""
        return self.rows[StepClock(self.timesteps).index(timestep)]


def _conditions(layout: Layout, seen: Observation) -> dict[str, _Condition]:
    """Return the rows of all conditions by name."""
    import torch

    found = {}
    for name, value in layout.others(seen.first):
        if not isinstance(value, torch.Tensor) or name in layout.shared or not value.ndim:
            continue
        known: dict[float, torch.Tensor] = {}
        for step in seen.steps:
            time = 0.0 if layout.timestep is None else layout.time(step)
            if time not in known and (rows := _rows(layout, step, name, known)) is not None:
                known[time] = rows
        first, *later = known.values()
        changes = any(not torch.equal(rows, first) for rows in later)
        found[name] = (
            _Condition((first, *later), tuple(known)) if changes else _Condition((first,), (next(iter(known)),))
        )
    return found


def _rows(layout: Layout, step: SeenStep, name: str, known: Mapping[float, torch.Tensor]) -> torch.Tensor | None:
    """Return the rows (M, ...) of a condition in all calls of a step; None if they do not fit those that are known.

    Raises RecipeError if they do not fit together in the first step.
    """
    import torch

    given = [layout.flat(call).get(name) for call in step.calls]
    tensors = [layout.rows(name, value) for value in given if isinstance(value, torch.Tensor)]
    fit = len(tensors) == len(given) and len({rows.shape[1:] for rows in tensors}) == 1
    if not known and not fit:
        raise RecipeError(f"{name} has another shape in each call of the denoiser: record without guidance")
    joined = torch.cat([_kept(rows) for rows in tensors]) if fit else None
    alike = joined is not None and all(joined.shape == rows.shape for rows in known.values())
    return joined if alike else None


def _timeline(name: str, usual: Mapping[str, _Condition], without: Mapping[str, _Condition]) -> tuple[float, ...]:
    """Return the timesteps at which a condition or its null rows differ; one where they stay the same."""
    either = [part[name].timesteps for part in (usual, without) if name in part]
    return max(either, key=len)


def _tables(
    usual: Mapping[str, _Condition], without: Mapping[str, _Condition]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return conditions and null rows: (M, ...), or (M, T, ...) at the timesteps of `_timeline`."""
    import torch

    def table(part: Mapping[str, _Condition], name: str) -> torch.Tensor:
        times = _timeline(name, usual, without)
        rows = [part[name].at(time) for time in times]
        return torch.stack(rows, 1) if len(times) > 1 else rows[0]

    return {name: table(usual, name) for name in usual}, {name: table(without, name) for name in without}


def _others(
    layout: Layout, seen: Observation, required: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return the tensors that all rows share, and the constants, of the first call.

    A None is kept only as an item of a list, and for `required` arguments.
    """
    import torch

    common, constants = {}, {}
    for name, value in layout.others(seen.first):
        if isinstance(value, torch.Tensor):
            if name in layout.shared:
                common[name] = _kept(value)
        elif value is not None or "." in name or name in required:
            constants[name] = _restored(_as_json(name, value))
    return common, constants


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU, in float32 if it is floating point."""
    kept = tensor.detach().cpu()
    return kept.float() if kept.is_floating_point() else kept.clone()


def as_constant(name: str, value: object) -> object:
    """Return the value as JSON restores it. Raises RecipeError for a value that JSON cannot hold."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as e:
        raise RecipeError(f"{name} is a {type(value).__name__}: only numbers, texts and their lists can be kept") from e


def _as_json(name: str, value: object) -> object:
    """Return a constant as JSON holds it, with marks at tuples and at dicts whose keys are no texts."""

    def marked(value: object) -> object:
        match value:
            case tuple():
                return {TUPLE: [marked(each) for each in value]}
            case list():
                return [marked(each) for each in value]
            case dict() if all(isinstance(key, str) for key in value):
                return {key: marked(each) for key, each in value.items()}
            case dict():
                return {DICT: [[marked(key), marked(each)] for key, each in value.items()]}
        return value

    return as_constant(name, marked(value))


def _restored(value: object) -> Any:
    """Return a constant from what `_as_json` made of it."""
    match value:
        case list():
            return [_restored(each) for each in value]
        case dict() if len(value) == 1 and TUPLE in value and isinstance(value[TUPLE], list):
            return tuple(_restored(each) for each in value[TUPLE])
        case dict() if len(value) == 1 and DICT in value and isinstance(value[DICT], list):
            return {_restored(key): _restored(each) for key, each in value[DICT]}
        case dict():
            return {key: _restored(each) for key, each in value.items()}
    return value
