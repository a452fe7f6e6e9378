"""nvidia-modelopt's algorithms as peers: fake quantization in torch, calibrated on recorded calls.

Layers that a plan keeps at 8 bits because of their shape are at 8 bits here too. 4-bit weights have a float scale for
every 32 input channels, where ours have an integer for as many and one float a row.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.formats.schemes import IntWeight
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.types import Denoise

if TYPE_CHECKING:
    from intaglio.pipeline.model.denoiser import DenoiserModel

Quantizer = Mapping[str, Any] | None
CALIBRATION_ROWS = 16
"""Rows of each recorded call, evenly spread, in all steps."""


def channel(bits: int) -> Quantizer:
    """A weight with a scale for each output channel."""
    return {"num_bits": bits, "axis": 0}


def blocks(axis: int) -> Quantizer:
    """A 4-bit weight with a scale for every 32 input channels, along `axis`."""
    return {"num_bits": 4, "block_sizes": {axis: 32, "type": "static"}}


def tensor(bits: int | tuple[int, int]) -> Quantizer:
    """An input with one calibrated scale; bits as (4, 3) are FP8."""
    return {"num_bits": bits, "axis": None}


def token(bits: int | tuple[int, int]) -> Quantizer:
    """An input with a scale for each token, computed when it runs; bits as (4, 3) are FP8."""
    return {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}


Peer = tuple[Quantizer, Quantizer, Quantizer, Quantizer, Any]
"""Weight and input of linear layers, weight and input of convolutions, algorithm. Smoothing, AWQ and GPTQ are for
linear layers: convolutions are rounded to nearest under them."""
SMOOTH = {"method": "smoothquant", "alpha": 0.5}
FOUR = (blocks(-1), blocks(1))
PEERS: Mapping[str, Mapping[str, Peer]] = {
    "W8A8": {
        "INT8 default": (channel(8), tensor(8), channel(8), tensor(8), "max"),
        "INT8 SmoothQuant": (channel(8), tensor(8), channel(8), tensor(8), SMOOTH),
        "INT8, inputs by token": (channel(8), token(8), channel(8), tensor(8), "max"),
    },
    "W4A8": {
        "INT4 blocks, INT8 inputs": (FOUR[0], tensor(8), FOUR[1], tensor(8), "max"),
        "INT4 blocks, INT8 inputs by token": (FOUR[0], token(8), FOUR[1], tensor(8), "max"),
        "INT4 blocks by least square, INT8 inputs by token": (FOUR[0], token(8), FOUR[1], tensor(8), "mse"),
        "INT4 AWQ, INT8 inputs": (FOUR[0], tensor(8), FOUR[1], tensor(8), "awq_lite"),
        "INT4 GPTQ, INT8 inputs by token": (FOUR[0], token(8), FOUR[1], tensor(8), "gptq"),
        "W4A8 AWQ beta, FP8 inputs": (FOUR[0], tensor((4, 3)), FOUR[1], tensor((4, 3)), "awq_lite"),
        "INT4 AWQ, inputs in float": (FOUR[0], None, FOUR[1], None, "awq_lite"),
    },
    "W4A4": {
        "INT4 blocks, INT4 inputs": (FOUR[0], tensor(4), FOUR[1], tensor(4), "max"),
        "INT4 blocks, INT4 inputs by token": (FOUR[0], token(4), FOUR[1], tensor(4), "max"),
        "INT4 GPTQ, INT4 inputs by token": (FOUR[0], token(4), FOUR[1], tensor(4), "gptq"),
        "INT4 AWQ, INT4 inputs": (FOUR[0], tensor(4), FOUR[1], tensor(4), "awq_lite"),
    },
}


def config(peer: Peer, plan: QuantPlan) -> dict[str, Any]:
    """For `modelopt.torch.quantization.quantize`; later entries override earlier ones."""
    linear_weight, linear_input, conv_weight, conv_input, algorithm = peer
    entries = [{"quantizer_name": "*", "enable": False}]
    for kind, weight, x in (("nn.Linear", linear_weight, linear_input), ("nn.Conv2d", conv_weight, conv_input)):
        for name, quantizer in (("weight", weight), ("input", x)):
            if quantizer is not None:
                entries.append({"quantizer_name": f"*{name}_quantizer", "parent_class": kind, "cfg": dict(quantizer)})
    if linear_weight != channel(8):
        for layer in plan.layers:
            weight = plan.schemes[layer.name].weight
            if isinstance(weight, IntWeight) and weight.bits == 8:
                entries.append({"quantizer_name": f"{layer.name}.weight_quantizer", "cfg": dict(channel(8) or {})})
                entries.append({"quantizer_name": f"{layer.name}.input_quantizer", "cfg": dict(tensor(8) or {})})
    return {"quant_cfg": entries, "algorithm": algorithm}


def quantized_by(peer: Peer, model: "DenoiserModel", plan: QuantPlan, trajectory: Trajectory) -> Denoise:
    """The fake-quantized denoiser. Changes `model`."""
    rows = trajectory.some_rows(CALIBRATION_ROWS)

    def calibrate(module: Any) -> None:
        denoise = denoise_with(module, model)
        for step in range(len(trajectory.timesteps)):
            denoise(trajectory.call(step, rows))

    with quiet():
        import modelopt.torch.quantization as mtq

        mtq.quantize(model.module, config(peer, plan), calibrate)
    return denoise_with(model.module, model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed: a benchmark prints only results."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
