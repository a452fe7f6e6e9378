"""Pipelines of diffusers around tiny denoisers whose calls are not sample, timestep and text alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tiny_pipelines import clip, clip_tokenizer, vae

ROWS, TEXT = 2, 5


def seeded(build: Callable[[], Any], std: float = 0.02) -> Any:
    """The module with seeded weights; those that start at zero get noise, so that every branch counts."""
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return module.eval()


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def half_mask(size: int = 8) -> Image.Image:
    values = np.zeros((size, size), np.uint8)
    values[:, size // 2 :] = 255
    return Image.fromarray(values)


def unet(channels: int = 4, mid: str | None = None) -> Any:
    """One attention to the text, where blocks receive residuals, and another in the middle if there is one."""
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            layers_per_block=1,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=mid,
            up_block_types=("UpBlock2D",),
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    )


def sd_scheduler() -> diffusers.DDIMScheduler:
    """As in the checkpoints of Stable Diffusion."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


UNCHECKED: Mapping[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
"""Arguments of pipelines that would look for forbidden pictures."""


def sd(kind: Any, module: Any, **parts: Any) -> Any:
    text = {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    return kind(vae=vae(), **text, unet=module, scheduler=sd_scheduler(), **UNCHECKED, **parts)


def inpainting() -> tuple[Any, dict[str, Any]]:
    pipe = sd(diffusers.StableDiffusionInpaintPipeline, unet(9))
    return pipe, {"image": picture(), "mask_image": half_mask(), "height": 8, "width": 8}


def instruct_pix2pix() -> tuple[Any, dict[str, Any]]:
    return sd(diffusers.StableDiffusionInstructPix2PixPipeline, unet(8)), {"image": [picture()] * ROWS}


def controlnet() -> tuple[Any, dict[str, Any]]:
    module = unet(mid="UNetMidBlock2DCrossAttn")
    control = seeded(
        lambda: diffusers.ControlNetModel.from_unet(module, conditioning_embedding_out_channels=(8,)), std=0.3
    )
    return sd(diffusers.StableDiffusionControlNetPipeline, module, controlnet=control), {"image": [picture()] * ROWS}


def t2i_adapter() -> tuple[Any, dict[str, Any]]:
    adapter = seeded(
        lambda: diffusers.T2IAdapter(
            in_channels=3, channels=[32], num_res_blocks=1, downscale_factor=1, adapter_type="full_adapter"
        )
    )
    pipe = sd(diffusers.StableDiffusionAdapterPipeline, unet(), adapter=adapter)
    return pipe, {"image": [picture()] * ROWS, "height": 8, "width": 8}


def animatediff() -> tuple[Any, dict[str, Any]]:
    module = seeded(
        lambda: diffusers.UNetMotionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlockMotion",),
            up_block_types=("CrossAttnUpBlockMotion",),
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=module,
        motion_adapter=None,
        scheduler=sd_scheduler(),
    )
    return pipe, {"num_frames": 3, "height": 8, "width": 8}


def flux_module(channels: int, out: int) -> Any:
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=channels,
            out_channels=out,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
            num_attention_heads=2,
            attention_head_dim=32,
        )
    )


def flux(kind: Any, module: Any) -> Any:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return kind(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, quant_conv=False),
        transformer=module,
        **absent,
    )


FLUX = {"prompt_embeds": rows(TEXT, 64), "pooled_prompt_embeds": rows(64), "height": 16, "width": 16}


def flux_control() -> tuple[Any, dict[str, Any]]:
    pipe = flux(diffusers.FluxControlPipeline, flux_module(32, 16))
    return pipe, {**FLUX, "control_image": picture(16)}


def flux_kontext() -> tuple[Any, dict[str, Any]]:
    pipe = flux(diffusers.FluxKontextPipeline, flux_module(16, 16))
    return pipe, {**FLUX, "image": picture(16), "max_area": 256, "_auto_resize": False}


def cascade_prior() -> tuple[Any, dict[str, Any]]:
    module = seeded(
        lambda: diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            patch_size=1,
            conditioning_dim=64,
            block_out_channels=(32,),
            num_attention_heads=(2,),
            down_num_layers_per_block=(1,),
            up_num_layers_per_block=(1,),
            down_blocks_repeat_mappers=(1,),
            up_blocks_repeat_mappers=(1,),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
            clip_text_in_channels=64,
            clip_text_pooled_in_channels=64,
            clip_image_in_channels=64,
            clip_seq=4,
            switch_level=None,
        )
    )
    pipe = diffusers.StableCascadePriorPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip(64),
        prior=module,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )
    return pipe, {"height": 256, "width": 256}


def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    """Splits a learned variance from every output, whatever the configuration says."""
    module = seeded(
        lambda: diffusers.HunyuanDiT2DModel(
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=TEXT + 1,
        )
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.HunyuanDiTPipeline(
        vae=vae(),
        transformer=module,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.03,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        **UNCHECKED,
        **absent,
    )
    given = {}
    for part, seed in (("prompt", 1), ("negative_prompt", 2)):
        for name, tokens, width in (("", TEXT, 64), ("_2", TEXT + 1, 32)):
            given[f"{part}_embeds{name}"] = rows(tokens, width, seed=seed)
            given[f"{part}_attention_mask{name}"] = torch.ones(ROWS, tokens, dtype=torch.int64)
    sizes = {"height": 16, "width": 16, "original_size": (16, 16), "use_resolution_binning": False}
    return pipe, {**given, **sizes, "guidance_scale": 1.0}


def kandinsky_decoder() -> tuple[Any, dict[str, Any]]:
    """Hands the learned variance to its scheduler, and guides the noise alone."""
    module = seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(32,),
            down_block_types=("SimpleCrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("ResnetUpsampleBlock2D",),
            cross_attention_dim=32,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            attention_head_dim=4,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
        )
    )
    torch.manual_seed(0)
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=8,
        norm_type="spatial",
        vq_embed_dim=4,
    ).eval()
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample_range=2.0
    )
    pipe = diffusers.KandinskyV22Pipeline(unet=module, scheduler=scheduler, movq=movq)
    given = {"image_embeds": rows(32), "negative_image_embeds": rows(32, seed=2), "height": 16, "width": 16}
    return pipe, {**given, "guidance_scale": 1.0}


GUIDED: Mapping[Callable[[], tuple[Any, dict[str, Any]]], Mapping[str, float]] = {
    inpainting: {"guidance_scale": 4.0},
    instruct_pix2pix: {"guidance_scale": 4.0, "image_guidance_scale": 1.5},  # three calls' rows in one
    controlnet: {"guidance_scale": 4.0},
    t2i_adapter: {"guidance_scale": 4.0},
    animatediff: {"guidance_scale": 4.0},
    flux_control: {},
    flux_kontext: {},
    hunyuan_dit: {"guidance_scale": 2.0},
    kandinsky_decoder: {"guidance_scale": 2.0},
}
"""The guidance that each pipeline is drawn with."""


def call_of(given: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """A whole call, without guidance, that returns latents."""
    text = {} if {"prompt_embeds", "image_embeds"} & given.keys() else {"prompt": ["a", "b"], "guidance_scale": 1.0}
    draws = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    return {**text, **given, **draws, "output_type": "latent"}


def null_of(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with those of empty texts, `negative_...`, in place of the texts."""
    empty = {name: value for name, value in given.items() if name.startswith("negative_")}
    return given | {name.removeprefix("negative_"): value for name, value in empty.items()}


def save_denoiser(pipe: Any, folder: Path) -> str:
    """Save the denoiser and the scheduler as in the pipeline's own folder, and return the denoiser's name there."""
    place = "transformer" if hasattr(pipe, "transformer") else "unet"
    getattr(pipe, place).save_pretrained(folder / place)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    return place
