"""Take over weights that other libraries quantized: their codes and scales, exactly or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.passes.imports import comfy as _comfy
from intaglio.passes.imports import compressed_tensors as _compressed_tensors
from intaglio.passes.imports import gguf as _gguf
from intaglio.passes.imports import torchao as _torchao
from intaglio.passes.imports.gguf_file import check_gguf
from intaglio.passes.imports.imported import (
    ImportPass,
    NotCarried,
    StaysFloat,
    check_called,
    layer_data,
    problems_of,
    shown,
    some,
    take_layers,
)
from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MOST_JSON, checked_file, open_safetensors, printable, read_json_object

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.passes.imports.saved_weights import SavedWeights
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.formats.layer import Layer

CONFIG = "config.json"


class ImportWeights(ImportPass):
    """Import the plan and the integers from files of compressed-tensors, torchao or ComfyUI, or from a GGUF file.

    Codes and scales of weights are equal to the bit. Scales of inputs are equal up to one rounding in float32. If a
    token's scale is its largest magnitude / 127.5, this largest value lies exactly between two codes, so it may be
    rounded either way. A layer that cannot be imported exactly is an error that names it, and so is any other
    difference from the model.
    """

    name: ClassVar[str] = "import-weights"
    version: ClassVar[int] = 2

    path: str = Field(
        description="the denoiser's folder, with config.json and safetensors, or one safetensors file, or one GGUF"
        " file; relative to the recipe"
    )
    requantize: bool = Field(
        False,
        description="round weights of GGUF in Q8_0 again, to one scale for each output channel, for targets that do not"
        " multiply 8-bit weights in groups",
    )

    @classmethod
    def files(cls, place: Path) -> list[Path]:
        """Return the files of tensors, and config.json where it is beside them. Raises RecipeError for others."""
        if place.suffix.lower() == _gguf.SUFFIX:
            return [check_gguf(place)]
        found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not found:
            raise RecipeError(f"{printable(place)}: no *.safetensors in it: name the folder of the denoiser itself")
        config = found[0].with_name(CONFIG)
        for file in found:
            with open_safetensors(file, framework="np"):  # checked before the whole file is read for its digest
                pass
        return [*found, checked_file(config, most=MOST_JSON)] if config.exists() else found

    def holds_weights(self) -> bool:
        """Return True: the weights of both models are compared."""
        return True

    def run(self, state: State, ctx: Context) -> Outputs:
        """Import the files. Raises RecipeError that lists everything in them that cannot be imported exactly."""
        from intaglio.pipeline.model.layers import layer_table

        model, trajectory = state[MODEL].open(), state[TRAJECTORY]
        layers = layer_table(model.module)
        saved = read_weights(self.files(self._place), model.module, requantize=self.requantize)
        for remark in saved.remarks:
            ctx.log.warning("%s: %s", printable(self.path), remark)

        def take(layer: Layer) -> QuantizedLayerData:
            read = saved.weights.get(layer.name)
            if read is None:
                raise StaysFloat("the file has its weight in float")
            if layer.op != "linear":
                raise NotCarried(f"the weight of a {layer.op}: only those of linear layers can be imported")
            check_called(layer, trajectory)
            weight = read(layer)
            return layer_data(layer, weight.bits, weight.codes, weight.scale_NG, weight.entering, weight.balance)

        found = take_layers(layers, take)
        if others := sorted(saved.weights.keys() - {layer.name for layer in layers}):
            found.refused["no layer of the model that can be quantized: leave it in float"] = others
        problems = [*saved.problems, *problems_of(model.module, saved.rest, found, saved.weights)]
        return self._outputs(saved.origin, layers, found, problems, trajectory, ctx)


def read_weights(files: Sequence[Path], module: nn.Module, *, requantize: bool = False) -> SavedWeights:
    """Read the quantized weights of a module. Raises RecipeError for files that no supported library wrote.

    `requantize`: round weights of GGUF in Q8_0 again, to one scale for each output channel.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, object] = {}
    place = files[0] if len(files) == 1 else files[0].parent
    for file in files:
        if file.suffix.lower() == _gguf.SUFFIX:
            return _gguf.read_gguf(file, module, requantize)
        if file.name == CONFIG:
            config = read_json_object(file)
            continue
        with open_safetensors(file) as opened:
            metadata |= opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name in tensors:
                    raise RecipeError(f"{printable(file)}: {some([name])} is in another file of the folder too")
                tensors[name] = opened.get_tensor(name)
    try:
        return _read(tensors, metadata, config, module)
    except RecipeError as error:
        raise RecipeError(*(f"{printable(place)}: {problem}" for problem in error.problems)) from error


def _read(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], config: Mapping[str, object], module: nn.Module
) -> SavedWeights:
    """Read the weights as the library does that wrote the files. Raises RecipeError, which does not name the files."""
    written = config.get("quantization_config")
    method = written.get("quant_method") if isinstance(written, dict) else None
    if isinstance(written, dict) and method == _compressed_tensors.METHOD:
        return _compressed_tensors.read_compressed_tensors(tensors, written, module)
    if _comfy.is_comfy(tensors, metadata):
        return _comfy.read_comfy(tensors, metadata, module)
    if _torchao.NAMES in metadata:
        return _torchao.read_torchao(tensors, metadata)
    raise RecipeError(_refusal(tensors, method))


def _refusal(names: Collection[str], method: object) -> str:
    """Return the message for files that are not read: the library, if it is known, the reason, and what to do."""
    if any(name.endswith((".weight._data", ".weight._data._data")) for name in names):
        return (
            "quanto's files are not read: its 4-bit weights have zero points in float, which have no exact form here;"
            f" save the weights with {_compressed_tensors.METHOD} or torchao"
        )
    if {"qweight", "wscales"} <= {name.rpartition(".")[2] for name in names}:
        return (
            "nunchaku's SVDQuant files are not read: they round inputs to 4 bits with a scale for every 64 features of"
            " a token, which no format here does, and their AWQ layers have zero points; the step balance with `branch`"
            " splits the weights of the full-precision model in the same way"
        )
    return (
        f"{CONFIG} names {shown(method)} as quantization_config.quant_method, and there is no metadata of torchao or"
        f" ComfyUI: only files of {_compressed_tensors.METHOD}, torchao and ComfyUI are read, and *{_gguf.SUFFIX} files"
    )
