"""Define artifacts, which passes exchange, their keys, and the state that a step may read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeAlias, TypeVar

from intaglio.pipeline.errors import ContractError


class Artifact(Protocol):
    """Value that passes exchange. Its content is the files that `save` writes; equal content means equal bytes.

    Nothing that is saved may depend on the order of a set.
    """

    def save(self, root: Path) -> None:
        """Write the artifact to files in a folder."""

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read the artifact from the files that `save` wrote."""


A = TypeVar("A", bound=Artifact)
A_co = TypeVar("A_co", bound=Artifact, covariant=True)


@dataclass(frozen=True)
class Key(Generic[A_co]):
    """Name of one artifact in a chain. The files of a published artifact are delivered to the user."""

    name: str
    type: type[A_co]
    published: bool = False

    def __str__(self) -> str:
        return self.name


AnyKey: TypeAlias = Key[Artifact]
Outputs: TypeAlias = Mapping[AnyKey, Artifact]


class State(Mapping[AnyKey, Artifact]):
    """Artifacts that one step may read, each a fresh copy.

    They are those that it requires, and those of `wants` that an earlier step provides.
    """

    def __init__(self, artifacts: Mapping[AnyKey, Artifact], *, reader: str) -> None:
        self._artifacts = dict(artifacts)
        self._reader = reader

    def __getitem__(self, key: Key[A]) -> A:
        try:
            artifact = self._artifacts[key]
        except KeyError:
            readable = ", ".join(sorted(map(str, self._artifacts))) or "nothing"
            raise ContractError(
                f"{self._reader}: reads {key}, but may read {readable}: add {key} to `requires`, or to `wants` and ask"
                f" `{key} in state` first"
            ) from None
        assert isinstance(artifact, key.type)  # the store loaded it with key.type.load
        return artifact

    def find(self, key: Key[A]) -> A | None:
        """Return the artifact, or None if no earlier step provides it. `get` raises, as every unknown key does."""
        return self[key] if key in self else None  # noqa: SIM401

    def __contains__(self, key: object) -> bool:
        return key in self._artifacts

    def __iter__(self) -> Iterator[AnyKey]:
        return iter(self._artifacts)

    def __len__(self) -> int:
        return len(self._artifacts)
