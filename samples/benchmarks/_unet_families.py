"""Tiny UNets with random weights, of images, clips and actions; and the decoder of an autoencoder.

Each function is a model factory, as those of tiny_families.py.
"""

from __future__ import annotations

import diffusers
import torch
from _family_pieces import ROWS, _flow, _make, _noise, _rows
from torch import nn
from torch.nn import functional

from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.sampler import OneCall


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
