"""Take over weights that compressed-tensors or torchao quantized: their codes and scales, exactly or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.passes._imported import ImportPass, NotCarried, check_called, layer_data, problems_of, take_layers
from intaglio.pipeline.artifact import Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.keys import MODEL, TRAJECTORY

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.passes._saved_weights import SavedWeights
    from intaglio.pipeline.plan import Layer
    from intaglio.pipeline.quantized import QuantizedLayerData

CONFIG = "config.json"


class ImportWeights(ImportPass):
    """The plan and the integers are those of safetensors that compressed-tensors or torchao wrote.

    Codes and scales of weights are equal to the bit. An input's codes are those of the same float32 scale but for a
    rounding of it: where a token's scale is its largest magnitude / 127.5, that entry itself lies between two codes.
    What has no exact form here is an error that names it, and so is what else differs from the recipe's model.
    """

    name: ClassVar[str] = "import-weights"

    path: str = Field(
        description="the denoiser's folder, with config.json and safetensors, or one such file, beside the recipe"
    )

    @classmethod
    def files(cls, place: Path) -> list[Path]:
        """The tensors, and what config.json says of them."""
        found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not found:
            raise ValueError(f"{place.name}: no *.safetensors in it: name the folder of the denoiser itself")
        config = found[0].with_name(CONFIG)
        return [*found, config] if config.is_file() else found

    def run(self, state: State, ctx: Context) -> Outputs:
        """Raises RecipeError with everything that the files hold and that cannot be carried over."""
        from intaglio.pipeline.checkpoint import layer_table

        model, trajectory = state[MODEL].open(), state[TRAJECTORY]
        layers = layer_table(model.module)
        saved = _read(self.files(self._place), model.module)

        def take(layer: Layer) -> QuantizedLayerData | None:
            read = saved.weights.get(layer.name)
            if read is None:
                return None
            if layer.op != "linear":
                raise NotCarried(f"the weight of a {layer.op}: only those of linear layers are taken")
            check_called(layer, trajectory)
            weight = read(layer)
            return layer_data(layer, weight.bits, weight.codes, weight.scale_NG, weight.entering)

        taken, refused = take_layers(layers, take)
        if others := sorted(saved.weights.keys() - {layer.name for layer in layers}):
            refused["no layer of the model that can be quantized: leave it in float"] = others
        problems = [*saved.problems, *problems_of(model.module, saved.rest, taken, refused)]
        return self._outputs(saved.origin, layers, taken, problems, trajectory, ctx)


def _read(files: Iterable[Path], module: nn.Module) -> SavedWeights:
    """Raises RecipeError for what cannot be read, or was written by another library."""
    from safetensors import SafetensorError, safe_open

    from intaglio.passes import _compressed_tensors, _torchao

    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, object] = {}
    for file in files:
        try:
            if file.name == CONFIG:
                config = json.loads(file.read_text(encoding="utf-8"))
                continue
            with safe_open(file, "pt") as opened:
                metadata |= opened.metadata() or {}
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, ValueError) as error:
            raise RecipeError(f"{file.name}: cannot be read: {error}") from error
    written = config.get("quantization_config")
    if isinstance(written, dict) and written.get("quant_method") == _compressed_tensors.METHOD:
        return _compressed_tensors.read_compressed_tensors(tensors, written, module)
    if _torchao.NAMES in metadata:
        return _torchao.read_torchao(tensors, metadata)
    if any(name.endswith(".weight._data") or name.endswith(".weight._data._data") for name in tensors):
        raise RecipeError(
            "quanto's weights have no form here: 8-bit ones are for inputs in float, and 4-bit ones have float zeros"
        )
    method = written.get("quant_method") if isinstance(written, dict) else None
    raise RecipeError(
        f"{CONFIG} names {method!r} as quantization_config.quant_method, and there is no metadata of torchao: only what"
        f" {_compressed_tensors.METHOD} or torchao wrote is read"
    )
