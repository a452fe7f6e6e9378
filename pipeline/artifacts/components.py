"""A whole pipeline: the folder of its models and settings, and what the models around the denoiser were compiled to."""

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
    """Files in the folder `pipeline` of a compiled one."""

    root: Path

    def save(self, root: Path) -> None:
        """Copy it."""
        shutil.copytree(self.root, root / "pipeline")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        return cls(root / "pipeline")


@dataclass(frozen=True)
class Compiled:
    """What a component was compiled for, and the class that each of its methods returns."""

    target: str
    returns: Mapping[str, str]
    """`module:name`, or nothing for a tuple."""


@dataclass(frozen=True)
class Components(_OfPipeline):
    """The folder `pipeline` of a compiled one: a pipeline's without weights, and graphs in their place.

    `pipeline/vae/decode` holds the graph of the method `decode` of `vae`; `components.json` says what each component
    was compiled for, and what class each method's output has.
    """

    @classmethod
    def write(
        cls, root: Path, folder: PipelineFolder, compiled: Mapping[str, Compiled], without: Collection[str]
    ) -> Self:
        """Into the folder with the graphs, what is needed beside them: every file but weights. Changes the folder."""
        keep = shutil.ignore_patterns(*WEIGHTS)
        for name in folder.classes():
            if (folder.root / name).is_dir() and name not in (folder.denoiser, *without):
                shutil.copytree(folder.root / name, root / name, ignore=keep, dirs_exist_ok=True)
        index = folder.index() | {name: [None, None] for name in without}
        (root / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        write_typed(root / COMPILED, dict(compiled), dict[str, Compiled], sort_keys=True)
        return cls(root)

    @property
    def compiled(self) -> dict[str, Compiled]:
        """By name of the component."""
        return read_typed(self.root / COMPILED, dict[str, Compiled], inside=self.root)


@dataclass(frozen=True)
class ComponentEngines(_OfPipeline):
    """What a runtime made of the graphs in the folder `pipeline`: engine.json and engine.plan beside each of them."""
