"""What one runtime on one device can execute, as data."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field

from intaglio.pipeline.errors import RecipeError, did_you_mean

OpKind: TypeAlias = Literal["linear", "conv"]


class Fact(BaseModel):
    """One statement the target rests on, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fact: str
    source: str


class Target(BaseModel):
    """Constraints only: what is not listed is not executed. An artifact, so that only passes that read it run again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    description: str
    opset_max: int = Field(ge=20, description="highest ONNX opset the runtime reads")
    formats: Mapping[OpKind, tuple[str, ...]] = Field(
        description="schemes the runtime executes, for each kind of layer"
    )
    group_sizes: tuple[int, ...] = Field(description="input features that share one weight scale, for grouped weights")
    activation_dtype: Literal["uint8", "int8"] = Field(description="how 8-bit activation codes are written")
    conv_output: Literal["float", "int8"] = Field(
        "float", description="int8 where convolutions run on integers only if they also give 8-bit codes"
    )
    facts: tuple[Fact, ...] = ()

    def save(self, root: Path) -> None:
        (root / "target.json").write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        return cls.model_validate_json((root / "target.json").read_text(encoding="utf-8"))


def target_names() -> tuple[str, ...]:
    """The names of the targets that come with intaglio, sorted."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml")))


def load_target(name: str) -> Target:
    """Raises RecipeError for an unknown name."""
    if name not in target_names():
        raise RecipeError(f"no target {name!r}{did_you_mean(name, target_names())}")
    return Target.model_validate({"name": name, **yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))})


_FOLDER = files("intaglio.pipeline") / "targets"
