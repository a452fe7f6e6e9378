"""What a pass is: its own options, what it reads, what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State

if TYPE_CHECKING:
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.cost import ModelCost


class Rule(Protocol):
    """What `intaglio explain` says of one rule that a pass checks."""

    @property
    def name(self) -> str:
        """The name that `explain` takes."""

    @property
    def level(self) -> str:
        """How grave a finding is."""

    @property
    def finds(self) -> str:
        """What it looks for."""

    @property
    def fix(self) -> str:
        """What to do about a finding."""

    @property
    def why(self) -> str:
        """The reason, with its source."""


class Pass(BaseModel, ABC):
    """An instance is its own configuration. Equal options, equal inputs and an equal seed give equal outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Same input, other output: raise it."""
    requires: ClassVar[frozenset[AnyKey]]
    wants: ClassVar[frozenset[AnyKey]] = frozenset()
    """What it reads beside, where a step before it provides that: `key in state` tells."""
    provides: ClassVar[frozenset[AnyKey]]
    random: ClassVar[bool] = False
    """May use ctx.rng and ctx.torch_rng; then the seed is part of the cache key."""
    shared: ClassVar[bool] = False
    """All processes of a run take part, each does its share (`ctx.processes`), and each returns the whole outputs."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Distributions whose version is part of the cache key."""

    @classmethod
    def applies(cls, target: "Target") -> bool:
        """Whether the step belongs to the chain of this target."""
        return True

    def check(self, target: "Target") -> None:
        """Holds the options against the target, before anything runs. Raises RecipeError or TargetError."""

    def forward_rows(self, model: "ModelCost") -> int | None:
        """Forward rows of the denoiser that it computes, to estimate its time; None: its time does not go by rows."""
        return None

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        """Return the rules that the pass checks, by name, for `intaglio explain`."""
        return {}

    @abstractmethod
    def run(self, state: State, ctx: "Context") -> Outputs:
        """Returns exactly what the pass provides."""
