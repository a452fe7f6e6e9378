"""Find the names of a denoiser's arguments, and the ones that are missing."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intaglio.pipeline.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn


TIMESTEPS = ("timestep", "timesteps")
"""Names of the argument with the timestep in diffusers."""
TIMES = (*TIMESTEPS, "t", "time", "times", "sigma", "sigmas")
"""Names of a first argument that is a timestep, and not the sample."""
CLASS_LABELS = "class_labels"
"""Name of the condition of a class-conditional model."""


@dataclass(frozen=True)
class InputNames:
    """Argument names of a denoiser: the sample, the timestep if any, and arguments left as None."""

    sample: str
    timestep: str | None
    absent: tuple[str, ...]


def input_names(
    module: nn.Module, values: Iterable[str], sample_name: str | None = None, timestep_name: str | None = None
) -> InputNames:
    """Return the argument names of a denoiser that gets `values`, inputs by flat name, beside sample and timestep.

    Names that are None are found: the sample is the first argument that is not named like a timestep; the timestep is
    the argument `timestep` or `timesteps`, or else the only required argument that has no value.

    Raises RecipeError for arguments that are required and not given.
    """
    parameters = inspect.signature(module.forward).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    kind = type(module).__name__
    if by_place := [n for n, p in named.items() if p.kind is p.POSITIONAL_ONLY]:
        raise RecipeError(
            f"model: {kind} takes {', '.join(by_place)} by position alone, and inputs are given by name: remove the /"
            " from its forward"
        )
    if not named and (sample_name is None or timestep_name is None):
        raise RecipeError(
            f"model: forward of {kind} names no argument ({', '.join(map(str, parameters.values())) or 'none'}): give"
            " sample_name and timestep_name in the DenoiserModel, or write a forward with named arguments"
        )
    others = [name for name in named if name != timestep_name]
    sample = sample_name or next((name for name in others if name not in TIMES), next(iter(others), ""))
    given = {sample, *(name.partition(".")[0] for name in values)}
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    timestep = timestep_name or next((name for name in TIMESTEPS if name in named), None)
    if timestep is None and len(missing) == 1:
        timestep = missing[0]
    if left := [name for name in missing if name != timestep]:
        raise missing_inputs(kind, left)
    return InputNames(
        sample, timestep, tuple(n for n, p in named.items() if p.default is None and n not in {*given, timestep})
    )


class MissingInputs(RecipeError):
    """A denoiser lacks required inputs, or its configuration lacks a size."""


def missing_inputs(kind: str, names: Sequence[str], ended: str = "") -> MissingInputs:
    """Make the error for inputs that a denoiser needs. `ended` says how a call without them ended."""
    return MissingInputs(
        f"model: {kind} requires {', '.join(names)}, which was not provided: name a file of intaglio.record in"
        f" `conditions`, or give them in the DenoiserModel, as conditions, shared or constants{ended}"
    )


def unmet(error: Exception, absent: Sequence[str]) -> Sequence[str]:
    """Return the arguments left as None that made a call fail.

    The message names them; or, if the message says that something is None, the innermost source line names them.
    """

    def named_in(text: str) -> list[str]:
        return [name for name in absent if re.search(rf"\b{re.escape(name)}\b", text)]

    if found := named_in(str(error)):
        return found
    if "None" not in str(error):
        return ()
    lines = (frame.line or "" for frame in reversed(traceback.extract_tb(error.__traceback__)))
    return next(filter(None, map(named_in, lines)), absent)
