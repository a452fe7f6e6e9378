"""One tiny denoiser with random weights for every family: its layers, its inputs and its quirks, in a block or two.

Each name is a model factory, as a recipe names it: `./tiny_families.py:flux`, with this folder in PYTHONPATH, for the
factories are in modules beside this one. Where the family can be called at several sizes, the second one there makes
those axes dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from _image_families import (
    auraflow,
    chroma,
    cogview4,
    dit,
    flux,
    flux2,
    glm_image,
    hunyuan_image,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
    z_image,
)
from _unet_families import plain_unet, policy_unet, sd15, sdxl, unet, vae_decoder, video_unet
from _video_families import cogvideox, cogvideox_rotary, hunyuan_video, hunyuan_video15, latte, ltx, mochi, wan

from intaglio.pipeline.model.denoiser import DenoiserModel

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
