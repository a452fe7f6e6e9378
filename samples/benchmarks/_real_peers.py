"""onnxruntime's and Model Optimizer's INT8 of a network, as ONNX files that are compared with ours.

All of them quantize one float32 graph or module of the network, calibrated on the calls that `calibrate` recorded. Each
function writes an ONNX file for calls of ROWS samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _efficientdm_peers import quiet
from _torch_export import export, function_of
from numpy.typing import NDArray
from torch import nn

from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.types import Inputs

Feed = Mapping[str, NDArray[np.generic]]
OPERATORS = ["Conv", "MatMul", "Gemm"]


@dataclass(frozen=True)
class Network:
    """A model, its recorded calls, one for each step, and its graph in float32."""

    checkpoint: Checkpoint
    calls: Sequence[Inputs]
    float_graph: Path

    def feeds(self) -> Iterator[Feed]:
        return ({name: value.numpy() for name, value in call.items()} for call in self.calls)

    def denoiser(self) -> nn.Module:
        """Return the module as a function of the call's tensors, in their order."""
        return function_of(self.checkpoint.open(), list(self.calls[0]))


def prepared(network: Network, folder: Path) -> Path:
    """Return the float graph in one file, without shapes of values: onnxruntime's quantizers infer their own."""
    import onnx

    model, path = onnx.load(network.float_graph), folder / "prepared.onnx"
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def static(network: Network, path: Path) -> None:
    """onnxruntime.quantization.quantize_static: INT8 weights by channel, UINT8 inputs by tensor, from all steps."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Recorded(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = network.feeds()

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    with quiet():
        quantize_static(
            prepared(network, path.parent),
            path,
            Recorded(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


def dynamic(network: Network, path: Path) -> None:
    """onnxruntime.quantization.quantize_dynamic: INT8 weights by channel, inputs by tensor when they are computed."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            prepared(network, path.parent),
            path,
            op_types_to_quantize=OPERATORS[1:],  # ConvInteger has no kernel for signed weights
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def modelopt(network: Network, path: Path, config: str) -> None:
    """modelopt.torch.quantization with one of its configurations, exported by torch."""
    import modelopt.torch.quantization as mtq

    denoiser = network.denoiser()

    def calibrate(module: Any) -> None:
        for call in network.calls:
            module(*call.values())

    with torch.no_grad(), quiet():
        mtq.quantize(denoiser, getattr(mtq, config), calibrate)
    with quiet():
        export(denoiser, network.calls[0], path, dynamo=False)  # the other exporter cannot write its quantizers


PEERS: Mapping[str, Callable[[Network, Path], None]] = {
    "onnxruntime static": static,
    "onnxruntime dynamic": dynamic,
    "modelopt INT8": lambda network, path: modelopt(network, path, "INT8_DEFAULT_CFG"),
    "modelopt SmoothQuant": lambda network, path: modelopt(network, path, "INT8_SMOOTHQUANT_CFG"),
}
