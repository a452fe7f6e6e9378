"""Step a diffusers scheduler so that each random draw depends only on the sample and the step.

Shapes: B samples.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.files import one_line

Schedule: TypeAlias = Mapping[str, float | tuple[float, ...]]
"""Arguments of `set_timesteps` beside the number of steps, by name."""


class Scheduler(Protocol):
    """Methods of a diffusers scheduler that are used; some schedulers also scale noise or the model's input."""

    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, **schedule: float) -> None:
        """Prepare the timesteps of a schedule with this number of steps."""

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
        """Return a value whose `prev_sample` is the sample after one step."""


def set_schedule(scheduler: Any, steps: int, schedule: Schedule) -> None:
    """Set a scheduler's timesteps. Lists of `schedule`, such as `sigmas`, are resampled to the number of steps.

    A list has values at the places i / n of its n steps, and ends with 0, which the scheduler adds by itself.
    """
    given = {name: _resampled(value, steps) if isinstance(value, tuple) else value for name, value in schedule.items()}
    scheduler.set_timesteps(steps, **given)


def _resampled(values: tuple[float, ...], steps: int) -> list[float]:
    """Return as many values as steps, linear between the given ones."""
    count = len(values)
    places = np.arange(steps) / steps
    return [float(value) for value in np.interp(places, np.arange(count + 1) / count, [*values, 0.0])]


def check_scheduler(scheduler: object) -> None:
    """Raise RecipeError if an object lacks a method of `Scheduler`."""
    lacking = [name for name in ("set_timesteps", "step") if not callable(getattr(scheduler, name, None))]
    if lacking:
        needed = "set_timesteps(count), timesteps, and step(output, timestep, sample)"
        kind = type(scheduler).__name__
        raise RecipeError(f"model: the scheduler {kind} has no {' and no '.join(lacking)}: a scheduler has {needed}")


def scheduled(scheduler: Scheduler, steps: int, schedule: Schedule) -> Any:
    """Return a copy of a scheduler that has the timesteps of a schedule with this number of steps.

    Raises RecipeError if the scheduler cannot be copied, refuses the schedule, or makes no timesteps.
    """
    kind = type(scheduler).__name__
    try:
        made = copy.deepcopy(scheduler)
    except Exception as e:  # each object has its own reason
        raise RecipeError(
            f"model: the scheduler {kind} cannot be copied, and each run steps a copy: {_raised(e)}: keep no locks,"
            " files or tensors with gradients in it"
        ) from e
    try:
        set_schedule(made, steps, schedule)
        found = timesteps(made)
    except Exception as e:  # each scheduler has its own
        raise RecipeError(
            f"model: the scheduler {kind} makes no schedule of sampling_steps: {steps}: {_raised(e)}"
        ) from e
    if not len(found) or not found.isfinite().all():
        raise RecipeError(
            f"model: the scheduler {kind} makes {len(found)} timesteps of sampling_steps: {steps},"
            f" {int((~found.isfinite()).sum())} of them NaN or Inf: there is at least one, and all are numbers"
        )
    return made


def timesteps(scheduler: Scheduler) -> torch.Tensor:
    """Return the timesteps (T,) of a scheduler, also where it holds them as a list or an array."""
    return torch.as_tensor(scheduler.timesteps).flatten()


def _raised(error: Exception) -> str:
    """Return the kind of an error and its message in one line."""
    return f"{type(error).__name__}: {one_line(error)}"


class SeededScheduler:
    """Scheduler from noise (B, ...) to samples, whose draws are seeded by each sample's noise and the step.

    Where the scheduler adds noise (`Stepping.apart`), every sample is stepped alone, by a copy of its own: what is
    drawn for it does not depend on the other samples, and two runs from the same noise draw the same. Other schedulers
    step all samples in one call. The global generator is left as it was.
    """

    def __init__(self, scheduler: Scheduler, noise: torch.Tensor, stepping: Stepping, own: slice) -> None:
        """Wrap a scheduler whose timesteps are set and that has not been stepped; it is stepped here.

        `own` are the positions of the timesteps that it is stepped from.
        """
        self.timesteps = timesteps(scheduler)[own]
        self.first_scale: torch.Tensor | float = getattr(scheduler, "init_noise_sigma", 1.0)
        self._stepping, apart = stepping, stepping.apart
        self._schedulers = [copy.deepcopy(scheduler) for _ in noise] if apart else [scheduler]
        self._seeds = [_digest(sample.detach().cpu()) for sample in noise] if apart else [b""]
        self._step = 0

    def scaled(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return samples (B, ...) scaled for the denoiser at timestep t."""

        def scale(scheduler: Any, _: int, x: torch.Tensor) -> torch.Tensor:
            at = self._stepping.timestep(t, x)
            scaled: torch.Tensor = getattr(scheduler, "scale_model_input", lambda x, _: x)(x, at)
            return scaled

        return self._each(scale, x)

    def step(self, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return samples (B, ...) at the next timestep, from the denoiser's output (B, ...) for x at timestep t."""

        def step(scheduler: Any, seed: int, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            try:
                with seeded(seed):
                    return _previous(scheduler, output, self._stepping.timestep(t, x), x, generator)
            except IntaglioError:
                raise
            except Exception as e:  # each scheduler has its own
                called = f"model: {type(scheduler).__name__}.step fails at timestep {float(t):g}"
                raise RecipeError(f"{called}, with outputs {tuple(output.shape)}: {_raised(e)}") from e

        stepped = self._each(step, output, x)
        self._step += 1
        return stepped

    def _each(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Call the function with a scheduler, a seed and its samples' part of the tensors, and join what it returns."""
        count = len(self._schedulers)
        if count == 1:
            return function(self._schedulers[0], self._seed(0), *tensors)
        parts = zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)
        found = [function(self._schedulers[i], self._seed(i), *part) for i, part in enumerate(parts)]
        return torch.cat(found)

    def _seed(self, sample: int) -> int:
        """Return the seed of this sample's draws at the present step."""
        digest = hashlib.sha256(self._seeds[sample] + self._step.to_bytes(4, "little")).digest()
        return int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class Stepping:
    """Form of a scheduler's steps.

    `count` is the number of timesteps that it steps from; some list the end of the schedule too. With `by_row` it takes
    one timestep for each sample. `apart`: it draws random numbers in a step, or treats equal samples differently.
    """

    count: int
    by_row: bool = False
    apart: bool = False

    def timestep(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the timestep t, a scalar, in the form that the scheduler takes for samples x (B, ...)."""
        return t.expand(len(x)) if self.by_row else t


def find_stepping(scheduler: Scheduler, noise: torch.Tensor, steps: int) -> Stepping:
    """Return how a scheduler with `steps` steps is stepped: a copy steps two samples like `noise` (1, ...).

    A scheduler that fails in both forms counts as one that draws: the run itself will raise the error.
    """
    total = len(timesteps(scheduler))
    for by_row in (False, True):
        done, apart = _tried(scheduler, noise, Stepping(total, by_row))
        if done == total or (done == steps == total - 1 > 0):
            return Stepping(done, by_row, apart)
    return Stepping(total, apart=True)


@torch.no_grad()
def _tried(scheduler: Scheduler, noise: torch.Tensor, stepping: Stepping) -> tuple[int, bool]:
    """Return the number of steps that succeed, and True if they draw random numbers or treat equal samples differently.

    A copy steps two equal samples like `noise` (1, ...).
    """
    tried: Any = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    output = torch.cat([noise, noise])
    done, apart = 0, False
    try:
        with seeded(0) as drawn:
            x = output * getattr(tried, "init_noise_sigma", 1.0)
            for t in timesteps(tried):
                at = stepping.timestep(t, x)
                getattr(tried, "scale_model_input", lambda x, _: x)(x, at)
                x = _previous(tried, output, at, x, generator)
                first, second = x.nan_to_num().chunk(2)
                apart |= drawn() or not torch.equal(generator.get_state(), state) or not torch.equal(first, second)
                done += 1
    except Exception:  # whatever a scheduler raises: the run itself will raise it too
        return done, apart
    return done, apart


@torch.no_grad()
def reads_variance(scheduler: Scheduler, noise: torch.Tensor) -> bool:
    """Return True if a scheduler reads a learned variance from as many channels again, behind those of the noise.

    Copies of it make the first step of a sample like `noise` (1, C, ...), from two outputs that differ there alone.
    """
    found = []
    for variance in (-noise.tanh(), noise.tanh()):
        tried, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
        try:
            with seeded(0):
                found.append(_previous(tried, torch.cat([noise, variance], 1), timesteps(tried)[0], noise, generator))
        except Exception:  # whatever a scheduler raises for an output that is larger than the sample
            return False
    first, second = found
    return first.shape == noise.shape and not torch.equal(first, second)


def _previous(
    scheduler: Any, output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Make one step of the scheduler, with the generator if it takes one, and return the previous sample."""
    takes = inspect.signature(scheduler.step).parameters
    drawn = {"generator": generator} if "generator" in takes else {}
    named = {"model_output": output, "timestep": t, "sample": x}
    if named.keys() <= takes.keys():  # in any order
        stepped = scheduler.step(**named, **drawn)
    else:
        stepped = scheduler.step(output, t, x, **drawn)
    previous = stepped[0] if isinstance(stepped, tuple | list) and stepped else getattr(stepped, "prev_sample", stepped)
    if not isinstance(previous, torch.Tensor):
        kinds = f"{type(scheduler).__name__}.step returns a {type(stepped).__name__}"
        raise RecipeError(
            f"model: {kinds}: it returns the next sample, a tuple that begins with it, or an object with prev_sample"
        )
    if previous.shape != x.shape and len(timesteps(scheduler)) > 1:
        raise RecipeError(
            f"model: {type(scheduler).__name__}.step returns {tuple(previous.shape)} for samples {tuple(x.shape)}:"
            " the next sample has the shape of the sample"
        )
    return previous.to(x.dtype)


@contextmanager
def seeded(seed: int) -> Iterator[Callable[[], bool]]:
    """Seed the global generators of torch, NumPy and Python, and restore them at the end.

    Yields a function that says if numbers were drawn.
    """
    numbers, state = random.getstate(), np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # the form of `legacy`
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            begun = _generators()
            yield lambda: _generators() != begun
    finally:
        random.setstate(numbers)
        np.random.set_state(state)


def _generators() -> tuple[object, ...]:
    """Return the states of the global generators of torch, Python and NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), rest


def _digest(sample: torch.Tensor) -> bytes:
    """Return a digest of a sample's values."""
    return hashlib.sha256(sample.double().contiguous().numpy().tobytes()).digest()
