"""Whole pipelines of diffusers around tiny models with random weights, text encoders and tokenizers among them."""

from collections.abc import Callable
from typing import Any

import diffusers
import tiny_families
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

LENGTH = 8
"""Tokens of a text."""


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a letter."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: place for place, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> transformers.T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0)]
    pieces = [*special, *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz")]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip(projection: int | None = None, width: int = 64, layers: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection or 64,
        bos_token_id=512,
        eos_token_id=513,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return kind(config).eval()


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=29, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, quant_conv: bool = True) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(32,),
        norm_num_groups=8,
        latent_channels=channels,
        shift_factor=0.1,
        sample_size=8,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def small_vae(channels: int) -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    widths = {f"{part}_block_out_channels": (32,) for part in ("encoder", "decoder")}
    counts = {f"num_{part}_blocks": (1,) for part in ("encoder", "decoder")}
    return diffusers.AutoencoderTiny(**widths, **counts, latent_channels=channels).eval()


def sd_unet(up: str = "UpBlock2D") -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=(up,),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def pixart_transformer() -> diffusers.PixArtTransformer2DModel:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=64,
        use_additional_conditions=False,
    ).eval()


def sd() -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=sd_unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(width=32, layers=2),
        text_encoder_2=clip(64, width=32),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=tiny_families.sdxl().module,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def pixart() -> diffusers.PixArtAlphaPipeline:
    return diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=small_vae(4),
        transformer=pixart_transformer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_families.sd3().module,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(16, quant_conv=False),
        text_encoder=clip(32, width=32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(32, width=32),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(16, quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=tiny_families.flux().module,
    )


def umt5() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=29, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    return transformers.UMT5EncoderModel(config).eval()


def wan_experts() -> diffusers.WanPipeline:
    """Two transformers: one for the noisy steps, one for the rest."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    second = tiny_families.wan().module
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.05 * parameter.std().nan_to_num() * torch.randn(parameter.shape))
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=tiny_families.wan().module,
        transformer_2=second,
        boundary_ratio=0.8,
    )


CALLS: dict[Callable[[], Any], dict[str, Any]] = {
    sd: {"height": 8, "width": 8},
    sdxl: {"height": 8, "width": 8},
    pixart: {"height": 8, "width": 8, "use_resolution_binning": False, "max_sequence_length": LENGTH},
    sd3: {"height": 16, "width": 16, "max_sequence_length": LENGTH},
    flux: {"height": 8, "width": 8, "max_sequence_length": LENGTH},
    wan_experts: {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": LENGTH},
}
"""Further arguments of each pipeline's call."""
