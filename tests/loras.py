"""LoRAs with random updates of the attention of tiny models, in files and fused."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import LoraRef, ModelRef

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def adapted(module: torch.nn.Module, seed: int = 0, **options) -> tuple[torch.nn.Module, LoraConfig]:
    """The module with random updates of its attention; B, which begins at zero, is as after a training."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": "gaussian"} | options
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return module, config


def written(module: torch.nn.Module, folder: Path, seed: int = 0, **options) -> Path:
    """As a trainer without diffusers' loader writes it."""
    module, config = adapted(module, seed, **options)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"lora_adapter_metadata": json.dumps(config.to_dict(), default=list)}
    save_file(get_peft_model_state_dict(module), folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def with_loras(folder: Path, *loras: tuple[str, float], **ref) -> Checkpoint:
    """`folder/model` with these LoRAs, out of the store: nothing beside the recipe is there any more."""
    refs = tuple(LoraRef(path=path, scale=scale) for path, scale in loras)
    checkpoint = Checkpoint.resolve(ModelRef(path="model", sampling_steps=2, loras=refs, **ref), folder)
    stored = folder / "stored"
    stored.mkdir()
    checkpoint.save(stored)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return Checkpoint.load(stored)
