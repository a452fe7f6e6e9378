"""Tiny denoisers of more classes of diffusers that draw video or sound, for `families.py --all` alone.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _make, _mask, _noise, _rows
from _other_families import TEXT, _rotary, _wan_like

from intaglio.pipeline.model.denoiser import DenoiserModel


def framepack() -> DenoiserModel:
    module = _make(
        lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=64,
            pooled_projection_dim=64,
            rope_axes_dim=(8, 12, 12),
            has_image_proj=True,
            image_proj_dim=32,
            has_clean_x_embedder=True,
        )
    )
    given = {
        TEXT: _rows(5, 64),
        "encoder_attention_mask": _mask(5),
        "pooled_projections": _rows(64, seed=2),
        "image_embeds": _rows(3, 32, seed=3),
        "guidance": torch.full((ROWS,), 6000.0),
        "latents_clean": _rows(4, 2, 8, 8, seed=4),
        "latents_history_2x": _rows(4, 2, 8, 8, seed=5),
        "latents_history_4x": _rows(4, 4, 8, 8, seed=6),
    }
    shared = {
        "indices_latents": torch.arange(9, 11),
        "indices_latents_clean": torch.tensor([0, 8]),
        "indices_latents_history_2x": torch.arange(6, 8),
        "indices_latents_history_4x": torch.arange(2, 6),
    }
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=given, shared=shared)


def i2vgen() -> DenoiserModel:
    module = _make(
        lambda: diffusers.I2VGenXLUNet(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    )
    given = {
        "fps": torch.full((ROWS,), 16),
        "image_latents": _rows(4, 2, 8, 8, seed=2),
        "image_embeddings": _rows(32, seed=3),
        TEXT: _rows(5, 32),
    }
    return DenoiserModel(module, _noise(), (4, 2, 8, 8), conditions=given)


def stable_audio3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.StableAudio3DiTModel(
            io_channels=16,
            embed_dim=64,
            depth=1,
            num_heads=2,
            cond_token_dim=32,
            global_cond_dim=32,
            local_add_cond_dim=0,
            timestep_features_dim=32,
            num_memory_tokens=4,
        )
    )
    given = {TEXT: _rows(5, 32), "global_hidden_states": _rows(32, seed=2), "encoder_attention_mask": _mask(5)}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, timestep_scale=1e-3)


def cosmos() -> DenoiserModel:
    module = _make(
        lambda: diffusers.CosmosTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            adaln_lora_dim=16,
            max_size=(4, 16, 16),
            concat_padding_mask=False,  # True needs torchvision
        )
    )
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions={TEXT: _rows(5, 32)}, constants={"fps": 24})


def kandinsky6() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=64,
            in_text_dim2=32,
            time_dim=32,
            model_dim=64,
            ff_dim=128,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(8, 12, 12),
            visual_cond=False,
            model_dim_a=64,
            time_dim_a=32,
            ff_dim_a=128,
            axes_dims_a=(32,),
            in_audio_dim=8,
            out_audio_dim=8,
        )
    )
    places = {f"visual_rope_pos.{axis}": torch.arange(size) for axis, size in enumerate((2, 4, 4))}
    given = {TEXT: _rows(5, 64), "pooled_projections": _rows(32), "audio_hidden_states": _rows(6, 8, seed=2)}
    return DenoiserModel(module, _flow(), (2, 8, 8, 4), conditions=given, shared=places)


def kandinsky6_sr() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=32,
            model_dim=64,
            ff_dim=128,
            num_visual_blocks=1,
            axes_dims=(8, 12, 12),
        )
    )
    return DenoiserModel(module, _flow(), (2, 8, 8, 9))  # noise, a picture of lower resolution, and a mask


def ace_step() -> DenoiserModel:
    module = _make(
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            encoder_hidden_size=32,
            sliding_window=4,
        )
    )
    given = {TEXT: _rows(5, 32), "context_latents": _rows(16, 16, seed=2), "timestep_r": torch.full((ROWS,), 0.5)}
    return DenoiserModel(module, _flow(), (16, 8), conditions=given, timestep_scale=1e-3)


def anyflow() -> DenoiserModel:
    """One timestep for each frame."""
    made = _wan_like("AnyFlowTransformer3DModel")
    given = {TEXT: _rows(5, 64), "timestep": torch.ones(ROWS, 2), "r_timestep": torch.zeros(ROWS, 2)}
    return DenoiserModel(made.module, _flow(), (2, 16, 8, 8), conditions=given)


def consisid() -> DenoiserModel:
    module = _make(
        lambda: diffusers.ConsisIDTransformer3DModel(
            **HEADS,
            in_channels=8,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=64,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=6,
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            cross_attn_dim_head=16,
            cross_attn_num_heads=2,
            LFE_id_dim=16,
            LFE_vit_dim=16,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=42,
            LFE_ff_mult=1,
        )
    )
    faces = {f"id_vit_hidden.[{i}]": _rows(4, 16, seed=i) for i in range(5)}
    given = {TEXT: _rows(6, 64), "id_cond": _rows(16, seed=7), **faces}
    return DenoiserModel(module, _noise(), (2, 8, 8, 8), conditions=given, shared=_rotary(32, 32))


def wan_animate() -> DenoiserModel:
    made = _wan_like(
        "WanAnimateTransformer3DModel",
        in_channels=20,
        latent_channels=8,
        out_channels=8,
        image_dim=32,
        added_kv_proj_dim=64,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=32,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
        motion_encoder_batch_size=64,  # all frames of all rows: fewer make a loop whose length the rows decide
    )
    given = {
        TEXT: _rows(512, 64),  # what comes before them is the image
        "encoder_hidden_states_image": _rows(4, 32, seed=2),
        "pose_hidden_states": _rows(8, 2, 8, 8, seed=3),
        "face_pixel_values": _rows(3, 5, 16, 16, seed=4),
    }
    return DenoiserModel(made.module, _flow(), (20, 3, 8, 8), conditions=given)


def t5_film() -> DenoiserModel:
    module = _make(
        lambda: diffusers.T5FilmDecoder(
            input_dims=16, targets_length=16, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64
        )
    )
    given = {"encodings_and_masks.[0].0": _rows(5, 32), "encodings_and_masks.[0].1": _mask(5)}
    return DenoiserModel(
        module,
        _noise(),
        (16, 16),
        conditions=given,
        timestep_scale=1e-3,
        sample_name="decoder_input_tokens",
        timestep_name="decoder_noise_time",
    )


def minimax_music3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.MiniMaxMusic3Transformer1DModel(
            **HEADS, in_channels=16, condition_dim=32, num_layers=1, ff_inner_dim=128, rotary_dim=16
        )
    )
    return DenoiserModel(module, _flow(), (16, 16), conditions={TEXT: _rows(16, 32)}, timestep_scale=1e-3)


def helios() -> DenoiserModel:
    """Histories of three lengths come before the frames that are drawn."""
    module = _make(
        lambda: diffusers.HeliosTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=1,
            rope_dim=(8, 12, 12),
        )
    )
    given = {
        TEXT: _rows(5, 32),
        "indices_hidden_states": torch.arange(9, 11).expand(ROWS, -1),
        "indices_latents_history_short": torch.arange(7, 9).expand(ROWS, -1),
        "indices_latents_history_mid": torch.arange(5, 7).expand(ROWS, -1),
        "indices_latents_history_long": torch.arange(1, 5).expand(ROWS, -1),
        "latents_history_short": _rows(4, 2, 8, 8, seed=2),
        "latents_history_mid": _rows(4, 2, 8, 8, seed=3),
        "latents_history_long": _rows(4, 4, 8, 8, seed=4),
    }
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=given)


def sana_wm() -> DenoiserModel:
    """One timestep for each frame, and a camera."""
    module = _make(
        lambda: diffusers.SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=2,
            hidden_size=64,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=32,
            chunk_plucker_channels=6,
            chunk_plucker_post_attn_blocks=1,
            caption_channels=32,
            mlp_ratio=1.0,
            image_size=64,
        )
    )
    given = {
        TEXT: _rows(1, 5, 32),
        "encoder_attention_mask": _mask(5),
        "timestep": torch.ones(ROWS, 1, 2),
        "chunk_plucker": _rows(6, 2, 4, 4, seed=2),
        "camera_conditions": torch.cat([torch.eye(4).flatten().expand(ROWS, 2, 16), torch.ones(ROWS, 2, 4)], -1),
    }
    return DenoiserModel(module, _flow(), (4, 2, 4, 4), conditions=given)


def sana_wm_refiner() -> DenoiserModel:
    """One timestep for each token."""
    module = _make(
        lambda: diffusers.SanaWMLTX2RefinerTransformer3DModel(
            **HEADS,
            in_channels=16,
            out_channels=16,
            cross_attention_dim=64,
            audio_in_channels=16,
            audio_out_channels=16,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
            num_layers=1,
            caption_channels=64,
        )
    )
    angles = torch.arange(8)[:, None] * torch.logspace(0, -2, 32).repeat_interleave(2)
    given = {TEXT: _rows(5, 64), "encoder_attention_mask": _mask(5), "timestep": torch.ones(ROWS, 8)}
    shared = {"video_rotary_emb.0": angles.cos()[None], "video_rotary_emb.1": angles.sin()[None]}
    return DenoiserModel(module, _flow(), (8, 16), conditions=given, shared=shared)


CLIPS: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        framepack,
        i2vgen,
        stable_audio3,
        cosmos,
        kandinsky6,
        kandinsky6_sr,
        ace_step,
        anyflow,
        consisid,
        wan_animate,
        t5_film,
        minimax_music3,
        helios,
        sana_wm,
        sana_wm_refiner,
    )
}
