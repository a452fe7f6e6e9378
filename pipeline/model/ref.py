"""Names the model of a recipe and how it is sampled, as the recipe writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    pass


DENOISER_FOLDERS = ("transformer", "unet", ".")


class LoraRef(BaseModel):
    """One style LoRA, an entry of a recipe's `model.loras`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="a safetensors file as diffusers' save_lora_weights or save_lora_adapter writes it, or its folder"
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="factor of its change of the weights")


class ModelRef(BaseModel):
    """Where the model is, and how it is sampled: a recipe's `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a diffusers folder, `./file.py:factory`, or a hub id as `hub:owner/name`")
    sampling_steps: int = Field(20, ge=1, le=1000, description="denoising steps of the sampler")
    guidance: float = Field(1.0, ge=1.0, description="classifier-free guidance; 1.0 is none")
    conditions: str | None = Field(
        None,
        description="what a folder's denoiser takes beside sample and timestep: a file of intaglio.record",
    )
    other_size: tuple[int, ...] | str | None = Field(
        None,
        description="a second size of a folder's calls: one sample's shape, or a second file of conditions;"
        " axes that have another size there are dynamic",
    )
    loras: tuple[LoraRef, ...] = Field(
        (), description="style LoRAs, fused into the denoiser's weights in this order before anything is measured"
    )
