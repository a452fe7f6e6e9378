"""A consistency UNet for terrain, which others trained, as a model factory: `_terrain.py:make`, with 2 or 3 steps.

The weights are an ONNX file in the PyPI package adaptive-terrain-diffusion 0.4.2 (MIT): 10.45 M parameters, one channel
of 128 x 128, conditioned on a difficulty of 1 to 100. `real_networks.py --install` downloads it. `make` reads the
weights and puts them into diffusers' UNet2DModel; the names of its layers in the file are those of OpenAI's
guided-diffusion.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from intaglio import DenoiserModel

PACKAGES = Path(os.environ.get("INTAGLIO_PACKAGES", Path.home() / ".cache" / "intaglio-packages"))
"""Folder with the unpacked packages."""
WEIGHTS = PACKAGES / "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
CHANNELS, LAYERS, FIRST_ATTENTION = (32, 32, 64, 96, 128), 4, 2
"""Channels of each level, residual blocks of each level, and the first level whose blocks have an attention."""
DIFFICULTIES = 100
SIGMA_DATA, SIGMA_LEAST, SIGMAS = 0.5, 0.002, (80.0, 2.0, 0.5)
Arrays = dict[str, NDArray[np.float32]]


class Weights:
    """Weights of the ONNX file by the names of its layers, copied to the names of diffusers' layers in `state`."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(path).graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.source: Arrays = {n.removeprefix("network."): a for n, a in arrays.items() if n.startswith("network.")}
        self.state: dict[str, torch.Tensor] = {}
        self._norms = _normalizations(graph, arrays)

    def put(self, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = torch.tensor(weight), torch.tensor(bias)

    def copy(self, name: str, source: str) -> None:
        self.put(name, self.source[f"{source}.weight"], self.source[f"{source}.bias"])

    def norm(self, name: str) -> None:
        """Copy the next group normalization: they have no names, and come in the order of execution."""
        self.put(name, *next(self._norms))

    def residual(self, name: str, source: str) -> None:
        self.norm(f"{name}.norm1")
        self.copy(f"{name}.conv1", f"{source}.in_layers.2")
        self.copy(f"{name}.time_emb_proj", f"{source}.emb_layers.1")
        self.norm(f"{name}.norm2")
        self.copy(f"{name}.conv2", f"{source}.out_layers.3")
        if f"{source}.skip_connection.weight" in self.source:
            self.copy(f"{name}.conv_shortcut", f"{source}.skip_connection")

    def attention(self, name: str, source: str) -> None:
        self.norm(f"{name}.group_norm")
        weights, biases = self.source[f"{source}.qkv.weight"][:, :, 0, 0], self.source[f"{source}.qkv.bias"]
        for to, weight, bias in zip(("to_q", "to_k", "to_v"), np.split(weights, 3), np.split(biases, 3), strict=True):
            self.put(f"{name}.{to}", weight, bias)
        out = self.source[f"{source}.proj_out.weight"][:, :, 0, 0]
        self.put(f"{name}.to_out.0", out, self.source[f"{source}.proj_out.bias"])

    def difficulties(self) -> torch.Tensor:
        """Return the embeddings of all difficulties, (100, E); the file computes them from a number in [0, 1]."""
        first, second = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer, source in ((first, "label_emb.0"), (second, "label_emb.2")):
            layer.weight.data, layer.bias.data = (
                torch.tensor(self.source[f"{source}.{n}"]) for n in ("weight", "bias")
            )
        difficulty = torch.arange(DIFFICULTIES).float().view(-1, 1) / (DIFFICULTIES - 1)
        with torch.no_grad():
            return torch.Tensor(second(nn.functional.silu(first(difficulty))))


def _normalizations(graph: Any, arrays: Arrays) -> Iterator[tuple[NDArray[np.float32], ...]]:
    """Yield weight and bias of each group normalization: InstanceNormalization, Reshape, Mul and Add in the file."""
    readers: dict[str, Any] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            mul = readers[readers[node.output[0]].output[0]]
            pair = mul, readers[mul.output[0]]
            yield tuple(next(arrays[i] for i in each.input if i in arrays).reshape(-1) for each in pair)


def unet() -> nn.Module:
    """Return the network with its weights, in the order in which it executes its layers."""
    from diffusers import UNet2DModel

    weights, last = Weights(WEIGHTS), len(CHANNELS) - 1
    for to, source in (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")):
        weights.copy(to, source)
    weights.copy("conv_in", "input_blocks.0.0")
    weights.state["class_embedding.weight"] = weights.difficulties()
    block = 1
    for level in range(last + 1):
        for i in range(LAYERS):
            weights.residual(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{block}.0")
            if level >= FIRST_ATTENTION:
                weights.attention(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{block}.1")
            block += 1
        if level < last:
            weights.residual(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{block}.0")
            block += 1
    weights.residual("mid_block.resnets.0", "middle_block.0")
    weights.attention("mid_block.attentions.0", "middle_block.1")
    weights.residual("mid_block.resnets.1", "middle_block.2")
    for level in range(last + 1):
        attends = level <= last - FIRST_ATTENTION
        for i in range(LAYERS + 1):
            source = f"output_blocks.{level * (LAYERS + 1) + i}"
            weights.residual(f"up_blocks.{level}.resnets.{i}", f"{source}.0")
            if attends:
                weights.attention(f"up_blocks.{level}.attentions.{i}", f"{source}.1")
        if level < last:
            weights.residual(f"up_blocks.{level}.upsamplers.0", f"{source}.{1 + attends}")
    weights.norm("conv_norm_out")
    weights.copy("conv_out", "out.2")
    network = UNet2DModel(
        sample_size=128,
        in_channels=1,
        out_channels=1,
        freq_shift=0,
        flip_sin_to_cos=True,
        layers_per_block=LAYERS,
        block_out_channels=CHANNELS,
        down_block_types=("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 2,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=32,
        norm_num_groups=32,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=DIFFICULTIES,
    )
    network.load_state_dict(weights.state)
    return network.eval()


class ConsistencySteps:
    """Scheduler of two or three steps: each one goes to a sample, and adds noise of the next sigma from a fixed seed.

    A timestep is 250 log(sigma).
    """

    order, init_noise_sigma = 1, SIGMAS[0]

    def __init__(self) -> None:
        self.config: dict[str, object] = {}
        self.timesteps = torch.tensor([])

    def set_timesteps(self, num_inference_steps: int, **_: object) -> None:
        self.sigmas = torch.tensor(SIGMAS[:num_inference_steps])
        self.timesteps = 250 * self.sigmas.log()

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample / (_sigma(timestep) ** 2 + SIGMA_DATA**2) ** 0.5

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> SimpleNamespace:
        """Apply the boundary condition of consistency models (Song et al. 2023, appendix C), and add noise."""
        sigma, i = _sigma(timestep), int((self.timesteps - float(timestep)).abs().argmin())
        kept = SIGMA_DATA**2 / ((sigma - SIGMA_LEAST) ** 2 + SIGMA_DATA**2)
        added = (sigma - SIGMA_LEAST) * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5
        sample = kept * sample + added * model_output
        if i + 1 < len(self.sigmas):
            noise = torch.randn(sample.shape[1:], generator=torch.Generator().manual_seed(i))
            sample = sample + self.sigmas[i + 1] * noise
        return SimpleNamespace(prev_sample=sample)


def _sigma(timestep: torch.Tensor) -> float:
    return float(torch.exp(torch.as_tensor(timestep).float() / 250))


def make() -> DenoiserModel:
    """Return the network with its scheduler, conditioned on four difficulties."""
    conditions = {"class_labels": torch.tensor([9, 29, 49, 79])}
    return DenoiserModel(unet(), ConsistencySteps(), (1, 128, 128), conditions=conditions)
