"""Find the form of a denoiser's calls by calling it: how it takes its inputs, and which outputs the scheduler reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from intaglio.pipeline.model.call_form import CallForm, alike, ends, fields_of, first_output
from intaglio.pipeline.model.call_rows import CallRows
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.scheduler import reads_variance, scheduled, timesteps

TRIED_ROWS = 2
"""Number of rows in a call that is tried: with one row, a wrong shape may be broadcast."""


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
    form = model.form
    assert form is not None  # `_variants` set it
    try:
        with torch.no_grad():
            raw = form.call(model.module, _inputs(model, steps), model.constants, TRIED_ROWS)
            output = first_output(raw, len(model.sample_shape) + 1)
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
    rows = CallRows(model, guidance=1.0)
    start = rows.start(TRIED_ROWS, torch.Generator().manual_seed(0), rows=(0,))
    first = timesteps(scheduled(model.scheduler, steps, model.schedule))[0]
    inputs = rows.rows(start.noise, first, start)
    device = next((parameter.device for parameter in model.module.parameters()), start.noise.device)
    return {name: value.to(device) for name, value in inputs.items()}
