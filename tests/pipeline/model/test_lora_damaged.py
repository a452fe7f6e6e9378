"""Attack LoRA files that name a weight twice, or are not whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_folder, tiny_dit

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import LoraRef, ModelRef

LAYER = "transformer_blocks.0.attn1.to_q"
KOHYA = LAYER.replace(".", "_")


def fused(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> torch.Tensor:
    """Return the weight of LAYER after the file was fused."""
    save_folder(tiny_dit(), folder / "model")
    save_file(tensors, folder / "lora.safetensors", metadata)
    ref = ModelRef(path="model", loras=(LoraRef(path="lora.safetensors"),))
    return Checkpoint.resolve(ref, folder).open().module.get_submodule(LAYER).weight


def pair(down: str, up: str, size: float = 0.1) -> dict[str, torch.Tensor]:
    return {down: torch.full((4, 64), size), up: torch.full((64, 4), size)}


def test_a_weight_under_two_names_is_an_error_that_gives_both(tmp_path: Path) -> None:
    tensors = {}
    for number, prefix in enumerate(("lora_unet", "lora_transformer"), start=1):
        tensors |= pair(f"{prefix}_{KOHYA}.lora_down.weight", f"{prefix}_{KOHYA}.lora_up.weight", number)
    message = rf"loras\[0\]: lora_transformer_{KOHYA}\S+ and lora_unet_{KOHYA}\S+ are the same weight .*: remove one"
    with pytest.raises(RecipeError, match=message):
        fused(tmp_path, tensors)


def test_a_dora_without_magnitudes_is_not_fused_as_a_lora(tmp_path: Path) -> None:
    tensors = pair(f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    with pytest.raises(RecipeError, match=rf"has no magnitudes for 1 of 1 layers: {LAYER}: the file is not whole"):
        fused(tmp_path, tensors, metadata)


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"lora\.safetensors holds no tensors: download it again"):
        fused(tmp_path, {})


def test_an_alpha_in_whole_numbers_is_read(tmp_path: Path) -> None:
    tensors = pair(f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight")
    after = fused(tmp_path, tensors | {f"transformer.{LAYER}.alpha": torch.tensor(2)})
    expected = tiny_dit().get_submodule(LAYER).weight + 2 / 4 * 4 * 0.1 * 0.1
    assert torch.allclose(after, expected, rtol=0, atol=1e-6)  # several roundings in float32
