"""Tiny transformers with random weights that draw clips.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _grid, _make, _mask, _noise, _rows, _two_texts
from torch import nn

from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize


def _cogvideox(rotary: bool) -> nn.Module:
    return _make(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=16,
            time_embed_dim=64,
            text_embed_dim=64,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=6,
            use_rotary_positional_embeddings=rotary,
        )
    )


def cogvideox() -> DenoiserModel:
    # one size: its positions are a table, and only at the sizes of the configuration can it be exported
    return DenoiserModel(_cogvideox(False), _noise(), (2, 16, 8, 8), conditions={"encoder_hidden_states": _rows(6, 64)})


def cogvideox_rotary() -> DenoiserModel:
    def tables(tokens: int) -> Mapping[str, torch.Tensor]:
        angles = torch.arange(tokens)[:, None] * torch.logspace(0, -2, 16).repeat_interleave(2)
        return {"image_rotary_emb.0": angles.cos(), "image_rotary_emb.1": angles.sin()}

    text = {"encoder_hidden_states": _rows(6, 64)}
    other = SecondSize((2, 16, 8, 12), shared=tables(48))
    return DenoiserModel(_cogvideox(True), _noise(), (2, 16, 8, 8), conditions=text, shared=tables(32), other=other)


def ltx() -> DenoiserModel:
    module = _make(
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=64,
            out_channels=64,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            num_layers=1,
            caption_channels=64,
        )
    )

    def places(width: int) -> torch.Tensor:
        return _grid(2, 4, width).T.expand(ROWS, -1, -1).contiguous()

    def text(tokens: int) -> Mapping[str, torch.Tensor]:
        return {"encoder_hidden_states": _rows(tokens, 64), "encoder_attention_mask": _mask(tokens)}

    return DenoiserModel(
        module,
        _flow(),
        (32, 64),
        conditions={**text(5), "video_coords": places(4)},
        other=SecondSize((48, 64), {**text(7), "video_coords": places(6)}),
    )


def wan() -> DenoiserModel:
    module = _make(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            text_dim=64,
            freq_dim=64,
            ffn_dim=128,
            num_layers=1,
            rope_max_seq_len=32,
        )
    )
    other = SecondSize((16, 3, 8, 12), {"encoder_hidden_states": _rows(7, 64)})
    text = {"encoder_hidden_states": _rows(5, 64)}
    return DenoiserModel(module, _flow(), (16, 2, 8, 8), conditions=text, other=other)


def hunyuan_video() -> DenoiserModel:
    module = _make(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=64,
            pooled_projection_dim=64,
            rope_axes_dim=(8, 12, 12),
        )
    )
    conditions = {
        "encoder_hidden_states": _rows(5, 64),
        "encoder_attention_mask": _mask(5),
        "pooled_projections": _rows(64, seed=2),
        "guidance": torch.full((ROWS,), 6000.0),
    }
    changed = {"encoder_hidden_states": _rows(7, 64), "encoder_attention_mask": _mask(7)}
    return DenoiserModel(
        module, _flow(), (16, 2, 8, 8), conditions=conditions, other=SecondSize((16, 2, 8, 12), changed)
    )


def latte() -> DenoiserModel:
    module = _make(
        lambda: diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=64,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=64,
            video_length=2,
        )
    )
    conditions = {"encoder_hidden_states": _rows(5, 64)}
    other = SecondSize((4, 2, 8, 8), {"encoder_hidden_states": _rows(7, 64)})  # positions and frames are tables
    return DenoiserModel(module, _noise(), (4, 2, 8, 8), conditions=conditions, other=other)


def hunyuan_video15() -> DenoiserModel:
    module = _make(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=64,
            text_embed_2_dim=32,
            image_embed_dim=48,
            rope_axes_dim=(8, 12, 12),
            patch_size=1,
            target_size=8,
            task_type="t2v",
            **HEADS,
        )
    )
    conditions = {**_two_texts(), "image_embeds": torch.zeros(ROWS, 3, 48)}
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=conditions)


def mochi() -> DenoiserModel:
    module = _make(
        lambda: diffusers.MochiTransformer3DModel(
            num_layers=2,
            pooled_projection_dim=32,
            in_channels=4,
            text_embed_dim=64,
            time_embed_dim=32,
            max_sequence_length=8,
            **HEADS,
        )
    )
    conditions = {"encoder_hidden_states": _rows(8, 64), "encoder_attention_mask": _mask(8)}
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=conditions)
