"""Define the base class of passes: its options, its inputs and its outputs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue

from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State

if TYPE_CHECKING:
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.cost import ModelCost


class Rule(Protocol):
    """One rule that a pass checks, as `intaglio explain` shows it."""

    @property
    def name(self) -> str:
        """The name that `explain` takes."""

    @property
    def level(self) -> str:
        """Severity of a finding."""

    @property
    def finds(self) -> str:
        """Fault that the rule looks for."""

    @property
    def fix(self) -> str:
        """Advice on a finding."""

    @property
    def why(self) -> str:
        """The reason, with its source."""


class Pass(BaseModel, ABC):
    """One pass with its options. Equal options, equal inputs and an equal seed give equal outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Version of the pass: raise it whenever the same input gives another output."""
    requires: ClassVar[frozenset[AnyKey]]
    wants: ClassVar[frozenset[AnyKey]] = frozenset()
    """Optional inputs, read if an earlier step provides them; test with `key in state`."""
    provides: ClassVar[frozenset[AnyKey]]
    random: ClassVar[bool] = False
    """True if the pass uses ctx.rng or ctx.torch_rng; then the seed is part of the cache key."""
    shared: ClassVar[bool] = False
    """True if several processes can run the step together.

    Each computes its share (`ctx.processes`), and all return the same, complete outputs."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are part of the cache key."""
    efforts: ClassVar[tuple[Mapping[str, JsonValue], ...]] = ()
    """Amounts for a run in limited time, such as `{"samples": 8}`: the first for the most time, each next one for less.

    `intaglio run --minutes` takes the same place of every pass, or its last, and keeps options that a recipe gives."""

    @classmethod
    def applies(cls, target: "Target") -> bool:
        """Return True if the step belongs to the chain of this target."""
        return True

    def check(self, target: "Target") -> None:
        """Check the options against the target before anything runs. Raises RecipeError or TargetError."""

    def forward_rows(self, model: "ModelCost") -> int | None:
        """Return the number of denoiser rows that the pass computes, to estimate its time; None if unknown.

        A row is one sample in one call of the denoiser; with guidance, a sample has two.
        """
        return None

    def holds_weights(self) -> bool:
        """Return True if the pass holds all of the model's weights in memory, such as rounded or trained ones.

        Then a run is refused where the machine has too little memory for them.
        """
        return False

    def holds_blocks(self) -> bool:
        """Return True if the pass holds the weights of one block of the model at a time, such as to train them."""
        return False

    def stored_bytes(self, parameters: int, in_files: int) -> int:
        """Return about how many bytes the step writes to the disk, for a denoiser of so many parameters; 0 if few.

        `in_files` is the number of those that stay in the model's own files, and are read one weight at a time.
        """
        return 0

    def plugins(self) -> Iterable[tuple[str, str]]:
        """Return the entry points that the options select, as pairs of a group and a name.

        If another distribution provides one, its version and its source are part of the cache key.
        """
        return ()

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        """Return the rules that the pass checks, by name, for `intaglio explain`."""
        return {}

    @abstractmethod
    def run(self, state: State, ctx: "Context") -> Outputs:
        """Run the pass. Returns exactly the artifacts that it provides."""
