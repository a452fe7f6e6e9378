"""Run a pipeline and watch the calls of its denoiser, and the steps of its scheduler between them.

Shapes: R rows of one call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.call_form import fields_of, first_output
from intaglio.pipeline.model.model_files import blamed
from intaglio.pipeline.model.ref import DENOISER_FOLDERS
from intaglio.pipeline.model.step_clock import number

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.scheduler import Schedule


@dataclass(frozen=True)
class SeenCall:
    """One call of a denoiser: its arguments by name, its first output (R, ...), and the names of its outputs."""

    arguments: Mapping[str, Any]
    output: torch.Tensor
    fields: tuple[str, ...]


@dataclass(frozen=True)
class SeenStep:
    """Calls of a denoiser before one step of the scheduler, and the step's timestep.

    `state` are the samples (R, ...) that enter the scheduler's first step, and `given` is the prediction that it gets
    there; None at later steps. All are None if the pipeline did not step its scheduler.
    """

    calls: list[SeenCall]
    timestep: float | None = None
    state: torch.Tensor | None = None
    given: torch.Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """Record of one run of a pipeline: its steps, and the arguments of `set_timesteps`, such as `mu` and `sigmas`.

    `others` counts the scheduler's steps at which the denoiser was not called.
    """

    steps: list[SeenStep]
    schedule: Schedule = field(default_factory=dict)
    others: int = 0

    @property
    def first(self) -> SeenCall:
        """The first call of the denoiser."""
        return self.steps[0].calls[0]


def find_denoiser(pipe: Any, call: Mapping[str, Any], name: str | None = None) -> nn.Module:
    """Return a pipeline's transformer or UNet; else the component that it calls last before the scheduler's first step.

    With `name`, the component of this name is returned. Raises RecipeError for a pipeline without a denoiser or a
    scheduler, and for a call that fails.
    """
    from torch import nn

    if name is not None and not isinstance(getattr(pipe, name, None), nn.Module):
        raise RecipeError(f"denoiser: {type(pipe).__name__} has no component {name!r} with weights")
    places = DENOISER_FOLDERS if name is None else (name,)
    named = next((d for n in places if (d := getattr(pipe, n, None)) is not None), None)
    models = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    if named is None and not models:
        raise RecipeError(f"{type(pipe).__name__} has no {' or '.join(DENOISER_FOLDERS[:2])} to record")
    if not hasattr(getattr(pipe, "scheduler", None), "set_timesteps"):
        raise RecipeError(f"{type(pipe).__name__} has no scheduler, so the timesteps of its calls are unknown")
    if named is not None:
        found: nn.Module = named
        return found
    called: list[nn.Module] = []

    def stop(*_: object) -> None:
        raise _Stepped

    with ExitStack() as hooks:
        for model in models:
            hooks.enter_context(model.register_forward_pre_hook(lambda module, _: called.append(module)))
        hooks.enter_context(_watched(pipe.scheduler, {}, stop))
        hooks.enter_context(blamed(f"a call of {type(pipe).__name__}"))
        with suppress(_Stepped):
            pipe(**call)
    if not called:
        raise RecipeError(f"{type(pipe).__name__} called none of its models before its scheduler: there is no denoiser")
    return called[-1]


class _Stepped(BaseException):
    """Ends a run at the scheduler's first step, if it only has to find the denoiser."""


def observe(pipe: Any, denoiser: nn.Module, call: Mapping[str, Any]) -> Observation:
    """Run the pipeline. Raises RecipeError if it fails, or does not call the denoiser."""
    import torch

    signature = inspect.signature(denoiser.forward)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    pending: list[SeenCall] = []
    steps: list[SeenStep] = []
    schedule: dict[str, float | tuple[float, ...]] = {}
    others = 0

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(bound.pop())
        given |= given.pop(rest, {})
        pending.append(SeenCall(given, first_output(output).detach(), fields_of(output)))

    bound: list[dict[str, Any]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound.append(_copied(signature.bind(*args, **kwargs).arguments))

    def stepped(timestep: Any, state: Any, output: Any) -> None:
        nonlocal others
        others += not pending
        if pending:
            first, given = (
                value.detach().clone() if isinstance(value, torch.Tensor) and not steps else None
                for value in (state, output)
            )
            steps.append(SeenStep(list(pending), number(timestep), first, given))
            pending.clear()

    with (
        _watched(pipe.scheduler, schedule, stepped),
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(note, with_kwargs=True),
        blamed(f"a call of {type(pipe).__name__}"),
    ):
        pipe(**call)
    if not steps and not pending:
        more = f" at any of {others} steps: record with more num_inference_steps" if others else ""
        raise RecipeError(f"{type(pipe).__name__} did not call its {type(denoiser).__name__}{more}")
    return Observation(steps or [SeenStep(pending)], schedule, others)


def _copied(value: Any) -> Any:
    """Return a copy of the lists and dicts of a call, which the model may change; tensors are not copied."""
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _watched(
    scheduler: Any, schedule: dict[str, float | tuple[float, ...]], stepped: Callable[[Any, Any, Any], None]
) -> Iterator[None]:
    """Collect the float arguments of `set_timesteps`; call `stepped` with each step's timestep, samples and prediction.

    A list `sigmas` is collected where it changes the timesteps. While the scheduler is watched, its class is a subclass
    of its own. A copy of the scheduler that the pipeline makes is not watched.
    """
    import torch

    original: Any = type(scheduler)

    @wraps(original.set_timesteps)  # pipelines look at its signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:
            schedule.update({n: v for n, v in kwargs.items() if isinstance(v, float)})
            if kwargs.get("sigmas") is not None:
                changed = copy.deepcopy(self), copy.deepcopy(self)
                original.set_timesteps(changed[0], *args, **kwargs)
                floats = {n: v for n, v in schedule.items() if n != "sigmas"}
                original.set_timesteps(changed[1], len(kwargs["sigmas"]), **floats)
                if not torch.equal(*(each.timesteps.float() for each in changed)):
                    schedule["sigmas"] = tuple(float(sigma) for sigma in kwargs["sigmas"])
        return original.set_timesteps(self, *args, **kwargs)

    @wraps(original.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original.step).bind(self, *args, **kwargs).arguments
        if self is scheduler and "timestep" in given and "sample" in given:
            stepped(given["timestep"], given["sample"], given.get("model_output"))
        return original.step(self, *args, **kwargs)

    methods: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step, "__module__": original.__module__}
    scheduler.__class__ = type(original.__name__, (original,), methods)
    try:
        yield
    finally:
        scheduler.__class__ = original
