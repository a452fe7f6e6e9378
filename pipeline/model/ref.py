"""Describe the model of a recipe and its sampling, as the recipe writes them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

DENOISER_FOLDERS = ("transformer", "unet", ".")


class LoraRef(BaseModel):
    """Style LoRA: one entry of a recipe's `model.loras`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="a safetensors file as diffusers' save_lora_weights or save_lora_adapter writes it, or its folder"
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="factor on the change of the weights")


class ModelRef(BaseModel):
    """Path of the model and settings of its sampler: a recipe's `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a diffusers folder, `./file.py:factory`, or a hub id as `hub:owner/name`")
    subfolder: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        exclude_if=lambda name: name is None,
        description="folder of the denoiser in a diffusers folder, if it is neither transformer nor unet, such as"
        " transformer_2",
    )
    sampling_steps: int = Field(20, ge=1, le=1000, description="denoising steps of the sampler")
    guidance: float = Field(1.0, ge=1.0, description="classifier-free guidance scale; 1.0 means none")
    conditions: str | None = Field(
        None,
        description="inputs of a folder's denoiser besides sample and timestep: a file that intaglio.record wrote",
    )
    other_size: tuple[int, ...] | str | None = Field(
        None,
        description="a second size of the model's calls: the shape of one sample, or a second file of conditions"
        "; axes whose size differs become dynamic",
    )
    loras: tuple[LoraRef, ...] = Field(
        (), description="style LoRAs, fused into the denoiser's weights in this order before anything is measured"
    )

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of folders that may hold the denoiser, the preferred first."""
        return DENOISER_FOLDERS if self.subfolder is None else (self.subfolder,)
