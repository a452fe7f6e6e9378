"""One tiny denoiser with random weights for every family: its layers, its inputs and its quirks, in a block or two.

Each function is a model factory, as a recipe names it: `./tiny_families.py:flux`. Where the family can be called at
several sizes, the second one here makes those axes dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffusers
import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.sampler import OneCall

ROWS = 3
"""Recorded rows of each condition."""


def _make(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with weights that let every branch be seen: those that start at zero get noise."""
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return module.eval()


def _flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _noise() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(timestep_spacing="trailing")


def _rows(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random conditions."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def _mask(tokens: int) -> torch.Tensor:
    """Which tokens of a text are there: all but the last."""
    mask = torch.ones(ROWS, tokens, dtype=torch.int64)
    mask[:, -1] = 0
    return mask


def _grid(*sizes: int) -> torch.Tensor:
    """Coordinates of every place, (places, axes)."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def unet() -> DenoiserModel:
    module = _make(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
            num_class_embeds=5,
        )
    )
    return DenoiserModel(module, _noise(), (3, 8, 8), classes=4, other=SecondSize((3, 8, 12)))


class _PlainUNet(nn.Module):
    """No diffusers: normalization over channels, a transposed convolution, and its own names of the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.down = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.time, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.up, self.outlet = nn.ConvTranspose2d(64, 32, 2, stride=2), nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inlet(noisy)
        y = self.down(functional.silu(x))
        phase = t.float().reshape(-1, 1) / 1000 * torch.arange(1, 33, device=x.device)
        y = y + self.time(phase.sin())[..., None, None]
        y = y + self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        outlet: torch.Tensor = self.outlet(torch.cat([x, self.up(y)], dim=1))
        return outlet


def plain_unet() -> DenoiserModel:
    return DenoiserModel(_make(_PlainUNet), _flow(), (3, 8, 8), other=SecondSize((3, 8, 12)))


def _conditional_unet(down: tuple[str, ...], up: tuple[str, ...], **options: object) -> nn.Module:
    return _make(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64)[-len(down) :],
            down_block_types=down,
            mid_block_type=None,
            up_block_types=up,
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=8,
            **options,
        )
    )


def sd15() -> DenoiserModel:
    text = {"encoder_hidden_states": _rows(5, 64)}
    null = {name: rows[:1] * 0 for name, rows in text.items()}
    other = SecondSize((4, 8, 12), {"encoder_hidden_states": _rows(7, 64)})
    module = _conditional_unet(("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D"))
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=text, null=null, other=other)


def sdxl() -> DenoiserModel:
    module = _conditional_unet(
        ("CrossAttnDownBlock2D",),
        ("CrossAttnUpBlock2D",),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )
    pooled, sizes = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
    conditions = {
        "encoder_hidden_states": _rows(5, 64),
        pooled: _rows(64, seed=2),
        sizes: torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(ROWS, 6),
    }
    null = {name: conditions[name][:1] * 0 for name in ("encoder_hidden_states", pooled)}
    other = SecondSize((4, 8, 12), {"encoder_hidden_states": _rows(7, 64)})
    return DenoiserModel(module, _noise(), (4, 8, 8), conditions=conditions, null=null, other=other)


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


def _flux_ids(text: int, height: int, width: int, axes: int = 3) -> Mapping[str, torch.Tensor]:
    places = functional.pad(_grid(height, width), (1, axes - 3))
    return {"img_ids": places, "txt_ids": torch.zeros(text, axes)}


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


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def qwen_image() -> DenoiserModel:
    # one size: the sizes of the image are an argument that is no tensor
    module = _make(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
            **_HEADS,
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
            **_HEADS,
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
            **_HEADS,
        )
    )
    return DenoiserModel(module, _flow(), (4, 8, 8), conditions=_two_texts())


def _two_texts() -> Mapping[str, torch.Tensor]:
    first = {"encoder_hidden_states": _rows(5, 64), "encoder_attention_mask": _mask(5)}
    return {**first, "encoder_hidden_states_2": _rows(4, 32), "encoder_attention_mask_2": _mask(4)}


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
            **_HEADS,
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
            **_HEADS,
        )
    )
    conditions = {"encoder_hidden_states": _rows(8, 64), "encoder_attention_mask": _mask(8)}
    return DenoiserModel(module, _flow(), (4, 2, 8, 8), conditions=conditions)


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
            **_HEADS,
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


class _Decoder(nn.Module):
    """The half of an autoencoder that turns latents into pictures."""

    def __init__(self, vae: diffusers.AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        picture: torch.Tensor = self.decoder(self.post_quant_conv(latents))
        return picture


def policy_unet() -> DenoiserModel:
    """Actions of a robot over time: convolutions along one axis."""
    module = _make(
        lambda: diffusers.UNet1DModel(
            sample_size=16,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownResnetBlock1D",) * 2,
            up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            block_out_channels=(32, 64),
            layers_per_block=1,
            act_fn="mish",
            use_timestep_embedding=True,
            time_embedding_type="positional",
            downsample_each_block=False,
        )
    )
    return DenoiserModel(module, _noise(), (8, 16))


def video_unet() -> DenoiserModel:
    """Convolutions along time behind those along height and width."""
    module = _make(
        lambda: diffusers.UNet3DConditionModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=4,
        )
    )
    return DenoiserModel(module, _noise(), (4, 3, 8, 8), conditions={"encoder_hidden_states": _rows(5, 32)})


def vae_decoder() -> DenoiserModel:
    module = _make(
        lambda: _Decoder(
            diffusers.AutoencoderKL(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=8,
                sample_size=16,
            )
        )
    )
    return DenoiserModel(module, OneCall(), (4, 8, 8), other=SecondSize((4, 8, 12)))


FAMILIES: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        unet,
        plain_unet,
        sd15,
        sdxl,
        dit,
        pixart,
        sd3,
        flux,
        sana,
        cogvideox,
        cogvideox_rotary,
        ltx,
        wan,
        hunyuan_video,
        latte,
        policy_unet,
        vae_decoder,
        lumina2,
    )
}
NEWER: Mapping[str, Callable[[], DenoiserModel]] = {
    made.__name__: made
    for made in (
        auraflow,
        qwen_image,
        cogview4,
        flux2,
        chroma,
        hunyuan_image,
        hunyuan_video15,
        mochi,
        glm_image,
        video_unet,
        z_image,
    )
}
"""For the benchmark alone: tests have no time for them."""
