"""Describe how a denoiser takes its inputs, and which part of its sample a scheduler moves.

Shapes: R rows of one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import OPTIONAL
from intaglio.pipeline.model.arguments import nest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.types import Inputs


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
    """Form of a denoiser's calls and outputs."""

    part: Part | None = None
    """Part of the sample that the scheduler moves; None for all of it."""
    cut: tuple[int, int] | None = None
    """Axis of one sample, and the size to which the scheduler reads outputs there; None if it reads whole outputs."""
    repeats: Mapping[str, int] = field(default_factory=dict)
    """Number k of rows (R, k, ...) that the module takes as (R k, ...), by input, such as texts once a frame."""
    apart: tuple[str, ...] = ()
    """Inputs that the module takes as a list with one tensor for each row."""
    lists: bool = False
    """True if numbered inputs are the items of lists, and not of tuples."""
    float_timestep: bool = False
    """True if the module takes a floating-point timestep where the scheduler's is a whole number."""
    fields: tuple[str, ...] = ("sample",)
    """Names of the module's outputs."""
    variance: Annotated[bool, OPTIONAL] = False
    """True if the scheduler reads a learned variance: as many channels again, behind those of the state."""
    row_axes: Annotated[Mapping[str, int], OPTIONAL] = field(default_factory=dict)
    """Axis of the module's argument along which its rows lie, where that is not the first: 1 for (L, R, ...)."""
    row_lists: Annotated[tuple[str, ...], OPTIONAL] = ()
    """Constants that are lists with one item for each row, all of them equal."""

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


def first_output(output: Any, axes: int | None = None) -> torch.Tensor:
    """Return the first tensor (R, ...) of a module's output, from whatever holds it.

    A list of equal shapes has one for each row, unless these have `axes` axes as the samples (R, ...) do; any other
    list is read as a tuple. Raises RecipeError if the output does not begin with a tensor.
    """
    import torch

    def begins(held: Any) -> Any:
        match held:
            case list() if len(held) > 0 and all(isinstance(each, torch.Tensor) for each in held):
                alike = len({each.shape for each in held}) == 1 and held[0].ndim != axes
                return torch.stack(held) if alike else held[0]
            case Mapping() if held:
                return next(iter(held.values()))
            case list() | tuple() if held:
                return held[0]
        if isinstance(held, Mapping | list | tuple):
            return None
        return next(iter(vars(held).values()), None) if is_dataclass(held) else getattr(held, "sample", None)

    found = output
    while not isinstance(found, torch.Tensor):
        if found is None:
            raise RecipeError(
                f"model: the denoiser's output is a {type(output).__name__} that does not begin with a tensor: let its"
                " forward return the prediction, or a tuple, dict or dataclass that begins with it"
            )
        found = begins(found)
    return found


def fields_of(output: Any) -> tuple[str, ...]:
    """Return the names of a module's outputs; `sample` where they have none."""
    names = tuple(output) if isinstance(output, Mapping) else getattr(output, "_fields", ())
    if not names and is_dataclass(output):
        names = tuple(vars(output))
    return names or CallForm.fields


def ends(sample: Sequence[int], output: Sequence[int]) -> tuple[Part | None, tuple[int, int] | None]:
    """Return the part of a sample that moves, and where outputs are cut, from the shapes of one sample and one output.

    If the output is smaller along one axis, the scheduler moves as many entries, the first ones of the sample there. If
    it is larger along one axis, it is cut there.
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
