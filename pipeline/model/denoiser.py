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

    `module(sample, timestep, ...)` returns the predicted noise, or a tuple or an output that begins with it.
    `sample_shape` is one sample without its batch axis. `classes` counts the classes, the null class not among them.

    Further inputs are named by their path in the arguments: `added_cond_kwargs.text_embeds`; items of a tuple
    `image_rotary_emb.0`, of a list `image_embeds.[0]`.
    `conditions`: tensors of M rows each; for a sample, the same row of all of them is drawn. `null`: the rows that
    guidance uses instead, M or one; a condition that is not in `null` is used for both. `shared`: tensors that the rows
    of a call have in common, such as position tables. `constants`: arguments that are no tensors.
    A condition with the sample's own name is what is joined to the part of the sample that the scheduler moves, such as
    a mask; without it, noise is joined. `steps`: conditions that differ from step to step, (M, T, ...), and their
    timesteps (T,) in the denoiser's scale; a call takes the nearest. A condition with the timestep's own name holds
    factors (M, ...) of the timestep, for denoisers that take one timestep for each frame or token.
    `sample_name` and `timestep_name` are found in the signature where they are not given; the timestep is the
    scheduler's times `timestep_scale` plus `timestep_offset`. The scheduler reads outputs times `output_scale`: -1 for
    a pipeline that negates them. `form` is found by a call if it is None. `schedule`: further arguments of the
    scheduler's `set_timesteps`, such as `mu`, or `sigmas` for some number of steps. Axes whose size differs in `other`
    are dynamic.
    `times`: the scheduler's timesteps at which this denoiser is called, where another one denoises before or after
    them; () for all. `start`: samples (M, ...) at the first of them, with the rows of the conditions; None for noise.
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
    schedule: Schedule = field(default_factory=dict)
    other: SecondSize | None = None
    form: CallForm | None = None
    steps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    timestep_offset: float = 0.0
    times: tuple[float, ...] = ()
    start: torch.Tensor | None = None
    output_scale: float = 1.0

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
