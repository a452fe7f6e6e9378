"""Give a running step its scratch space, seeded generators, device, log and progress bar."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from intaglio.pipeline.contract.artifact import A, Key
from intaglio.pipeline.contract.processes import Processes
from intaglio.pipeline.errors import ContractError

if TYPE_CHECKING:
    import numpy
    import torch
    from rich.console import Console

Advance: TypeAlias = Callable[..., None]
"""Function that moves a progress bar by n: advance(n: int = 1)."""

LOG_EVERY_S = 10.0


class Keep(Protocol):
    """Returns an artifact that depends on the step's model and on `about` alone, made by `make` if nobody has it."""

    def __call__(self, key: Key[A], about: Mapping[str, object], make: Callable[[], A]) -> A:
        """Return the artifact. `about` can be written as JSON."""


def make_anew(key: Key[A], about: Mapping[str, object], make: Callable[[], A]) -> A:
    """Make the artifact: the `keep` of a step without a store."""
    return make()


@dataclass(frozen=True)
class Context:
    """Give a pass its randomness, device, terminal and a folder for checkpoints.

    A pass that takes its randomness only from here gives the same result in every run.
    """

    scratch: Path
    """Folder for checkpoints: kept if the run is killed, found again by the same step, removed when it succeeds."""
    seed: int | None = 0
    """Seed of the recipe; None for a pass that does not declare `random`."""
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("intaglio"))
    processes: Processes = field(default_factory=Processes)
    """Processes that run the step together; more than one only for a `shared` pass."""
    keep: Keep = make_anew
    """Function that shares what depends on the model alone with all steps that ask for the same, in this and in later
    runs with the store: `ctx.keep(SAMPLES, {"start": digest}, draw)`."""

    @cached_property
    def device(self) -> str:
        """Return "cuda" if torch finds a GPU, else "cpu"."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def rng(self, *labels: str | int) -> "numpy.random.Generator":
        """Return a generator that depends only on the recipe's seed and the labels."""
        import numpy

        return numpy.random.default_rng(self._entropy(labels))

    def torch_rng(self, *labels: str | int) -> "torch.Generator":
        """Return a torch generator on the CPU, seeded as in `rng`."""
        import torch

        return torch.Generator().manual_seed(self._entropy(labels) % 2**63)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Advance]:
        """Yield `advance(n=1)`: a progress bar on a terminal, else a log line every 10 s; only in the first process."""
        if not self.processes.first:
            yield lambda n=1: None
            return
        console = terminal()
        if not console.is_terminal:
            yield _logged_progress(self.log, description, total)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda n=1: bars.advance(task, n)

    def _entropy(self, labels: tuple[str | int, ...]) -> int:
        if self.seed is None:
            raise ContractError(f"{self.log.name}: asks for random numbers without declaring it: set random = True")
        text = json.dumps([self.seed, *labels])
        return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


@cache
def terminal() -> "Console":
    """Return the console on stderr that bars and log lines share; stdout is for results."""
    from rich.console import Console

    return Console(stderr=True)


def _logged_progress(log: logging.Logger, description: str, total: int) -> Advance:
    done, logged_at = 0, time.monotonic()

    def advance(n: int = 1) -> None:
        nonlocal done, logged_at
        done += n
        if done >= total or time.monotonic() - logged_at >= LOG_EVERY_S:
            logged_at = time.monotonic()
            log.info("%s %d/%d", description, done, total)

    return advance
