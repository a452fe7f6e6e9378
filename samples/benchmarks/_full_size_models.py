"""List full-size denoisers of diffusers: their configurations, and what they take beside sample and timestep."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Denoiser:
    """A class of diffusers with its configuration, what it takes beside sample and timestep, and its sampler's class.

    Shapes are those of one row.
    """

    folder: str
    kind: str
    config: Mapping[str, int | bool | tuple[int, ...]]
    sample_shape: tuple[int, ...]
    texts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    places: int = 0
    """Axes of the coordinates that image and text have for each token; 0 if the denoiser takes none."""
    timestep_scale: float = 1.0


TOKENS = 77
"""Tokens of one text."""
SIDE = 32
"""Tokens along one side of an image of 512 x 512 whose latents are packed."""
FLOW = "FlowMatchEulerDiscreteScheduler"
MODELS: Mapping[str, Denoiser] = {
    # 256 x 256; 750 M parameters, as diffusers has an embedder in every block
    "dit-xl": Denoiser(
        "transformer",
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        (4, 32, 32),
    ),
    # 512 x 512; 611 M
    "pixart-xl": Denoiser(
        "transformer",
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096},
        (4, 64, 64),
        {"encoder_hidden_states": (TOKENS, 4096)},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    # 512 x 512; 860 M
    "sd15-unet": Denoiser(
        "unet",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        (4, 64, 64),
        {"encoder_hidden_states": (TOKENS, 768)},
    ),
    # 512 x 512; 2.1 G, of which 0.06 G are its table of positions
    "sd3": Denoiser(
        "transformer",
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        (16, 64, 64),
        {"encoder_hidden_states": (TOKENS, 4096), "pooled_projections": (2048,)},
        scheduler=FLOW,
    ),
    # FLUX.2-klein, 512 x 512; 3.9 G
    "flux2-klein": Denoiser(
        "transformer",
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (SIDE * SIDE, 128),
        {"encoder_hidden_states": (TOKENS, 7680)},
        scheduler=FLOW,
        places=4,
        timestep_scale=1e-3,
    ),
    # 512 x 512; 6.2 G
    "z-image": Denoiser(
        "transformer",
        "ZImageTransformer2DModel",
        {},
        (16, 1, 64, 64),
        {"cap_feats": (TOKENS, 2560)},
        scheduler=FLOW,
        timestep_scale=1e-3,
    ),
    # Flux.1-dev, 512 x 512; 11.9 G
    "flux": Denoiser(
        "transformer",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        (SIDE * SIDE, 64),
        {"encoder_hidden_states": (TOKENS, 4096), "pooled_projections": (768,), "guidance": ()},
        scheduler=FLOW,
        places=3,
        timestep_scale=1e-3,
    ),
}
