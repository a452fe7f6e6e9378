"""Define facts about the machine that intaglio runs on: packages, GPUs, and the abilities of each target."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A package that `doctor` looks for: the first of these distributions that is installed."""

    distributions: tuple[str, ...]
    module: str
    serves: str
    """Purpose of the package, in a few words."""
    install: str
    """One way to install it."""
    compiles: bool = False
    """Without it nothing is compiled, for any target."""
    light: bool = False
    """It is imported in any case: whether it works depends on the machine, and its import is fast."""


@dataclass(frozen=True)
class Found:
    """One package: its version, None if it is not installed, and why it cannot be imported, if that was tried."""

    module: str
    version: str | None
    fault: str | None
    serves: str
    install: str

    @property
    def works(self) -> bool:
        """True if the package is installed and no fault is known."""
        return self.version is not None and self.fault is None

    @property
    def lack(self) -> str:
        """Command that installs it; if it is installed and does not work, the fact that it is broken."""
        return self.install if self.version is None else f"{self.module} is broken"


@dataclass(frozen=True)
class Ability:
    """An ability of this machine: possible or not, and how, or what it needs."""

    here: bool
    how: str


@dataclass(frozen=True)
class Abilities:
    """Abilities of this machine for one target."""

    compile: Ability
    build: Ability
    run: Ability
    verify: Ability


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True)
class Fact:
    """A fact that a runtime found on this machine: a value for JSON, and the same as a line of text."""

    value: object
    text: str


@dataclass(frozen=True)
class Machine:
    """Everything that was found. `faults` has the error of each question that could not be answered."""

    python: str
    system: str
    cpu: str
    cores: int | None
    cpu_features: Mapping[str, bool] | None
    """None where the system does not say."""
    memory_bytes: int | None
    """Bytes of memory and swap, or less if the process is limited."""
    packages: Mapping[str, Found]
    """Packages by distribution."""
    facts: Mapping[str, Fact]
    """Facts found by runtimes, by name."""
    gpus: tuple[Gpu, ...]
    faults: Mapping[str, str]
    targets: Mapping[str, Abilities]

    def package(self, module: str) -> Found:
        """Return what is known of the package that has this module."""
        return next(each for each in self.packages.values() if each.module == module)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, each fact under its own name."""
        found = asdict(self)
        del found["facts"]
        return found | {name: fact.value for name, fact in self.facts.items()}


class Faults(dict[str, str]):
    """Questions that failed, with the reason."""

    def ask(self, what: str, ask: Callable[[], T]) -> T | None:
        """Return the answer; None if the query raises, which is a fault."""
        try:
            return ask()
        except Exception as error:  # a broken installation can raise anything
            self[what] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return None
