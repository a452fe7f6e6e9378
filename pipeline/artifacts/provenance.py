"""Where the files of one target come from: the recipe, what there was at the start, and the steps so far."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.files import read_typed

FILE = "provenance.json"


@dataclass(frozen=True)
class Provenance:
    """What came before: for a step that wants it the steps before it, for a finished chain all of them."""

    recipe: Recipe
    """With every option of every step."""
    start: Mapping[str, str]
    """Key name -> digest of what there was before the first step."""
    runs: tuple[RunRecord, ...]

    def save(self, root: Path) -> None:
        """Write provenance.json."""
        runs = [run.model_dump(mode="json") for run in self.runs]
        content = {"recipe": self.recipe.to_yaml(), "start": dict(self.start), "runs": runs}
        (root / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        content = read_typed(root / FILE, _Content)
        return cls(Recipe.parse(content.recipe, source=f"{root / FILE}: recipe"), content.start, content.runs)


@dataclass(frozen=True)
class _Content:
    """Content of provenance.json."""

    recipe: str
    start: Mapping[str, str]
    runs: tuple[RunRecord, ...]
