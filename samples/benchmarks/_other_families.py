"""More tiny denoisers with random weights, for `families.py --all` alone: classes of diffusers that tests do not cover.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _flux_ids, _grid, _make, _noise, _rows

from intaglio.pipeline.model.denoiser import DenoiserModel

TEXT = "encoder_hidden_states"


def _rotary(places: int, width: int) -> Mapping[str, torch.Tensor]:
    """Cosines and sines of places, two equal entries for each frequency."""
    angles = torch.arange(places)[:, None] * torch.logspace(0, -2, width // 2).repeat_interleave(2)
    return {"image_rotary_emb.0": angles.cos(), "image_rotary_emb.1": angles.sin()}


def _whole_mask(tokens: int) -> torch.Tensor:
    return torch.ones(ROWS, tokens, dtype=torch.int64)


def hunyuan_dit() -> DenoiserModel:
    module = _make(
        lambda: diffusers.HunyuanDiT2DModel(
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=64,
            num_layers=2,
            cross_attention_dim=64,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=6,
        )
    )
    given = {
        TEXT: _rows(5, 64),
        "text_embedding_mask": _whole_mask(5),
        "encoder_hidden_states_t5": _rows(6, 32),
        "text_embedding_mask_t5": _whole_mask(6),
        "image_meta_size": _rows(6).abs(),
        "style": torch.zeros(ROWS, dtype=torch.int64),
    }
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=given, shared=_rotary(16, 32))


def animatediff() -> DenoiserModel:
    module = _make(
        lambda: diffusers.UNetMotionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
    )
    return DenoiserModel(module, _noise(), (4, 2, 8, 8), conditions={TEXT: _rows(5, 64)})


def kandinsky_decoder() -> DenoiserModel:
    module = _make(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=8,
            norm_num_groups=8,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
        )
    )
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    given = {"added_cond_kwargs.image_embeds": _rows(32)}
    return DenoiserModel(module, scheduler, (4, 8, 8), conditions=given, constants={TEXT: None})


def stable_video() -> DenoiserModel:
    module = _make(
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=1,
            cross_attention_dim=64,
            num_attention_heads=(2, 2),
            num_frames=2,
        )
    )
    given = {TEXT: _rows(1, 64), "added_time_ids": _rows(3).abs()}
    return DenoiserModel(module, diffusers.EulerDiscreteScheduler(), (2, 8, 8, 8), conditions=given)


def prior() -> DenoiserModel:
    module = _make(
        lambda: diffusers.PriorTransformer(
            **HEADS, num_layers=1, embedding_dim=32, num_embeddings=5, additional_embeddings=4
        )
    )
    scheduler = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    given = {"proj_embedding": _rows(32), TEXT: _rows(5, 32), "attention_mask": _whole_mask(5).bool()}
    return DenoiserModel(module, scheduler, (32,), conditions=given)


def omnigen() -> DenoiserModel:
    module = _make(
        lambda: diffusers.OmniGenTransformer2DModel(
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=128,
            num_layers=1,
            pad_token_id=0,
            vocab_size=100,
            max_position_embeddings=64,
            original_max_position_embeddings=64,
            pos_embed_max_size=16,
            time_step_dim=32,
            rope_scaling={"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        )
    )
    given = {
        "input_ids": torch.randint(1, 99, (ROWS, 5), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(ROWS, 22, 22),
        "position_ids": torch.arange(22).expand(ROWS, 22),
    }
    constants = {"input_img_latents": [], "input_image_sizes": {}}
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=given, constants=constants)


def ltx2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.LTX2VideoTransformer3DModel(
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
    given = {
        "audio_hidden_states": _rows(4, 16),
        TEXT: _rows(5, 64),
        "audio_encoder_hidden_states": _rows(5, 64, seed=2),
    }
    sizes = {"num_frames": 2, "height": 2, "width": 2, "fps": 24.0, "audio_num_frames": 4}
    return DenoiserModel(module, _flow(), (8, 16), conditions=given, constants=sizes)


def flux3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Flux3Transformer2DModel(
            **HEADS,
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            timestep_channels=32,
            axes_dims_rope=(8, 8, 8, 8),
        )
    )
    shared = _flux_ids(5, 4, 4, 4)
    return DenoiserModel(module, _flow(), (16, 16), conditions={TEXT: _rows(5, 64)}, shared=shared, timestep_scale=1e-3)


def _flux_like(kind: str, scale: float = 1e-3, **options: object) -> DenoiserModel:
    module = _make(
        lambda: getattr(diffusers, kind)(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            **options,
        )
    )
    given, ids = {TEXT: _rows(5, 64)}, _flux_ids(5, 4, 4)
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, shared=ids, timestep_scale=scale)


def ovis_image() -> DenoiserModel:
    return _flux_like("OvisImageTransformer2DModel", out_channels=16)


def longcat_image() -> DenoiserModel:
    return _flux_like("LongCatImageTransformer2DModel", pooled_projection_dim=64)


def bria() -> DenoiserModel:
    return _flux_like("BriaTransformer2DModel", scale=1.0)


def _wan_like(kind: str, **options: object) -> DenoiserModel:
    module = _make(
        lambda: getattr(diffusers, kind)(
            **HEADS, text_dim=64, freq_dim=64, ffn_dim=128, num_layers=1, rope_max_seq_len=32, **options
        )
    )
    return DenoiserModel(module, _flow(), (16, 2, 8, 8), conditions={TEXT: _rows(5, 64)})


def skyreels() -> DenoiserModel:
    return _wan_like("SkyReelsV2Transformer3DModel")


def chrono_edit() -> DenoiserModel:
    return _wan_like("ChronoEditTransformer3DModel")


def cogview3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.CogView3PlusTransformer2DModel(
            **HEADS,
            num_layers=1,
            text_embed_dim=64,
            time_embed_dim=64,
            condition_dim=32,
            pos_embed_max_size=16,
            sample_size=8,
        )
    )
    sizes = {name: torch.full((ROWS, 2), value) for name, value in (("original_size", 64.0), ("target_size", 64.0))}
    given = {TEXT: _rows(5, 64), **sizes, "crop_coords": torch.zeros(ROWS, 2)}
    return DenoiserModel(module, _noise(), (16, 8, 8), conditions=given)


def stable_audio() -> DenoiserModel:
    module = _make(
        lambda: diffusers.StableAudioDiTModel(
            **HEADS,
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_key_value_attention_heads=1,
            cross_attention_dim=32,
            time_proj_dim=32,
            global_states_input_dim=32,
            cross_attention_input_dim=32,
        )
    )
    angles = torch.arange(17)[:, None] * torch.logspace(0, -2, 8).repeat(2)
    given = {TEXT: _rows(5, 32), "global_hidden_states": _rows(1, 32)}
    shared = {"rotary_embedding.0": angles.cos(), "rotary_embedding.1": angles.sin()}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, shared=shared)


def sana_video() -> DenoiserModel:
    module = _make(
        lambda: diffusers.SanaVideoTransformer3DModel(
            **HEADS,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=32,
            sample_size=8,
            rope_max_seq_len=32,
        )
    )
    return DenoiserModel(module, _flow(), (16, 2, 8, 8), conditions={TEXT: _rows(5, 32)})


def prx() -> DenoiserModel:
    module = _make(
        lambda: diffusers.PRXTransformer2DModel(
            context_in_dim=32, hidden_size=64, num_heads=2, depth=1, axes_dim=[16, 16]
        )
    )
    return DenoiserModel(module, _flow(), (16, 8, 8), conditions={TEXT: _rows(5, 32)}, timestep_scale=1e-3)


def lumina_next() -> DenoiserModel:
    module = _make(
        lambda: diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=64,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=32,
            cross_attention_dim=32,
        )
    )
    angles = (_grid(4, 4) @ torch.randn(2, 16, generator=torch.Generator().manual_seed(0))).reshape(4, 4, 16)
    given = {TEXT: _rows(5, 32), "encoder_mask": _whole_mask(5).bool()}
    shared = {"image_rotary_emb": torch.polar(torch.ones_like(angles), angles)}
    constants = {"cross_attention_kwargs": {"base_sequence_length": 4}}
    return DenoiserModel(
        module, _flow(), (4, 8, 8), conditions=given, shared=shared, constants=constants, timestep_scale=1e-3
    )


def ernie_image() -> DenoiserModel:
    module = _make(
        lambda: diffusers.ErnieImageTransformer2DModel(
            hidden_size=64,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=128,
            in_channels=16,
            out_channels=16,
            text_in_dim=32,
            rope_axes_dim=(8, 12, 12),
        )
    )
    given = {"text_bth": _rows(5, 32), "text_lens": torch.full((ROWS,), 5)}
    return DenoiserModel(module, _flow(), (16, 4, 4), conditions=given)


OTHERS: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        hunyuan_dit,
        animatediff,
        kandinsky_decoder,
        stable_video,
        prior,
        omnigen,
        ltx2,
        flux3,
        ovis_image,
        longcat_image,
        bria,
        skyreels,
        chrono_edit,
        cogview3,
        stable_audio,
        sana_video,
        prx,
        lumina_next,
        ernie_image,
    )
}
