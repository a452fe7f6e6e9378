"""Tiny denoisers of more classes of diffusers, for `families.py --all` alone: those of few or of new pipelines.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _flux_ids, _grid, _make, _mask, _noise, _rows
from _other_families import TEXT, _wan_like, _whole_mask

from intaglio.pipeline.model.denoiser import DenoiserModel


def qwen_image21() -> DenoiserModel:
    """The text has five tokens; the image's four slots of 2 x 2 latent tokens follow them."""
    module = _make(
        lambda: diffusers.QwenImage21Transformer2DModel(
            **HEADS, in_channels=16, out_channels=16, num_layers=1, context_in_dim=64, axes_dims_rope=(8, 12, 12)
        )
    )
    slots = torch.cat([torch.zeros(ROWS, 5), torch.ones(ROWS, 4)], dim=1).bool()
    given = {TEXT: _rows(5, 64), "img_mask": slots}
    constants = {"img_shapes": [[[1, 4, 4]]]}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, constants=constants, timestep_scale=1e-3)


def kandinsky5() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Kandinsky5Transformer3DModel(
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
        )
    )
    places = {f"visual_rope_pos.{axis}": torch.arange(size) for axis, size in enumerate((2, 4, 4))}
    given = {TEXT: _rows(5, 64), "pooled_projections": _rows(32)}
    shared = {**places, "text_rope_pos": torch.arange(5)}
    return DenoiserModel(module, _flow(), (2, 8, 8, 4), conditions=given, shared=shared)


def easy_animate() -> DenoiserModel:
    module = _make(
        lambda: diffusers.EasyAnimateTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=32,
            text_embed_dim=64,
        )
    )
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions={TEXT: _rows(5, 64)})


def allegro() -> DenoiserModel:
    module = _make(
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=32,
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_attention_mask": _mask(5), "attention_mask": torch.ones(ROWS, 2, 8, 8)}
    angles = [axis[:, None] * torch.logspace(0, -2, 4).repeat(2) for axis in _grid(2, 4, 4).T]
    waves = {f"image_rotary_emb.0.{i}": torch.stack([each.cos(), each.sin()]) for i, each in enumerate(angles)}
    places = {f"image_rotary_emb.1.{i}": each.long()[None] for i, each in enumerate(_grid(2, 4, 4).T)}
    return DenoiserModel(module, _noise(), (4, 2, 8, 8), conditions=given, shared=waves | places)


def krea2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Krea2Transformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_key_value_heads=1,
            intermediate_size=128,
            timestep_embed_dim=32,
            text_hidden_dim=64,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=128,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 12, 12),
        )
    )
    ids = _flux_ids(5, 4, 4)
    shared = {"position_ids": torch.cat([ids["txt_ids"], ids["img_ids"]])}
    given = {TEXT: _rows(5, 2, 64)}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, shared=shared, timestep_scale=1e-3)


def wan_vace() -> DenoiserModel:
    made = _wan_like("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=32)
    return DenoiserModel(
        made.module,
        _flow(),
        (16, 2, 8, 8),
        conditions={TEXT: _rows(5, 64), "control_hidden_states": _rows(32, 2, 8, 8, seed=2)},
        shared={"control_hidden_states_scale": torch.ones(1)},
    )


def audio_ldm2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 32, 64), (None, 32, 64)),
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_hidden_states_1": _rows(6, 64), "encoder_attention_mask_1": _whole_mask(6)}
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=given)


def stable_cascade() -> DenoiserModel:
    module = _make(
        lambda: diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=64,
            block_out_channels=(32, 64),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1),
            clip_text_in_channels=32,
            clip_text_pooled_in_channels=32,
            clip_image_in_channels=32,
            clip_seq=2,
            switch_level=(False,),
        )
    )
    given = {"clip_text_pooled": _rows(1, 32), "clip_text": _rows(5, 32), "clip_img": _rows(1, 32)}
    scheduler = diffusers.DDPMWuerstchenScheduler()
    return DenoiserModel(module, scheduler, (4, 8, 8), conditions=given)


def longcat_audio() -> DenoiserModel:
    module = _make(
        lambda: diffusers.LongCatAudioDiTTransformer(
            dit_dim=64, dit_depth=1, dit_heads=2, dit_text_dim=32, latent_dim=16, use_latent_condition=False
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_attention_mask": _mask(5).bool()}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, timestep_scale=1e-3)


def motif_video() -> DenoiserModel:
    module = _make(
        lambda: diffusers.MotifVideoTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=64,
            rope_axes_dim=(8, 12, 12),
        )
    )
    given = {TEXT: _rows(5, 64), "encoder_attention_mask": _mask(5)}
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=given)


RARE: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        qwen_image21,
        kandinsky5,
        easy_animate,
        allegro,
        krea2,
        wan_vace,
        audio_ldm2,
        stable_cascade,
        longcat_audio,
        motif_video,
    )
}
