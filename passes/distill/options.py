"""Define the options of a distillation, which its parts read without knowing the pass."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DistillOptions(BaseModel):
    """The options of `Distill`, in the order in which its schema lists them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    updates: int = Field(120, ge=0, description="optimizer updates; 0 keeps the rounded weights as they are")
    samples: int = Field(8, ge=1, description="samples an update, each with its conditional and its null row")
    rank: int = Field(16, ge=1, description="rank of the adapters")
    rate: float = Field(0.02, gt=0, description="learning rate of the adapters, in weight scales an update")
    scale_rate: float = Field(0.001, ge=0, description="learning rate of the weight scales, relative to themselves")
    input_rate: float = Field(
        0.01, ge=0, description="learning rate of the input scales, relative to themselves; 0 leaves them as calibrated"
    )
    scale_aware: Literal["rate", "gradient", "off"] = Field(
        "rate", description="where a layer's weight scale enters: its learning rate, its gradient, or not at all"
    )
    start: Literal["round", "gptq"] = Field(
        "round", description="codes to start from: nearest to the weight, or to the layer's output"
    )
    base: Literal["float", "grid"] = Field(
        "float", description="grid: the adapters are added to the rounded weight, and move no code until they are large"
    )
    rollout: float = Field(
        0.0, ge=0, le=1, description="share of updates on states that the quantized model reached by itself"
    )
    weighting: Literal["samples", "output"] = Field(
        "output",
        description="how much the error of a step's output counts: as much as samples feel of it, or all steps alike",
    )
    features: float = Field(
        0.0, ge=0, description="weight of the blocks' outputs in the loss, beside 1 for the denoiser's output"
    )
    scope: Literal["model", "block"] = Field(
        "model",
        description="block: one block after the other, each on its own output; `updates` are those of a block, and"
        " layers outside of blocks stay as they start",
    )
    recompute: bool = Field(
        False, description="compute the activations of blocks anew for the backward pass: less memory, more time"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products while training; codes and scales are float32 throughout"
    )

    @property
    def distance(self) -> float:
        """How far from their codes, in scales, weights begin that do not begin as the model's own."""
        from intaglio.pipeline.numerics import rounding as affine

        return affine.NEARLY_HALF if self.base == "float" else 0.0
