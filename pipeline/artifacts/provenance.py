"""The origin of one target's files: the recipe, the artifacts at the start, and the steps so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.files import read_typed, write_typed

FILE = "provenance.json"


@dataclass(frozen=True)
class Provenance:
    """The recipe, and the steps that ran before the step that reads this artifact.

    In the manifest, these are all steps of the target.
    """

    recipe: Recipe
    """The recipe with every option of every step."""
    start: Mapping[str, str]
    """Key name -> digest of each artifact that was there before the first step."""
    runs: tuple[RunRecord, ...]

    def save(self, root: Path) -> None:
        """Write provenance.json."""
        write_typed(root / FILE, _Content(self.recipe.to_yaml(), self.start, self.runs), _Content)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        content = read_typed(root / FILE, _Content)
        return cls(Recipe.parse(content.recipe, source=f"{root / FILE}: recipe"), content.start, content.runs)


@dataclass(frozen=True)
class _Content:
    """The content of provenance.json: the recipe is its YAML text."""

    recipe: str
    start: Mapping[str, str]
    runs: tuple[RunRecord, ...]
