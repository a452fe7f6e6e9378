"""Tell the inputs of watched calls apart: sample, timestep, conditions with a row for each sample, shared tensors.

Shapes: R rows of one call, M recorded rows, T steps.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.arguments import flatten, nest
from intaglio.pipeline.model.call_form import CallForm, Part, alike, ends, first_output, of_rows
from intaglio.pipeline.model.inputs import TIMESTEPS
from intaglio.pipeline.model.step_clock import number

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.observed import Observation, SeenCall, SeenStep

SAMPLES = ("hidden_states", "sample")
"""Names of the argument with the noisy sample in diffusers."""
SAME_OUTPUT, SAME_TIMESTEP = 1e-2, 1e-2
"""Relative distances up to which two outputs or tensors count as equal, and two timesteps."""
MOST_UNSURE = 4
"""Largest number of inputs of which only calls can tell where their rows are: one call for each choice among them."""


@dataclass(frozen=True)
class Layout:
    """Roles of a denoiser's inputs. `shared` are flat names of tensors without rows."""

    sample: str
    timestep: str | None
    form: CallForm
    shared: frozenset[str]

    @classmethod
    def of(cls, denoiser: nn.Module, seen: Observation, shared: Sequence[str], whole_steps: bool) -> Layout:
        """Return the layout of watched calls. `whole_steps`: the scheduler's timesteps are integers.

        Raises RecipeError for samples that are no tensors.
        """
        first, state = seen.first, seen.steps[0].state
        given = first.arguments
        sample = next((name for name in SAMPLES if name in given), None) or _sample_name(given, state)
        apart = tuple(name for name, value in given.items() if _is_rows(value, given[sample]))
        made = cls(
            sample, None, CallForm(apart=apart if sample in apart else (), fields=first.fields), frozenset(shared)
        )
        flat = made.flat(first)
        x: Any = flat.get(sample)
        if not _is_tensor(x):
            kind = type(denoiser).__name__
            raise RecipeError(f"{kind} gets its samples as {sample}, which is no tensor: they cannot be recorded")
        timestep = _timestep_name(denoiser, seen, sample, len(x))
        part = _part(x, state, first.output)
        shape, output = x.shape[1:], first.output.shape[1:]
        _, cut = ends(shape if part is None else part.shape(shape), output)
        if part is not None and shape == output:  # the joined part comes out too, or a variance of as many channels
            doubled = part.axis == part.start == 0 and shape[0] == 2 * part.size
            cut = (0, part.size) if doubled else None
        floating = whole_steps and timestep is not None and _is_floating(given[timestep])
        form = replace(made.form, part=part, cut=cut, float_timestep=floating)
        return replace(made, timestep=timestep, form=form)._with_rows(denoiser, first)

    def flat(self, call: SeenCall) -> dict[str, Any]:
        """Return the inputs of a call by flat name, lists of rows as one tensor.

        Raises RecipeError for rows of different shapes.
        """
        import torch

        given = {}
        for name, value in call.arguments.items():
            if name in self.form.apart and isinstance(value, list | tuple):
                if len(shapes := {tuple(row.shape) for row in value}) > 1:
                    raise RecipeError(
                        f"{name} has rows of the shapes {sorted(shapes)}: record with texts of one length"
                    )
                value = torch.stack(list(value))
            given[name] = value
        return dict(flatten(given))

    def rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the rows (R, ...) of a condition.

        Those of the sample are what is joined to its part, those of the timestep its factors.
        """
        if name == self.sample:
            assert self.form.part is not None  # else the sample is no condition
            return self.form.part.rest(value)
        if name == self.timestep:  # one for each frame or token
            return value.float() / (number(value) or 1.0)
        if name in self.form.row_axes:
            return value.movedim(self.form.row_axes[name], 0)
        return value.reshape(-1, self.form.repeats[name], *value.shape[1:]) if name in self.form.repeats else value

    def others(self, call: SeenCall) -> Iterator[tuple[str, Any]]:
        """Yield the inputs of a call besides the moved sample and the timestep, by flat name."""
        for name, value in self.flat(call).items():
            joined = name == self.sample and self.form.part is not None
            several = name == self.timestep and _is_tensor(value) and value.ndim > 1
            if joined or several or name not in (self.sample, self.timestep, "return_dict"):
                yield name, value

    def output_scale(self, seen: Observation) -> float:
        """Return the factor between the denoiser's first output and the prediction that its scheduler got, 1 if none.

        It is 1 too if the prediction is no multiple of the output.
        """
        given, output = seen.steps[0].given, seen.first.output
        if given is None or len(seen.steps[0].calls) > 1:
            return 1.0
        if [size for size in output.shape if size > 1] == [size for size in given.shape if size > 1]:
            given = given.reshape(output.shape)  # one frame, which the scheduler's samples do not count
        if output.shape != given.shape:
            part = self.form.part
            output = output if part is None or output.shape[part.axis + 1] <= part.size else part.of(output)
            for axis, size in enumerate(given.shape) if output.ndim == given.ndim else ():
                output = output.narrow(axis, 0, min(size, output.shape[axis]))
        if output.shape != given.shape:
            return 1.0
        a, b = output.float().flatten(), given.float().flatten()
        scale = float(a.dot(b) / a.dot(a).clamp_min(1e-12))
        if abs(scale - 1.0) <= SAME_OUTPUT or _distance(a * scale, b) > SAME_OUTPUT:
            return 1.0
        return -1.0 if abs(scale + 1.0) <= SAME_OUTPUT else scale

    def affine(self, seen: Observation, first: float) -> tuple[float, float]:
        """Return scale and offset that make the denoiser's timesteps from the scheduler's.

        `first` is the scheduler's first timestep, for a pipeline that did not step its scheduler.
        """
        if self.timestep is None:
            return 1.0, 0.0
        pairs = [(first if s.timestep is None else s.timestep, self.time(s)) for s in seen.steps]
        (t, value), (last_t, last) = pairs[0], pairs[-1]
        near = SAME_TIMESTEP * max(abs(v) for _, v in pairs)
        scale = value / t if t else 1.0
        if all(abs(scale * t - v) <= near for t, v in pairs) or last_t == t:
            return scale, 0.0
        slope = (last - value) / (last_t - t)
        offset = value - slope * t
        return (slope, offset) if all(abs(slope * t + offset - v) <= near for t, v in pairs) else (scale, 0.0)

    def time(self, step: SeenStep) -> float:
        """Return the timestep that the denoiser got in a step."""
        return number(step.calls[0].arguments[self.timestep or ""])

    def _with_rows(self, denoiser: nn.Module, call: SeenCall) -> Layout:
        """Return the layout with the shared tensors, and with the conditions whose rows are not the first axis alone.

        Such conditions have several rows for each sample, or their rows on the second axis.
        """
        import torch

        flat = self.flat(call)
        shape = flat[self.sample].shape
        own = (self.sample, self.timestep)
        tensors = {n: v for n, v in self.others(call) if isinstance(v, torch.Tensor) and n not in own}
        shared = {n for n, v in tensors.items() if n in self.shared or v.ndim == 0 or len(v) != shape[0]}
        unsure = {
            n: len(tensors[n]) // shape[0]
            for n in sorted(shared - self.shared)
            if tensors[n].ndim and len(tensors[n]) % shape[0] == 0 and len(tensors[n]) // shape[0] in shape[1:]
        }
        second = {
            n: 0  # no rows before the second axis
            for n in sorted(shared - self.shared - unsure.keys())
            if tensors[n].ndim > 2 and tensors[n].shape[1] == shape[0]
        }
        unsure |= second if len(unsure | second) <= MOST_UNSURE else {}
        unsure = unsure if len(unsure) <= MOST_UNSURE else {}
        lists = tuple(n for n, v in self.others(call) if n not in tensors and alike(v) and len(v) == shape[0])
        chosen = [names for count in range(len(unsure) + 1) for names in itertools.combinations(unsure, count)]
        for listed, names in itertools.product(((), lists) if lists else ((),), chosen if unsure or lists else ()):
            repeats = {name: unsure[name] for name in names if unsure[name]}
            axes = {name: 1 for name in names if name not in repeats}
            form = replace(self.form, repeats=repeats, row_axes=axes, row_lists=listed)
            made = replace(self, form=form, shared=frozenset(shared - {*names}))
            if made._twice(denoiser, flat, shape[0], call.output):
                return made
        return replace(self, shared=frozenset(shared))

    def _twice(self, denoiser: nn.Module, flat: Mapping[str, Any], rows: int, expected: torch.Tensor) -> bool:
        """Return True if a call with every row twice returns every row of the output twice."""
        import torch

        def doubled(name: str, value: Any) -> Any:
            if name in self.form.row_axes:
                return torch.cat([value, value], self.form.row_axes[name])
            if name in self.form.row_lists:
                return of_rows(value, 2 * rows)
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in self.shared or len(value) % rows:
                return value
            return torch.cat([value, value])

        try:
            with torch.no_grad():
                found = first_output(denoiser(**nest({n: doubled(n, v) for n, v in flat.items()})))
        except Exception:  # whatever a module raises for rows that do not fit
            return False
        both = torch.cat([expected, expected])
        return found.shape == both.shape and _distance(found, both) <= SAME_OUTPUT


def _part(x: torch.Tensor, state: torch.Tensor | None, output: torch.Tensor) -> Part | None:
    """Return the part of the sample (R, ...) that the scheduler moves, up to a factor; None for all of it."""
    if state is None or state.ndim != x.ndim or len(state) != len(x):
        return ends(x.shape[1:], output.shape[1:])[0]
    other = [axis for axis in range(x.ndim - 1) if x.shape[axis + 1] != state.shape[axis + 1]]
    if len(other) != 1 or state.shape[other[0] + 1] > x.shape[other[0] + 1]:
        return None
    axis, size = other[0], state.shape[other[0] + 1]
    parts = [Part(axis, start, size) for start in range(x.shape[axis + 1] - size + 1)]
    unit = state.float() / state.float().norm().clamp_min(1e-12)

    def off(part: Part) -> float:
        mine = part.of(x).float()
        return _distance(mine / mine.norm().clamp_min(1e-12), unit)

    nearest = min(parts, key=off)
    return nearest if off(nearest) <= SAME_OUTPUT else Part(axis, 0, size)


def _sample_name(given: Mapping[str, Any], state: torch.Tensor | None) -> str:
    """Return the argument that is the scheduler's state times a factor, or the first argument if there is none."""
    if state is not None:
        like = {n: v for n, v in given.items() if _is_tensor(v) and v.shape == state.shape and v.is_floating_point()}
        unit = state.float() / state.float().norm().clamp_min(1e-12)
        for name, value in like.items():
            if _distance(value.float() / value.float().norm().clamp_min(1e-12), unit) <= SAME_OUTPUT:
                return name
    return next(iter(given))


def _timestep_name(denoiser: nn.Module, seen: Observation, sample: str, rows: int) -> str | None:
    """Return `timestep` or `timesteps`; else the first required argument that is a number, or has one for each row."""
    given = seen.first.arguments
    if (named := next((name for name in TIMESTEPS if given.get(name) is not None), None)) is not None:
        return named
    parameters = inspect.signature(denoiser.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and n in given and n != sample]
    return next((name for name in required if _is_number(given[name], rows)), None)


def _is_number(value: Any, rows: int) -> bool:
    if _is_tensor(value):
        return bool(value.ndim <= 1 and value.numel() in (1, rows))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rows(value: Any, sample: Any) -> bool:
    """Return True if the value and the samples are both lists, with as many tensors as samples."""
    if not isinstance(value, list | tuple) or not isinstance(sample, list | tuple) or len(value) != len(sample):
        return False
    return bool(value) and all(map(_is_tensor, value))


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_floating(value: Any) -> bool:
    return bool(value.is_floating_point()) if _is_tensor(value) else isinstance(value, float)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative L2 distance of two tensors."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
