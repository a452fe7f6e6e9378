"""A denoiser as a function of tensors, and its graph as torch.onnx.export writes it by itself."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.types import Inputs


def function_of(model: DenoiserModel, names: Sequence[str]) -> nn.Module:
    """Return the model as a function of the tensors of a call, in the order of these names."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model.module

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return denoise_with(self.module, model)(dict(zip(names, values, strict=True)))

    return Denoiser().eval()


def export(denoiser: nn.Module, call: Inputs, path: Path, *, dynamo: bool = True, any_batch: bool = False) -> None:
    """Write the graph for calls of this shape; with `any_batch`, which the older exporter takes, of any batch."""
    with torch.no_grad():
        torch.onnx.export(
            denoiser,
            tuple(call.values()),
            path,
            dynamo=dynamo,
            opset_version=20,
            input_names=list(call),
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in call} if any_batch else None,
            external_data=True,
            verbose=False,
        )
