"""Let NVIDIA's Model Optimizer quantize the denoiser, on the calls that `calibrate` recorded."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from intaglio.passes.imports.imported import NotCarried, StaysFloat, outputs_of, take_layers
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import MissingExtra, RecipeError
from intaglio.pipeline.files import printable

if TYPE_CHECKING:
    from intaglio.passes.imports.saved_quantizers import SavedQuantizers
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.denoiser import DenoiserModel

CONFIGS: Mapping[str, bool] = {
    "INT8_DEFAULT_CFG": True,
    "INT8_SMOOTHQUANT_CFG": True,
    "INT8_WEIGHT_ONLY_CFG": False,
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": False,
    "INT4_AWQ_CFG": True,
    "FP8_DEFAULT_CFG": True,
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": False,
    "NVFP4_DEFAULT_CFG": True,
    "W4A16_NVFP4_CFG": False,
}
"""Configurations that can be imported; True if their scales depend on the recorded calls.

Model Optimizer calibrates other configurations of NVFP4 with its kernels for GPUs.
"""


class QuantizeWithModelopt(Pass):
    """Quantize the denoiser with NVIDIA's Model Optimizer, and take over its plan and its codes.

    Model Optimizer calibrates on the recorded calls, to integers, FP8 or NVFP4. Codes are exactly its codes; scales
    differ by at most one rounding of float32. Only weights and inputs of layers are quantized: attention,
    normalizations and outputs stay in float. A layer that cannot be imported exactly, such as a convolution with scales
    for blocks, stays in float too; the log names it, with the reason.
    """

    name: ClassVar[str] = "modelopt"
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN, QUANTIZED})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "nvidia-modelopt")

    config: str = Field(
        "INT8_DEFAULT_CFG", description=f"Model Optimizer's name of the configuration: {', '.join(CONFIGS)}"
    )
    block: Literal[32, 64, 128] = Field(
        128, description="number of neighbouring weights that share a scale, in INT4 configurations"
    )
    ignore: tuple[str, ...] = Field((), description="names of quantizers to switch off, as patterns: `proj_out*`")

    @field_validator("config")
    @classmethod
    def _is_of_integers(cls, written: str) -> str:
        if written not in CONFIGS:
            raise ValueError(
                f"{printable(written)[:80]} cannot be run here: only {', '.join(CONFIGS)} can. Save what others make"
                " with modelopt.torch.opt.save, and import the file with import-modelopt, which also reads SVDQuant"
            )
        return written

    def check(self, target: Target) -> None:
        """Raise MissingExtra if Model Optimizer is not installed."""
        if find_spec("modelopt") is None:
            raise MissingExtra("modelopt", f"the step {self.name}")

    def holds_weights(self) -> bool:
        """Return True: the weights of both models are compared."""
        return True

    def run(self, state: State, ctx: Context) -> Outputs:
        """Quantize the denoiser. Raises RecipeError for a pattern of `ignore` that matches no quantizer."""
        from intaglio.passes.imports.quantizers import taker
        from intaglio.pipeline.model.layers import layer_table

        model, trajectory = state[MODEL].open(), state[TRAJECTORY]
        layers = layer_table(model.module)
        own = {f"{layer.name}.{part}_quantizer" for layer in layers for part in ("weight", "input")}
        saved = self._quantized(model, own, trajectory)
        on = {name: quantizer for name, quantizer in saved.quantizers.items() if quantizer.on}
        take = taker(saved, on, layers, model, trajectory)

        def take_or_leave(layer: Layer) -> QuantizedLayerData:
            try:
                return take(layer)
            except NotCarried as reason:
                raise StaysFloat(str(reason)) from reason

        found = take_layers(layers, take_or_leave)
        return outputs_of(f"Model Optimizer {saved.version}, {self.config}", layers, found, (), trajectory, ctx)

    def _quantized(self, model: DenoiserModel, own: set[str], trajectory: Trajectory) -> SavedQuantizers:
        """Quantize the module in place, and return its quantizers. Only those named in `own` are switched on."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # they address programs that call Model Optimizer, not users of a recipe
            return self._calibrated(model, own, trajectory)

    def _calibrated(self, model: DenoiserModel, own: set[str], trajectory: Trajectory) -> SavedQuantizers:
        import modelopt
        import modelopt.torch.quantization as mtq
        import torch
        from modelopt.torch.quantization.conversion import quantizer_state

        from intaglio.passes.imports.saved_quantizers import grouped
        from intaglio.pipeline.model.calls import denoise_with

        def calibrate(module: torch.nn.Module) -> None:
            denoise = denoise_with(module, model)
            for step in range(len(trajectory.timesteps)):
                denoise(trajectory.call(step))

        config = self._config(getattr(mtq, self.config))
        algorithm = config.pop("algorithm")
        with torch.no_grad():
            mtq.quantize(model.module, config | {"algorithm": None})
            self._check_ignored(quantizer_state(model.module).keys())
            mtq.disable_quantizer(model.module, lambda name: name not in own or self._ignores(name))
            mtq.calibrate(model.module, algorithm, calibrate if CONFIGS[self.config] else None)
        return grouped(model.module.state_dict(), quantizer_state(model.module), modelopt.__version__)

    def _config(self, shipped: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a configuration of Model Optimizer in which INT4 blocks have the size `block`."""
        config = copy.deepcopy(dict(shipped))
        for row in config["quant_cfg"]:
            cfg = row.get("cfg") or {}
            if cfg.get("num_bits") == 4 and -1 in (blocks := cfg.get("block_sizes") or {}):
                blocks[-1] = self.block
        return config

    def _ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def _check_ignored(self, names: Collection[str]) -> None:
        """Raise RecipeError for patterns that match no quantizer."""
        if unfit := [pattern for pattern in self.ignore if not any(fnmatchcase(name, pattern) for name in names)]:
            raise RecipeError(f"ignore: {unfit[0]!r} fits none of the {len(names)} quantizers")
