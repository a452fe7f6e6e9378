"""Describe a denoiser: its module, its inputs, and how it is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.call_form import CallForm
from intaglio.pipeline.model.inputs import CLASS_LABELS, InputNames, input_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.scheduler import Schedule, Scheduler


@dataclass(frozen=True)
class SecondSize:
    """A second size at which a denoiser is called. Inputs that are not given here are those of the usual call."""

    sample_shape: tuple[int, ...]
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DenoiserModel:
    """Result of a model factory: a denoiser that is a plain nn.Module, and how to sample it.

    Inputs besides sample and timestep are named by their path in the arguments: `added_cond_kwargs.text_embeds`; items
    of a tuple `image_rotary_emb.0`, of a list `image_embeds.[0]`.
    Shapes: M rows of conditions, T timesteps.
    """

    module: nn.Module
    """Denoiser: `module(sample, timestep, ...)` returns the prediction, or a tuple or an output that begins with it."""
    scheduler: Scheduler
    """Scheduler of diffusers, or an object with its methods."""
    sample_shape: tuple[int, ...]
    """Shape of one sample, without the batch axis."""
    classes: int | None = None
    """Number of classes, without the null class; None for a denoiser that takes no class."""
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of M rows each. For each sample one row number is drawn, the same for all conditions.

    A condition with the sample's name is joined to the part of the sample that the scheduler moves, such as a mask;
    without it, noise is joined. A condition with the timestep's name holds factors (M, ...) of the timestep, for
    denoisers that take one timestep for each frame or token.
    """
    null: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Rows that guidance uses in place of the conditions, M or one. Conditions that are not here are used for both."""
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that all rows of a call have in common, such as position tables."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Arguments that are no tensors."""
    sample_name: str | None = None
    """Name of the sample's argument; None: the first argument of `forward`."""
    timestep_name: str | None = None
    """Name of the timestep's argument; None: it is found in the signature of `forward`."""
    timestep_scale: float = 1.0
    """The denoiser's timestep is the scheduler's times this factor, plus `timestep_offset`."""
    schedule: Schedule = field(default_factory=dict)
    """Further arguments of the scheduler's `set_timesteps`, such as `mu`, or `sigmas` for some number of steps."""
    other: SecondSize | None = None
    """Second size: axes whose size differs there are dynamic."""
    form: CallForm | None = None
    """Form of the calls; None: it is found by calling the module."""
    steps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Timesteps (T,), in the denoiser's scale, of the conditions (M, T, ...) that differ from step to step.

    A call takes the nearest.
    """
    timestep_offset: float = 0.0
    """Number that is added to the timestep after `timestep_scale`."""
    times: tuple[float, ...] = ()
    """Timesteps of the scheduler at which this denoiser is called, if another one denoises before or after them.

    () for all.
    """
    start: torch.Tensor | None = None
    """Samples (M, ...) at the first timestep, with the rows of the conditions; None for noise."""
    output_scale: float = 1.0
    """Factor on outputs before the scheduler reads them: -1 for a pipeline that negates them."""

    def __post_init__(self) -> None:
        counts = {name: len(rows) for name, rows in self.conditions.items()}
        if self.start is not None:
            counts["start"] = len(self.start)
        problems = []
        if len(set(counts.values())) > 1:
            problems.append(f"model: conditions have different numbers of rows: {counts}")
        for name, rows in self.null.items():
            if name not in self.conditions:
                problems.append(f"model: null rows for {name}, which is no condition")
            elif len(rows) not in (1, counts[name]):
                problems.append(
                    f"model: {len(rows)} null rows for {name}: give 1, or {counts[name]} like the condition"
                )
        if problems:
            raise RecipeError(*problems)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of what the scheduler moves of one sample."""
        part = None if self.form is None else self.form.part
        return tuple(self.sample_shape) if part is None else part.shape(self.sample_shape)

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """Return the part of outputs (R, ...) that the scheduler reads: without a learned variance that it ignores.

        Nothing is cut off for a model without a timestep, or if the sample's first axis varies in size.
        """
        form = self.form or CallForm()
        if form.cut is not None and form.cut[0] > 0:
            output = output.narrow(form.cut[0] + 1, 0, form.cut[1])
        varies = self.other is not None and self.other.sample_shape[0] != self.sample_shape[0]
        behind = form.part is not None and form.part.start > 0
        whole = form.variance or varies or behind or self.names.timestep is None
        return output if whole else output[:, : self.state_shape[0]]

    @cached_property
    def names(self) -> InputNames:
        """Return the names of the denoiser's arguments. Raises RecipeError if a required one is missing."""
        classes = () if self.classes is None else (CLASS_LABELS,)
        values = (*self.conditions, *self.shared, *self.constants, *classes)
        return input_names(self.module, values, self.sample_name, self.timestep_name)
