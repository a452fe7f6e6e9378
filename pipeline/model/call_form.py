"""Describe how a denoiser takes its inputs, and which part of its sample a scheduler moves; find both by a call.

Shapes: R rows of one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from intaglio.pipeline.files import OPTIONAL
from intaglio.pipeline.model.arguments import nest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.types import Inputs

TRIED_ROWS = 2
"""Number of rows in a call that is tried: with one row, a wrong shape may be broadcast."""


@dataclass(frozen=True)
class Part:
    """Part of a denoiser's sample that the scheduler moves: `size` entries of `axis`, from `start` on.

    The axes are those of one sample, without rows. The rest of the sample is joined to this part in each call: a mask,
    a picture, a first frame.
    """

    axis: int
    start: int
    size: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of samples (R, ...)."""
        return x.narrow(self.axis + 1, self.start, self.size)

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """Return samples (R, ...) without the part."""
        import torch

        before, after = (slice(None),) * (self.axis + 1), slice(self.start + self.size, None)
        return torch.cat([x[(*before, slice(self.start))], x[(*before, after)]], self.axis + 1)

    def joined(self, part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Return the samples (R, ...) with this part and this rest."""
        import torch

        first, last = rest.tensor_split([self.start], self.axis + 1)
        return torch.cat([first, part, last], self.axis + 1)

    def shape(self, sample: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of one sample."""
        return (*sample[: self.axis], self.size, *sample[self.axis + 1 :])

    def rest_shape(self, sample: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the rest of one sample."""
        return (*sample[: self.axis], sample[self.axis] - self.size, *sample[self.axis + 1 :])


@dataclass(frozen=True)
class CallForm:
    """Form of a denoiser's calls and outputs.

    `part` is what the scheduler moves of the sample, None for all of it. `cut` is an axis of one sample and the size to
    which the scheduler reads outputs there, None if they have no more than the state. With `variance`, the scheduler
    reads as many channels again behind those of the state: a learned variance.
    `repeats[name]` is the number of rows (R, k, ...) that the module takes as (R k, ...), such as texts once a frame.
    `row_axes[name]` is the axis of the module's argument along which its rows lie, where that is not the first: (L, R,
    ...) for 1. `apart` are inputs that the module takes as a list with one tensor for each row. With `lists`, numbered
    inputs are the items of lists, not of tuples. `float_timestep`: the timestep is floating point where the scheduler's
    is not. `row_lists` are constants that are lists with one item for each row, all of them equal. `fields` are the
    names of the module's outputs.
    """

    part: Part | None = None
    cut: tuple[int, int] | None = None
    repeats: Mapping[str, int] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    lists: bool = False
    float_timestep: bool = False
    fields: tuple[str, ...] = ("sample",)
    variance: Annotated[bool, OPTIONAL] = False
    row_axes: Annotated[Mapping[str, int], OPTIONAL] = field(default_factory=dict)
    row_lists: Annotated[tuple[str, ...], OPTIONAL] = ()

    def call(self, module: nn.Module, inputs: Inputs, constants: Mapping[str, object], rows: int) -> Any:
        """Return the module's own output for the inputs of R = `rows` rows by flat name."""
        given: dict[str, object] = {}
        constants = {n: of_rows(value, rows) if n in self.row_lists else value for n, value in constants.items()}
        for name, value in inputs.items():
            if name in self.apart:
                given[name] = list(value.unbind())
            elif name in self.row_axes:
                given[name] = value.movedim(0, self.row_axes[name])
            else:
                given[name] = value.flatten(0, 1) if name in self.repeats else value
        return module(**nest({**given, **constants}, list if self.lists else tuple))


def of_rows(items: Any, rows: int) -> Any:
    """Return a list or tuple with one item for each row, from one with an item for each row of another call."""
    return type(items)([items[0]] * rows)


def alike(value: object) -> bool:
    """Return True for a list or a tuple with items that are all equal."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(each == value[0] for each in value)


def first_output(output: Any) -> torch.Tensor:
    """Return the first tensor (R, ...) of a module's output, from whatever holds it.

    A list of equal shapes has one for each row; any other list is read as a tuple.
    """
    import torch

    if isinstance(output, list) and len({getattr(each, "shape", None) for each in output}) > 1:
        output = tuple(output)

    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif isinstance(output, tuple):
        output = output[0]
    elif not isinstance(output, torch.Tensor | list):
        output = output.sample
    found: torch.Tensor = torch.stack(output) if isinstance(output, list) else output
    return found


def fields_of(output: Any) -> tuple[str, ...]:
    """Return the names of a module's outputs; `sample` where they have none."""
    names = tuple(output) if isinstance(output, Mapping) else getattr(output, "_fields", ())
    return names or CallForm.fields


def ends(sample: Sequence[int], output: Sequence[int]) -> tuple[Part | None, tuple[int, int] | None]:
    """Return what moves of one sample, and where outputs are cut, from the shapes of one sample and one output.

    An output that is smaller along one axis is that of the sample's first channels. An output that is larger along one
    axis is cut there.
    """
    if len(sample) != len(output):
        return None, None
    other = [axis for axis, (a, b) in enumerate(zip(sample, output, strict=True)) if a != b]
    if len(other) != 1:
        return None, None
    axis = other[0]
    if output[axis] < sample[axis]:
        return Part(axis, 0, output[axis]), None
    return None, (axis, sample[axis])


def formed(model: DenoiserModel, steps: int) -> DenoiserModel:
    """Return the model with the form of its calls, found by calls of TRIED_ROWS rows at the first of `steps` steps.

    The plain form is tried first, then the others. The model is returned unchanged if no call succeeds: the run's first
    call will say why. The scheduler says if it reads a learned variance.
    """
    if model.form is not None:
        return _with_variance(model, steps)
    for tried in _variants(model):
        if (found := _tried(tried, steps)) is not None:
            return _with_variance(replace(tried, form=found), steps)
    return model


def _with_variance(model: DenoiserModel, steps: int) -> DenoiserModel:
    """Return the model with `variance` in place of a cut of its output's channels, if its scheduler reads them."""
    import torch

    from intaglio.pipeline.model.scheduler import reads_variance, scheduled

    form = model.form
    if form is None or form.cut is None or form.cut[0] != 0:
        return model
    scheduler = scheduled(model.scheduler, max(steps, 2), model.schedule)  # the last step draws nothing
    like = torch.randn(1, *model.state_shape, generator=torch.Generator().manual_seed(0))
    return replace(model, form=replace(form, cut=None, variance=True)) if reads_variance(scheduler, like) else model


def _variants(model: DenoiserModel) -> Iterator[DenoiserModel]:
    """Yield the model with each form that its inputs allow, those with few changes first."""
    numbered = any(part.isdecimal() for name in _flat_names(model) for part in name.split(".")[1:])
    counts = sorted({size for size in model.sample_shape[1:] if size > 1}) if model.conditions else []
    apart = (model.names.sample, *model.conditions)
    second = [name for name, rows in model.conditions.items() if rows.ndim > 2 and name != model.names.sample]
    ways = itertools.product(
        (False, True),
        (False, True) if numbered else (False,),
        (1, *counts),
        ((), apart),
    )
    forms = [
        CallForm(float_timestep=floating, lists=lists, apart=rows, repeats=_all(model, count))
        for floating, lists, count, rows in ways
    ]
    forms += [CallForm(float_timestep=floating, row_axes={name: 1}) for name in second for floating in (False, True)]
    if lists := tuple(name for name, value in model.constants.items() if alike(value)):
        forms += [CallForm(float_timestep=floating, row_lists=lists) for floating in (False, True)]
    for form in sorted(forms, key=_changes):
        other = model.other and replace(model.other, conditions=_repeated(model.other.conditions, form.repeats))
        conditions, null = _repeated(model.conditions, form.repeats), _repeated(model.null, form.repeats)
        yield replace(model, form=form, conditions=conditions, null=null, other=other)


def _changes(form: CallForm) -> int:
    """Return how far a form is from the plain one."""
    other = bool(form.apart) + bool(form.row_axes) + bool(form.row_lists)
    return form.lists + form.float_timestep + bool(form.repeats) + 2 * other


def _flat_names(model: DenoiserModel) -> tuple[str, ...]:
    return (*model.conditions, *model.shared, *model.constants)


def _all(model: DenoiserModel, count: int) -> dict[str, int]:
    return {} if count == 1 else dict.fromkeys(model.conditions, count)


def _repeated(tables: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
    """Return rows (M, ...) as (M, count, ...) where there is a count."""
    return {n: t[:, None].expand(-1, counts[n], *t.shape[1:]) if n in counts else t for n, t in tables.items()}


def _tried(model: DenoiserModel, steps: int) -> CallForm | None:
    """Return the model's form with what a call shows of its output; None if the call fails."""
    import torch

    form = model.form
    assert form is not None  # `_variants` set it
    try:
        with torch.no_grad():
            raw = form.call(model.module, _inputs(model, steps), model.constants, TRIED_ROWS)
            output = first_output(raw)
    except Exception:  # whatever a module raises: the run's first call reports it
        return None
    if model.names.timestep is None:
        return form
    if len(output) != TRIED_ROWS:
        return None
    part, cut = ends(model.sample_shape, output.shape[1:])
    if cut is not None and model.other is not None and model.other.sample_shape[cut[0]] != cut[1]:
        cut = None
    return replace(form, part=part, cut=cut, fields=fields_of(raw))


def _inputs(model: DenoiserModel, steps: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a call of TRIED_ROWS rows: noise, the first timestep, and the first conditions."""
    import torch

    from intaglio.pipeline.model.sampler import Sampler

    sampler = Sampler(model, steps, 1.0)
    start = sampler.start(TRIED_ROWS, torch.Generator().manual_seed(0), rows=(0,))
    inputs = sampler.rows(start.noise, sampler.first_timestep, start)
    device = next((parameter.device for parameter in model.module.parameters()), start.noise.device)
    return {name: value.to(device) for name, value in inputs.items()}
