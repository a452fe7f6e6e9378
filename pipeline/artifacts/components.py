"""A compiled pipeline: its settings, and the graphs and engines of the models around the denoiser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from intaglio.pipeline.files import read_typed, write_typed
from intaglio.pipeline.model.pipeline_folder import INDEX, WEIGHTS, PipelineFolder

COMPILED = "components.json"


@dataclass(frozen=True)
class _OfPipeline:
    """Artifact whose content is the folder `pipeline`; `root` is the path of this folder."""

    root: Path

    def save(self, root: Path) -> None:
        """Copy the folder `pipeline`."""
        shutil.copytree(self.root, root / "pipeline")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        return cls(root / "pipeline")


@dataclass(frozen=True)
class Compiled:
    """The target that a component was compiled for, and the class that each of its methods returns."""

    target: str
    returns: Mapping[str, str]
    """Method -> `module:name`, empty where it returns a tuple."""


@dataclass(frozen=True)
class Components(_OfPipeline):
    """The folder `pipeline`: a copy of the model's pipeline that holds graphs in the place of weights.

    `pipeline/vae/decode` holds the graph of the method `decode` of `vae`; `components.json` holds `Compiled` for each
    component.
    """

    @classmethod
    def write(
        cls, root: Path, folder: PipelineFolder, compiled: Mapping[str, Compiled], without: Collection[str]
    ) -> Self:
        """Copy the pipeline's files, except weights, into `root`, which already holds the graphs.

        The index of the pipeline and `components.json` are written there too. Components in `without` are left out of
        the pipeline.
        """
        keep = shutil.ignore_patterns(*WEIGHTS)
        for name in folder.classes():
            if (folder.root / name).is_dir() and name not in (*folder.denoisers, *without):
                shutil.copytree(folder.root / name, root / name, ignore=keep, dirs_exist_ok=True)
        index = folder.index() | {name: [None, None] for name in without}
        (root / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        write_typed(root / COMPILED, dict(compiled), dict[str, Compiled], sort_keys=True)
        return cls(root)

    @property
    def compiled(self) -> dict[str, Compiled]:
        """Component -> its target and the classes of its outputs."""
        return read_typed(self.root / COMPILED, dict[str, Compiled], inside=self.root)


@dataclass(frozen=True)
class ComponentEngines(_OfPipeline):
    """The folder `pipeline` with the engines of its graphs: engine.json and engine.plan beside each graph."""
