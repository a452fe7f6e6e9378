"""A diffusion UNet for power spectra of the 21-cm line, which others trained, as a model factory: `_spectra.py:make`.

The weights are in the PyPI package 21cmPSDenoiser 1.0.2 (MIT; Breitman et al. 2025): 9.1 M parameters. Given a spectrum
of one simulated universe, it draws spectra of what the mean over many would be. `real_networks.py --install` downloads
the package. `make` builds the network of its file model.py, without code of the package.

Spectra to denoise are not in the package: `spectra` makes smooth ones and adds the noise of as many modes as a bin has.
"""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from intaglio import DenoiserModel

PACKAGES = Path(os.environ.get("INTAGLIO_PACKAGES", Path.home() / ".cache" / "intaglio-packages"))
"""Folder with the unpacked packages."""
WEIGHTS, CONSTANTS = (PACKAGES / "psdenoiser" / name for name in ("denoiser_model.pt", "constants.npz"))
WIDTHS = (16, 32, 64, 128, 256)
"""Channels of the first convolution, and of each level."""
HEADS, HEAD = 4, 32


class Attention(nn.Module):
    """Attention over all places, linear in their number (Shen et al. 2021) or usual, behind a normalization."""

    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        out = nn.Conv2d(HEADS * HEAD, width, 1)
        self.norm = nn.GroupNorm(1, width)
        self.to_qkv = nn.Conv2d(width, 3 * HEADS * HEAD, 1, bias=False)
        self.to_out = nn.Sequential(out, nn.GroupNorm(1, width)) if linear else out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).unflatten(1, (3, HEADS, HEAD))
        q, k, v = qkv.unbind(1)
        if self.linear:
            q, k = q.softmax(-2) * HEAD**-0.5, k.softmax(-1)
            mixed = (k @ v.transpose(-1, -2)).transpose(-1, -2) @ q
        else:
            scores = (q * HEAD**-0.5).transpose(-1, -2) @ k
            mixed = v @ scores.softmax(-1).transpose(-1, -2)
        return x + self.to_out(mixed.flatten(1, 2).unflatten(2, x.shape[2:]))


class Half(nn.Module):
    """Convolution, normalization and activation: one half of a residual block."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(4, out)

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: float | torch.Tensor = 0.0
    ) -> torch.Tensor:
        x = self.norm(self.proj(x))
        return nn.functional.silu(x if scale is None else x * (scale + 1) + shift)


class Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(128, 2 * out))
        self.block1, self.block2 = Half(width, out), Half(out, out)
        self.res_conv = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, 1)
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


def _down(width: int, out: int, last: bool) -> nn.Module:
    if last:
        return nn.Conv2d(width, out, 3, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))


def _up(width: int, out: int, last: bool) -> nn.Module:
    if last:
        return nn.Conv2d(width, out, 3, padding=1)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, out, 3, padding=1))


class UNet(nn.Module):
    """Predict the noise of a spectrum `sample` (B, 1, 32, 16), given the spectrum `given` to denoise."""

    def __init__(self) -> None:
        super().__init__()
        pairs = list(pairwise(WIDTHS))
        last = len(pairs) - 1
        self.init_conv = nn.Conv2d(2, WIDTHS[0], 1)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128))
        self.downs = nn.ModuleList(
            nn.ModuleList([Residual(i, i), Residual(i, i), Attention(i, True), _down(i, o, level == last)])
            for level, (i, o) in enumerate(pairs)
        )
        self.mid_block1, self.mid_block2 = (Residual(WIDTHS[-1], WIDTHS[-1]) for _ in range(2))
        self.mid_attn = Attention(WIDTHS[-1], False)
        self.ups = nn.ModuleList(
            nn.ModuleList([Residual(o + i, o), Residual(o + i, o), Attention(o, True), _up(o, i, level == last)])
            for level, (i, o) in enumerate(reversed(pairs))
        )
        self.final_res_block, self.final_conv = Residual(2 * WIDTHS[0], 32), nn.ConvTranspose2d(32, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        first = x = self.init_conv(torch.cat([sample, given], 1))
        angles = timestep[:, None] * torch.exp(torch.arange(16, device=x.device) * (-np.log(10000) / 15))
        time = self.time_mlp(torch.cat([angles.sin(), angles.cos()], -1))
        kept = []
        for block1, block2, attention, down in self.downs:
            x = block1(x, time)
            kept.append(x)
            x = attention(block2(x, time))
            kept.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)
        for block1, block2, attention, up in self.ups:
            x = block1(torch.cat([x, kept.pop()], 1), time)
            x = up(attention(block2(torch.cat([x, kept.pop()], 1), time)))
        return self.final_conv(self.final_res_block(torch.cat([x, first], 1), time))


def unet() -> UNet:
    """Return the network with its weights. Those of 3x3 convolutions in blocks are standardized as in model.py."""
    network = UNet()
    state = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    for name, weight in state.items():
        if name.endswith(".proj.weight"):
            variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
            state[name] = (weight - mean) * (variance + 1e-5).sqrt()  # the sign of the exponent is the package's
    network.load_state_dict({name.replace(".fn.fn.", ".").replace(".fn.", "."): w for name, w in state.items()})
    return network.eval()


def spectra(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return smooth spectra and noisy ones, (M, 1, 32, 16) each: log10 of mK^2 in the scale of the network."""
    constants, rng = np.load(CONSTANTS), np.random.default_rng(0)
    k = np.hypot(constants["kperp"][:, None], constants["kpar"][None])
    slope, level = rng.uniform(0, 1, (count, 1, 1)), rng.uniform(0, 2, (count, 1, 1))
    smooth = 10**level * (k / 0.1) ** slope
    modes = np.maximum(constants["Nmodes"], 4)
    noisy = smooth * rng.gamma(modes, 1 / modes, smooth.shape)
    (means, noises) = ((constants[f"{n}_mean"], constants[f"{n}_std"]) for n in ("mean", "noisy"))
    return tuple(
        torch.tensor((np.log10(x) - bias) / scale * 2 - 1).float().unsqueeze(1)
        for x, (bias, scale) in ((smooth, means), (noisy, noises))
    )


def make() -> DenoiserModel:
    """Return the network with a scheduler of the probability flow that it was trained for, Ho et al. 2020's."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing", clip_sample=False)
    return DenoiserModel(unet(), scheduler, (1, 32, 16), conditions={"given": spectra()[1]})
