"""nvidia-modelopt's FP8, NVFP4 and INT4 as peers: fake quantization in torch on the CPU, calibrated on recorded calls.

Each peer follows a plan of ours: the layers that the plan gives NVFP4 have the peer's 4-bit format. All other layers
have FP8 beside FP8, and INT8 beside 4 bits, with a scale for each token as ours where it can. So all of them have the
same bytes, except for the branches of SVDQuant.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from _efficientdm_peers import CALIBRATION_ROWS, Quantizer, blocks, channel, quiet, tensor, token

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.formats.nvfp4 import Nvfp4Weight
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.types import Denoise

if TYPE_CHECKING:
    from intaglio.pipeline.model.denoiser import DenoiserModel

E4M3: tuple[int, int] = (4, 3)
NVFP4: Quantizer = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}}
"""As in its NVFP4_DEFAULT_CFG: the scale of the tensor is calibrated, those of blocks are measured in each call."""
FP8_WEIGHT: Quantizer = {"num_bits": E4M3, "axis": 0}


@dataclass(frozen=True)
class Peer:
    """Formats of weights and inputs, first of NVFP4 layers of the plan, then of other linear layers and convolutions.

    `lowrank` is the rank of SVDQuant's branches, 0 without them. `narrow` is False if the inputs have more than 4 bits.
    AWQ computes each call with eleven scales, so it is calibrated on fewer rows.
    """

    four: tuple[Quantizer, Quantizer]
    eight: tuple[Quantizer, Quantizer]
    conv: tuple[Quantizer, Quantizer]
    algorithm: str = "max"
    lowrank: int = 0
    narrow: bool = True

    @property
    def rows(self) -> int:
        """Rows of each recorded call, evenly spread, in all steps."""
        return CALIBRATION_ROWS if self.algorithm == "max" else CALIBRATION_ROWS // 4

    def config(self, plan: QuantPlan) -> dict[str, Any]:
        """For `modelopt.torch.quantization.quantize`; later entries override earlier ones."""
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        others = []
        for layer in plan.layers:
            scheme = plan.schemes[layer.name]
            if scheme == FLOAT:
                continue
            four = isinstance(scheme.weight, Nvfp4Weight)
            formats = self.four if four else self.conv if layer.op == "conv" else self.eight
            others += [] if four else [layer.name]
            for part, quantizer in zip(("weight", "input"), formats, strict=True):
                if quantizer is not None:
                    entries.append({"quantizer_name": f"{layer.name}.{part}_quantizer", "cfg": dict(quantizer)})
        if not self.lowrank:
            return {"quant_cfg": entries, "algorithm": self.algorithm}
        algorithm = {"method": self.algorithm, "lowrank": self.lowrank, "skip_layers": others}
        return {"quant_cfg": entries, "algorithm": algorithm}


FP8 = (tensor(E4M3), tensor(E4M3))
FP8_TOKEN, FP8_CONV = (FP8_WEIGHT, token(E4M3)), (FP8_WEIGHT, tensor(E4M3))
INT8 = ((channel(8), token(8)), (channel(8), tensor(8)))
INT8_STATIC = (INT8[1], INT8[1])
"""For AWQ, which cannot be calibrated beside inputs that are scaled by token."""
FOUR = (NVFP4, NVFP4)
PEERS: Mapping[str, Mapping[str, Peer]] = {
    "FP8": {
        "FP8 default": Peer(FP8, FP8, FP8, narrow=False),
        "FP8, weights by channel, inputs by token": Peer(FP8_TOKEN, FP8_TOKEN, FP8_CONV, narrow=False),
    },
    "NVFP4": {
        "NVFP4": Peer(FOUR, *INT8),
        "NVFP4 AWQ": Peer(FOUR, *INT8_STATIC, "awq_lite"),
        "NVFP4 SVDQuant, rank 8": Peer(FOUR, *INT8_STATIC, "svdquant", 8),
        "NVFP4 SVDQuant, rank 32": Peer(FOUR, *INT8_STATIC, "svdquant", 32),
        "INT4 blocks, INT4 inputs by token": Peer((blocks(-1), token(4)), *INT8),
        "INT4 AWQ, inputs in float": Peer((blocks(-1), None), *INT8_STATIC, "awq_lite", narrow=False),
    },
}


def quantized_by(peer: Peer, model: "DenoiserModel", plan: QuantPlan, trajectory: Trajectory) -> tuple[Denoise, int]:
    """Return the fake-quantized denoiser, and the bytes of its branches in float16. Changes `model`.

    Call it, and the denoiser, inside `nvfp4_on_cpu`.
    """
    rows = trajectory.some_rows(peer.rows)

    def calibrate(module: Any) -> None:
        denoise = denoise_with(module, model)
        for step in range(len(trajectory.timesteps)):
            denoise(trajectory.call(step, rows))

    with quiet(), torch.no_grad():
        import modelopt.torch.quantization as mtq

        mtq.quantize(model.module, peer.config(plan), calibrate)
    factors = [v for name, v in model.module.state_dict().items() if "_svdquant_lora_" in name]
    return denoise_with(model.module, model), 2 * sum(v.numel() for v in factors)


@contextmanager
def nvfp4_on_cpu() -> Iterator[None]:
    """Let modelopt's fake quantization to NVFP4, which has kernels for GPUs only, compute with its packed tensors."""
    with quiet():
        from modelopt.torch.quantization import tensor_quant
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def rounded(x: torch.Tensor, block: int, amax: torch.Tensor, *_: int) -> torch.Tensor:
        packed, scale, double = NVFP4QTensor.quantize(x, block, weights_scaling_factor_2=amax.amax().float() / 2688)
        values: torch.Tensor = packed.dequantize(
            dtype=x.dtype, scale=scale, double_scale=double, block_sizes={-1: block}
        )
        return values

    with patch.object(tensor_quant, "dynamic_block_quantize_op", rounded):
        yield
