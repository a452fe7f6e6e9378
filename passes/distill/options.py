"""Define the options of a distillation, which its parts read without knowing the pass."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DistillOptions(BaseModel):
    """The options of `Distill`, in the order in which its schema lists them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    updates: int = Field(
        120,
        ge=0,
        description="optimizer updates, at most; 0 trains nothing: scales are fitted only. Training ends earlier if two"
        " checks in a row find no state with better samples",
    )
    enough_db: float = Field(
        45,
        description="PSNR of the drawn samples in dB that is enough: if they have it at the start, nothing is trained",
    )
    samples: int = Field(8, ge=1, description="samples per update, each with its conditional and its null row")
    drawn: int = Field(
        4, ge=1, description="samples drawn at the start and at each check; the state with their least error is kept"
    )
    rank: int = Field(16, ge=1, description="rank of the adapters")
    rate: float = Field(0.02, gt=0, description="learning rate of the adapters, in weight scales per update")
    scale_rate: float = Field(0.001, ge=0, description="learning rate of the weight scales, relative to their size")
    input_rate: float = Field(
        0.01, ge=0, description="learning rate of the input scales, relative to their size; 0 leaves them as calibrated"
    )
    scale_aware: Literal["rate", "gradient", "off"] = Field(
        "rate",
        description="quantity that a layer's weight scale multiplies: the learning rate (rate), the gradient (gradient)"
        " or nothing (off)",
    )
    start: Literal["round", "gptq"] = Field(
        "round",
        description="codes to start from: those with the least error of the weight (round) or, for weights of at most 4"
        " bits, of the layer's output (gptq)",
    )
    base: Literal["float", "grid"] = Field(
        "float",
        description="weight that the adapters are added to: the float weight (float) or the rounded weight (grid)."
        " With grid, a code changes only if the adapters add more than half a scale",
    )
    rollout: float = Field(
        0.0, ge=0, le=1, description="share of updates on states that the quantized model reached by itself"
    )
    weighting: Literal["samples", "output"] = Field(
        "samples",
        description="weight of each step's output error: its effect on the samples (samples), or 1 (output)",
    )
    features: float = Field(
        0.0, ge=0, description="weight of the blocks' outputs in the loss; the denoiser's output has the weight 1"
    )
    scope: Literal["model", "block"] = Field(
        "model",
        description="model: train all layers on the denoiser's output; block: train one block after the other on its"
        " own output, with `updates` for each block; layers outside of blocks then keep their starting weights",
    )
    recompute: bool = Field(
        False, description="compute activations of blocks again in the backward pass: less memory, more time"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the products in training; codes and scales are always float32"
    )

    @property
    def by_block(self) -> bool:
        """True for a training that needs the weights of one block in memory, and no others."""
        return self.updates > 0 and self.scope == "block" and self.start == "round" and self.base == "float"

    @property
    def distance(self) -> float:
        """Maximum distance, in weight scales, between a starting weight and its starting code."""
        from intaglio.pipeline.numerics import rounding

        return rounding.NEARLY_HALF if self.base == "float" else 0.0
