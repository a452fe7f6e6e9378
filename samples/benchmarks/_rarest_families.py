"""Tiny denoisers of more classes of diffusers that draw pictures, for `families.py --all` alone.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from _family_pieces import HEADS, ROWS, _flow, _flux_ids, _grid, _make, _mask, _noise, _rows
from _other_families import TEXT, _whole_mask

from intaglio.pipeline.model.denoiser import DenoiserModel


def hidream() -> DenoiserModel:
    """The hidden states of the language model's layers have the layers before the rows."""
    module = _make(
        lambda: diffusers.HiDreamImageTransformer2DModel(
            **HEADS,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[32, 48],
            text_emb_dim=64,
            num_routed_experts=2,
            axes_dims_rope=(8, 12, 12),
            max_resolution=(8, 8),
            llama_layers=[0, 2],
            force_inference_output=True,
        )
    )
    given = {
        "encoder_hidden_states_t5": _rows(5, 32),
        "encoder_hidden_states_llama3": _rows(3, 5, 48, seed=2),
        "pooled_embeds": _rows(64, seed=3),
    }
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=given)


def kandinsky3() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Kandinsky3UNet(
            time_embedding_dim=64,
            groups=4,
            attention_head_dim=16,
            layers_per_block=2,
            block_out_channels=(16, 32, 32, 32),
            cross_attention_dim=32,
            encoder_hid_dim=32,
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_attention_mask": _mask(5)}
    return DenoiserModel(module, _noise(), (4, 16, 16), conditions=given)


def ideogram4() -> DenoiserModel:
    """Five text tokens, then 4 x 4 of the image, in one sequence."""
    module = _make(
        lambda: diffusers.Ideogram4Transformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            intermediate_size=128,
            adaln_dim=32,
            llm_features_dim=32,
            mrope_section=(8, 4, 4),
        )
    )
    text, image = 5, 16
    kinds = torch.tensor([3] * text + [2] * image).expand(ROWS, -1)
    places = torch.cat([torch.arange(text)[:, None].repeat(1, 3).float(), torch.nn.functional.pad(_grid(4, 4), (1, 0))])
    given = {
        TEXT: _rows(text + image, 32),
        "position_ids": places.long().expand(ROWS, -1, -1),
        "segment_ids": torch.ones(ROWS, text + image, dtype=torch.int64),
        "indicator": kinds,
    }
    return DenoiserModel(module, _flow(), (text + image, 16), conditions=given, timestep_scale=1e-3)


def joy_image() -> DenoiserModel:
    module = _make(
        lambda: diffusers.JoyImageEditTransformer3DModel(
            in_channels=4,
            hidden_size=64,
            num_attention_heads=2,
            text_dim=32,
            num_layers=1,
            rope_dim_list=[8, 12, 12],
        )
    )
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions={TEXT: _rows(5, 32)})


def nucleus_moe() -> DenoiserModel:
    module = _make(
        lambda: diffusers.NucleusMoEImageTransformer2DModel(
            **HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_key_value_heads=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            mlp_ratio=2.0,
            dense_moe_strategy="all_moe",
            num_experts=2,
            moe_intermediate_dim=32,
            capacity_factors=1.0,
        )
    )
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "experts" in name:  # which the class does not initialize
                weight.normal_(std=0.1)
    given = {TEXT: _rows(5, 64), "encoder_hidden_states_mask": _whole_mask(5).bool()}
    constants = {"img_shapes": [(1, 4, 4)]}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, constants=constants, timestep_scale=1e-3)


def bria_fibo() -> DenoiserModel:
    module = _make(
        lambda: diffusers.BriaFiboTransformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            text_encoder_dim=32,
        )
    )
    layers = {f"text_encoder_layers.[{i}]": _rows(5, 32, seed=i) for i in range(2)}
    given = {TEXT: _rows(5, 64), **layers}
    return DenoiserModel(module, _flow(), (16, 16), conditions=given, shared=_flux_ids(5, 4, 4))


def dreamlite() -> DenoiserModel:
    module = _make(
        lambda: diffusers.DreamLiteUNetModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=16,
            norm_num_groups=8,
            ff_mult=2,
            addition_embed_type="time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=32,
        )
    )
    given = {TEXT: _rows(5, 32), "added_cond_kwargs.time_ids": _rows(2).abs()}
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=given)


def pixart_alpha() -> DenoiserModel:
    module = _make(
        lambda: diffusers.Transformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=64,
            sample_size=8,
            patch_size=2,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            use_additional_conditions=False,
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_attention_mask": _mask(5)}
    constants = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=given, constants=constants)


def bria_fibo2() -> DenoiserModel:
    module = _make(
        lambda: diffusers.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=64,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=32,
            injection_layer_ids=(0,),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=2,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=(8, 12, 12),
            axes_lens=(16, 16, 16),
        )
    )
    given = {TEXT: _rows(2, 5, 32), "encoder_attention_mask": _whole_mask(5).bool()}
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=given, timestep_scale=1e-3)


def joy_image_plus() -> DenoiserModel:
    module = _make(
        lambda: diffusers.JoyImageEditPlusTransformer3DModel(
            in_channels=4,
            hidden_size=64,
            num_attention_heads=2,
            text_dim=32,
            num_layers=1,
            rope_dim_list=[8, 12, 12],
        )
    )
    given = {TEXT: _rows(5, 32), "encoder_hidden_states_mask": _whole_mask(5)}
    constants = {"shape_list": [[(1, 2, 2), (1, 2, 2)]]}
    return DenoiserModel(module, _flow(), (8, 4, 1, 2, 2), conditions=given, constants=constants)


RAREST: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        hidream,
        kandinsky3,
        ideogram4,
        joy_image,
        nucleus_moe,
        bria_fibo,
        dreamlite,
        pixart_alpha,
        bria_fibo2,
        joy_image_plus,
    )
}
