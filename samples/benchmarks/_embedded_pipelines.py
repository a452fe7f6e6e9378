"""Pipelines of diffusers around the tiny denoisers, which are given embeddings in place of texts.

Each function returns a pipeline and further arguments of its call, without guidance, as those of joined_pipelines.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import tiny_families as tiny
import torch
from _family_pieces import _flow
from _other_families import cogview3 as cogview3_family
from _other_families import lumina_next as lumina_next_family
from _other_families import ovis_image as ovis_image_family
from joined_pipelines import ROWS, UNCHECKED, sd_scheduler
from tiny_pipelines import pixart_transformer
from torch import nn

Made = tuple[Any, dict[str, Any]]


def _pipe(kind: Any, module: nn.Module, scheduler: Any = None, **parts: Any) -> Any:
    """The pipeline without text encoders and autoencoder."""
    wanted = inspect.signature(kind.__init__).parameters
    place = "unet" if "unet" in wanted else "transformer"
    given = {place: module, "scheduler": scheduler or _flow(), **parts}
    required = [name for name, each in wanted.items() if each.default is each.empty and name != "self"]
    return kind(**(dict.fromkeys(required) | given))


def _texts(
    tokens: int, width: int, mask: str | None = None, pooled: int | None = None, second: str = ""
) -> dict[str, torch.Tensor]:
    """Embeddings of texts, and as `negative_...` those of empty texts; `mask` names the mask of their tokens."""
    found: dict[str, torch.Tensor] = {}
    for seed, part in enumerate(("", "negative_")):
        numbers = torch.Generator().manual_seed(seed)
        found[f"{part}prompt_embeds{second}"] = torch.randn(ROWS, tokens, width, generator=numbers)
        if pooled is not None:
            found[f"{part}pooled_prompt_embeds"] = torch.randn(ROWS, pooled, generator=numbers)
        if mask is not None:
            found[f"{part}{mask}"] = torch.ones(ROWS, tokens, dtype=torch.int64)
    return found


def _positive(texts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in texts.items() if not name.startswith("negative_")}


def _square(side: int, frames: int | None = None) -> dict[str, int]:
    return {"height": side, "width": side} | ({} if frames is None else {"num_frames": frames})


OFF = {"guidance_scale": 1.0}
MASK = "prompt_attention_mask"


def sd15() -> Made:
    pipe = _pipe(diffusers.StableDiffusionPipeline, tiny.sd15().module, sd_scheduler(), **UNCHECKED)
    return pipe, {**_texts(5, 64), **_square(64), **OFF}


def sdxl() -> Made:
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = _pipe(diffusers.StableDiffusionXLPipeline, tiny.sdxl().module, scheduler, add_watermarker=False)
    return pipe, {**_texts(5, 64, pooled=64), **_square(64), **OFF}


def pixart() -> Made:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = _pipe(diffusers.PixArtAlphaPipeline, pixart_transformer(), scheduler)
    texts = {**_texts(5, 64, MASK), "negative_prompt": None}
    return pipe, {**texts, **_square(64), "use_resolution_binning": False, **OFF}


def sd3() -> Made:
    pipe = _pipe(diffusers.StableDiffusion3Pipeline, tiny.sd3().module)
    return pipe, {**_texts(5, 64, pooled=64), **_square(64), **OFF}


def flux() -> Made:
    return _pipe(diffusers.FluxPipeline, tiny.flux().module), {**_positive(_texts(5, 64, pooled=64)), **_square(64)}


def flux2() -> Made:
    return _pipe(diffusers.Flux2Pipeline, tiny.flux2().module), {**_positive(_texts(5, 64)), **_square(64)}


def sana() -> Made:
    pipe = _pipe(diffusers.SanaPipeline, tiny.sana().module)
    texts = {**_texts(5, 64, MASK), "negative_prompt": None}
    return pipe, {**texts, **_square(256), "use_resolution_binning": False, **OFF}


def auraflow() -> Made:
    pipe = _pipe(diffusers.AuraFlowPipeline, tiny.auraflow().module)
    return pipe, {**_texts(5, 64, MASK), **_square(64), **OFF}


def cogview4() -> Made:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    pipe = _pipe(diffusers.CogView4Pipeline, tiny.cogview4().module, scheduler)
    return pipe, {**_texts(5, 64), **_square(64), **OFF}


def _velocity() -> diffusers.CogVideoXDDIMScheduler:
    return diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")


def cogview3() -> Made:
    pipe = _pipe(diffusers.CogView3PlusPipeline, cogview3_family().module, _velocity())
    return pipe, {**_texts(5, 64), **_square(64), **OFF}


def cogvideox() -> Made:
    pipe = _pipe(diffusers.CogVideoXPipeline, tiny.cogvideox().module, _velocity())
    return pipe, {**_texts(6, 64), **_square(64, 5), **OFF}


def latte() -> Made:
    pipe = _pipe(diffusers.LattePipeline, tiny.latte().module, diffusers.DDIMScheduler(clip_sample=False))
    texts = {**_texts(5, 64), "negative_prompt": None, "mask_feature": False}
    return pipe, {**texts, **_square(64), "video_length": 2, **OFF}


def ltx() -> Made:
    return _pipe(diffusers.LTXPipeline, tiny.ltx().module), {**_texts(5, 64, MASK), **_square(128, 9), **OFF}


def wan() -> Made:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = _pipe(diffusers.WanPipeline, tiny.wan().module, diffusers.UniPCMultistepScheduler(**flow))
    return pipe, {**_texts(5, 64), **_square(64, 5), **OFF}


def hunyuan_video() -> Made:
    pipe = _pipe(diffusers.HunyuanVideoPipeline, tiny.hunyuan_video().module)
    return pipe, {**_positive(_texts(5, 64, MASK, pooled=64)), **_square(64, 5)}


def hunyuan_image() -> Made:
    pipe = _pipe(diffusers.HunyuanImagePipeline, tiny.hunyuan_image().module)
    second = _texts(4, 32, "prompt_embeds_mask_2", second="_2")
    return pipe, {**_texts(5, 64, "prompt_embeds_mask"), **second, **_square(256)}


def z_image() -> Made:
    texts = {name: list(rows) for name, rows in _texts(5, 64).items()}
    return _pipe(diffusers.ZImagePipeline, tiny.z_image().module), {**texts, **_square(64), "guidance_scale": 0.0}


def qwen_image() -> Made:
    pipe = _pipe(diffusers.QwenImagePipeline, tiny.qwen_image().module)
    return pipe, {**_texts(5, 64, "prompt_embeds_mask"), **_square(64), "true_cfg_scale": 1.0}


def chroma() -> Made:
    texts = {name: value.float() for name, value in _texts(5, 64, MASK).items()}
    return _pipe(diffusers.ChromaPipeline, tiny.chroma().module), {**texts, **_square(64), **OFF}


def lumina2() -> Made:
    return _pipe(diffusers.Lumina2Pipeline, tiny.lumina2().module), {**_texts(5, 64, MASK), **_square(64), **OFF}


def lumina_next() -> Made:
    pipe = _pipe(diffusers.LuminaPipeline, lumina_next_family().module)
    return pipe, {**_texts(5, 32, MASK), **_square(64), **OFF}


def mochi() -> Made:
    return _pipe(diffusers.MochiPipeline, tiny.mochi().module), {**_texts(8, 64, MASK), **_square(64, 7), **OFF}


def glm_image() -> Made:
    codes = {"prior_token_ids": torch.ones(ROWS, 16, dtype=torch.int64)}
    return _pipe(diffusers.GlmImagePipeline, tiny.glm_image().module), {**_texts(5, 64), **codes, **_square(64), **OFF}


def ovis_image() -> Made:
    pipe = _pipe(diffusers.OvisImagePipeline, ovis_image_family().module)
    return pipe, {**_texts(5, 64), "negative_prompt": None, **_square(64), **OFF}


GUIDED: Mapping[Callable[[], Made], Mapping[str, float]] = {
    sd15: {"guidance_scale": 4.0},
    sdxl: {"guidance_scale": 4.0},
    pixart: {"guidance_scale": 4.0},
    sd3: {"guidance_scale": 4.0},
    flux: {},
    flux2: {},
    sana: {"guidance_scale": 4.0},
    auraflow: {"guidance_scale": 3.5},
    cogview4: {"guidance_scale": 4.0},
    cogview3: {"guidance_scale": 4.0},
    cogvideox: {"guidance_scale": 4.0},
    latte: {"guidance_scale": 4.0},
    ltx: {"guidance_scale": 3.0},
    wan: {"guidance_scale": 4.0},
    hunyuan_video: {},
    hunyuan_image: {},
    z_image: {"guidance_scale": 3.0},
    qwen_image: {"true_cfg_scale": 4.0},
    chroma: {"guidance_scale": 4.0},
    lumina2: {"guidance_scale": 4.0},
    lumina_next: {"guidance_scale": 4.0},
    mochi: {"guidance_scale": 4.0},
    glm_image: {"guidance_scale": 1.5},
    ovis_image: {"guidance_scale": 4.0},
}
"""The guidance that each pipeline is drawn with."""
