"""Tiny transformers with random weights that draw images.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _flux_ids, _make, _mask, _noise, _rows, _two_texts

from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize


def dit() -> DenoiserModel:
    module = _make(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=3,
            out_channels=6,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=4,
        )
    )
    return DenoiserModel(module, _noise(), (3, 8, 8), classes=4)  # one size: its positions are a table


def pixart() -> DenoiserModel:
    module = _make(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=48,
            num_layers=1,
            cross_attention_dim=96,
            sample_size=8,
            caption_channels=64,
            use_additional_conditions=True,
        )
    )
    conditions = {
        "encoder_hidden_states": _rows(5, 64),
        "encoder_attention_mask": _mask(5),
        "added_cond_kwargs.resolution": torch.full((ROWS, 2), 64.0),
        "added_cond_kwargs.aspect_ratio": torch.ones(ROWS, 1),
    }
    null = {"encoder_hidden_states": _rows(5, 64, seed=2)[:1]}
    other = SecondSize((4, 8, 8), {"encoder_hidden_states": _rows(7, 64), "encoder_attention_mask": _mask(7)})
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=conditions, null=null, other=other)


def sd3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64), "pooled_projections": _rows(64, seed=2)}
    null = {name: rows[:1] * 0 for name, rows in conditions.items()}
    other = SecondSize((16, 8, 12), {"encoder_hidden_states": _rows(7, 64)})
    return DenoiserModel(module, _flow(), (16, 8, 8), conditions=conditions, null=null, other=other)


def auraflow() -> DenoiserModel:
    module = _make(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pos_embed_max_size=64,
        )
    )
    other = SecondSize((4, 8, 8), {"encoder_hidden_states": _rows(7, 64)})  # positions are chosen from a table
    text = {"encoder_hidden_states": _rows(5, 64)}
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=text, timestep_scale=1e-3, other=other)


def cogview4() -> DenoiserModel:
    module = _make(
        lambda: diffusers.CogView4Transformer2DModel(
            num_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            text_embed_dim=64,
            time_embed_dim=64,
            condition_dim=32,
            pos_embed_max_size=16,
            sample_size=8,
            rope_axes_dim=(16, 16),
        )
    )
    sizes = {name: torch.full((ROWS, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")}
    other = SecondSize((16, 8, 12), {"encoder_hidden_states": _rows(7, 64)})
    conditions = {"encoder_hidden_states": _rows(5, 64), **sizes}
    return DenoiserModel(module, _flow(), (16, 8, 8), conditions=conditions, other=other)


def flux2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=64,
            timestep_guidance_channels=64,
            axes_dims_rope=(8, 8, 8, 8),
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64), "guidance": torch.full((ROWS,), 3.5)}
    other = SecondSize((24, 64), {"encoder_hidden_states": _rows(7, 64)}, _flux_ids(7, 4, 6, 4))
    shared = _flux_ids(5, 4, 4, 4)
    return DenoiserModel(
        module, _flow(), (16, 64), conditions=conditions, shared=shared, timestep_scale=1e-3, other=other
    )


def flux() -> DenoiserModel:
    module = _make(
        lambda: diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    )
    conditions = {
        "encoder_hidden_states": _rows(5, 64),
        "pooled_projections": _rows(64, seed=2),
        "guidance": torch.full((ROWS,), 3.5),
    }
    other = SecondSize((24, 64), {"encoder_hidden_states": _rows(7, 64)}, _flux_ids(7, 4, 6))
    return DenoiserModel(
        module, _flow(), (16, 64), conditions=conditions, shared=_flux_ids(5, 4, 4), timestep_scale=1e-3, other=other
    )


def sana() -> DenoiserModel:
    module = _make(
        lambda: diffusers.SanaTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=64,
            sample_size=8,
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64), "encoder_attention_mask": _mask(5)}
    changed = {"encoder_hidden_states": _rows(7, 64), "encoder_attention_mask": _mask(7)}
    return DenoiserModel(module, _flow(), (32, 8, 8), conditions=conditions, other=SecondSize((32, 8, 12), changed))


def qwen_image() -> DenoiserModel:
    # one size: the sizes of the image are an argument that is no tensor
    module = _make(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            **HEADS,
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64), "encoder_hidden_states_mask": _mask(5)}
    sizes = {"img_shapes": [[[1, 4, 4]]]}
    return DenoiserModel(module, _flow(), (16, 16), conditions=conditions, constants=sizes, timestep_scale=1e-3)


def lumina2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=64,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=32,
            axes_dim_rope=(8, 12, 12),
            axes_lens=(64, 16, 16),
            cap_feat_dim=64,
        )
    )
    # one size, as for all models that torch traces row by row
    conditions = {"encoder_hidden_states": _rows(5, 64), "encoder_attention_mask": _mask(5)}
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=conditions)


def chroma() -> DenoiserModel:
    module = _make(
        lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=16,
            approximator_hidden_dim=64,
            approximator_layers=1,
            **HEADS,
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64), "attention_mask": torch.ones(ROWS, 21)}
    shared = _flux_ids(5, 4, 4)
    return DenoiserModel(module, _flow(), (16, 16), conditions=conditions, shared=shared, timestep_scale=1e-3)


def hunyuan_image() -> DenoiserModel:
    module = _make(
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=64,
            text_embed_2_dim=32,
            rope_axes_dim=(16, 16),
            **HEADS,
        )
    )
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=_two_texts())


def glm_image() -> DenoiserModel:
    module = _make(
        lambda: diffusers.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            text_embed_dim=64,
            time_embed_dim=64,
            condition_dim=32,
            prior_vq_quantizer_codebook_size=32,
            **HEADS,
        )
    )
    conditions = {
        "encoder_hidden_states": _rows(5, 64),
        "prior_token_id": torch.ones(ROWS, 16, dtype=torch.int64),
        "prior_token_drop": torch.zeros(ROWS, 16, dtype=torch.bool),
        "target_size": torch.full((ROWS, 2), 64.0),
        "crop_coords": torch.zeros(ROWS, 2),
    }
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=conditions)


def z_image() -> DenoiserModel:
    module = _make(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=64,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=64,
            axes_dims=[8, 12, 12],
            axes_lens=[64, 16, 16],
        )
    )
    conditions = {"cap_feats": _rows(5, 64)}
    return DenoiserModel(module, _flow(), (4, 1, 8, 8), conditions=conditions, timestep_name="t", timestep_scale=1e-3)
