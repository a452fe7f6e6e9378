"""Checkpoints in the original layouts of SD3 and Flux, tiny, with random weights: as other tools write them."""

from collections.abc import Iterator

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

WIDTH, TEXT, POOLED = 64, 96, 32
"""Channels of the tiny SD3, of its text, and of the pooled text."""


def sd3() -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """An SD3 of two blocks in the layout of its authors, and the module of diffusers with the same weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    shapes = dict(_sd3_shapes())
    original = {"pos_embed": drawn(1, 64, WIDTH), "x_embedder.proj.weight": drawn(WIDTH, 4, 2, 2)}
    original |= {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    original |= {f"{name}.bias": drawn(shape[0]) for name, shape in shapes.items()}
    original["x_embedder.proj.bias"] = drawn(WIDTH)
    module = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        out_channels=4,
        pos_embed_max_size=8,
    )
    module.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(original)))
    return original, module.eval()


def _sd3_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    yield "t_embedder.mlp.0", (WIDTH, 256)
    yield "t_embedder.mlp.2", (WIDTH, WIDTH)
    yield "y_embedder.mlp.0", (WIDTH, POOLED)
    yield "y_embedder.mlp.2", (WIDTH, WIDTH)
    yield "context_embedder", (WIDTH, TEXT)
    for block in range(2):
        for part in ("x_block", "context_block"):
            last = block == 1 and part == "context_block"
            name = f"joint_blocks.{block}.{part}"
            yield f"{name}.attn.qkv", (3 * WIDTH, WIDTH)
            yield f"{name}.adaLN_modulation.1", ((2 if last else 6) * WIDTH, WIDTH)
            if not last:
                yield f"{name}.attn.proj", (WIDTH, WIDTH)
                yield f"{name}.mlp.fc1", (4 * WIDTH, WIDTH)
                yield f"{name}.mlp.fc2", (WIDTH, 4 * WIDTH)
    yield "final_layer.adaLN_modulation.1", (2 * WIDTH, WIDTH)
    yield "final_layer.linear", (16, WIDTH)


def flux(features: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.nn.Module]:
    """A Flux of two blocks with all rows, but few input features, in both layouts, and an empty module of diffusers.

    Weights need all rows, because the conversion of diffusers works for 3072 channels only.
    """
    generator, d = torch.Generator().manual_seed(0), 3072
    rows = {"img_in": d, "txt_in": d, "time_in.in_layer": d, "time_in.out_layer": d, "vector_in.in_layer": d}
    rows |= {"vector_in.out_layer": d, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * d}
    for part in ("img", "txt"):
        name = f"double_blocks.0.{part}"
        rows |= {f"{name}_mod.lin": 6 * d, f"{name}_attn.qkv": 3 * d, f"{name}_attn.proj": d}
        rows |= {f"{name}_mlp.0": 4 * d, f"{name}_mlp.2": d}
    name = "single_blocks.0"
    rows |= {f"{name}.linear1": 7 * d, f"{name}.linear2": d, f"{name}.modulation.lin": 3 * d}
    original = {f"{name}.weight": torch.randn(count, features, generator=generator) for name, count in rows.items()}
    original |= {f"{name}.bias": torch.randn(count, generator=generator) for name, count in rows.items()}
    norms = [f"double_blocks.0.{part}_attn" for part in ("img", "txt")] + ["single_blocks.0"]
    for norm in norms:
        original |= {
            f"{norm}.norm.{part}_norm.scale": torch.randn(128, generator=generator) for part in ("query", "key")
        }
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    return original, convert_flux_transformer_checkpoint_to_diffusers(dict(original)), module
