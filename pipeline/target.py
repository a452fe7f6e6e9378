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


class Limits(BaseModel):
    """What becomes of a graph, as far as `lint` looks. Where each line comes from is in the target's `facts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ir_version_max: int | None = Field(None, description="highest IR version; None: the runtime does not look at it")
    unsupported: tuple[str, ...] = Field(
        (), description="refused: an operator, Op-N as opset N and later define it, Op.attribute where it is not 0"
    )
    domains: tuple[str, ...] = Field((), description="domains of operators it has beside those of ONNX")
    float32_attention: bool = Field(True, description="takes the operator Attention in float32 with heads as an axis")
    code_types: tuple[str, ...] = Field(description="types of quantized tensors that it reads for what they are")
    symmetric: bool = Field(description="zero points are zero, and scales positive")
    constant_scales: bool = Field(description="a scale that the graph computes keeps a product off the integers")
    mixed_scale_types: bool = Field(description="a tensor may be quantized with a scale of another type")
    reciprocal_scales: bool = Field(False, description="quantizes with 1 / scale, rounded to the scale's type")
    codes_only_dequantized: bool = Field(description="constant codes may not be moved or cast before they are scaled")
    integer_products: Mapping[str, Literal["input", "output"]] = Field(
        description="operators that run on integers with 8-bit operands, and those that need an 8-bit output as well"
    )
    one_element_scales: tuple[str, ...] = Field(description="products that take a scale of shape (1,) for a scalar")
    int4_by_int8: tuple[OpKind, ...] = Field(description="layers that multiply an 8-bit input by a 4-bit weight")
    mixed_pairs: bool = Field(True, description="codes made with one scale may be read with one for each channel")
    unscaled_half_sums: bool = Field(False, description="a float16 product is written before its channels are scaled")
    ragged_groups: bool = Field(description="the last group of weights may be shorter")
    trailing_groups: bool = Field(description="groups lie along the last axis or the one before it")
    int4_rank_max: int | None = Field(None, description="axes of a 4-bit weight; None: any number")
    moves_int8: bool = Field(True, description="codes of an 8-bit signed input can be moved about from opset 21 on")


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
    float_type: Literal["float32", "float16"] = Field(
        "float32", description="what computes in floating point is of this type, where its range and precision do"
    )
    conv_output: Literal["float", "int8"] = Field(
        "float", description="int8 where convolutions run on integers only if they also give 8-bit codes"
    )
    limits: Limits
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
