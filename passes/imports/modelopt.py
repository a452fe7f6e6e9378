"""Take over a denoiser that NVIDIA's Model Optimizer quantized: its integers and scales, exactly or not at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from intaglio.passes.imports.imported import (
    ImportPass,
    problems_of,
    shown,
    some,
    take_layers,
)
from intaglio.passes.imports.quantizers import FACTORS, taker
from intaglio.passes.imports.saved_quantizers import SavedQuantizers, grouped
from intaglio.passes.imports.torch_file import check_end, load_torch_file
from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.layer import Layer

NOT_A_MODEL = (
    "holds no quantized model: write it with modelopt.torch.opt.save(denoiser, path), after"
    " modelopt.torch.quantization.quantize"
)


class ImportModelopt(ImportPass):
    """Import the plan and the integers from a file that `modelopt.torch.opt.save(denoiser, path)` wrote.

    Codes are exactly those of the file: integers, FP8 or NVFP4, in float weights with their quantizers or packed by
    `mtq.compress`. Scales differ by one rounding of float32 at most. An input with one scale has this scale at every
    timestep. The factors of SVDQuant are rounded to float16. The file is read without running anything from it. A layer
    that cannot be imported exactly is an error that names it. So is a weight outside the quantized layers that differs
    from the recipe's model, because the float graph is made from that model.
    """

    name: ClassVar[str] = "import-modelopt"
    version: ClassVar[int] = 3

    path: str = Field(description="a file of modelopt.torch.opt.save, beside the recipe")
    ignore: tuple[str, ...] = Field(
        (), description="quantizers to ignore, such as `*.norm*.input_quantizer`: these values stay in float"
    )

    @classmethod
    def files(cls, place: Path) -> list[Path]:
        """Return the one file that is read. Raises RecipeError if torch.save did not write it."""
        return [check_end(place)]

    def holds_weights(self) -> bool:
        """Return True: the weights of both models are compared."""
        return True

    def run(self, state: State, ctx: Context) -> Outputs:
        """Import the file. Raises RecipeError that lists everything in it that cannot be imported exactly."""
        from intaglio.pipeline.model.layers import layer_table

        model, trajectory, saved = state[MODEL].open(), state[TRAJECTORY], read_modelopt(self._place)
        layers = layer_table(model.module)
        on = {name: q for name, q in saved.quantizers.items() if q.on and not self._ignores(name)}
        take = taker(saved, on, layers, model, trajectory)
        found = take_layers(layers, take)
        quantized = [layer.name for layer in layers if f"{layer.name}.weight_quantizer" in on]
        problems = [*self._left_over(saved, layers), *problems_of(model.module, saved.tensors, found, quantized)]
        return self._outputs(f"Model Optimizer {saved.version}", layers, found, problems, trajectory, ctx)

    def _ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def _left_over(self, saved: SavedQuantizers, layers: Iterable[Layer]) -> Iterator[str]:
        """Yield a problem for each quantizer in the file that no layer uses."""
        on = [name for name, q in saved.quantizers.items() if q.on]
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for name in on):
                yield f"ignore: {pattern!r} fits none of its {len(on)} enabled quantizers"
        own = {f"{layer.name}.{part}_quantizer" for layer in layers for part in ("weight", "input")}
        if others := [name for name in on if name not in own and not self._ignores(name)]:
            yield (
                f"{some(others)}: neither weight nor input of a linear layer or an ungrouped convolution, which is"
                " all that is rounded here: switch them off in Model Optimizer, or name them in `ignore`"
            )
        of_weights = {"_amax", "_scale", "_double_scale", *FACTORS}
        held = {n: {"_amax", "_pre_quant_scale"} if n.endswith(".input_quantizer") else of_weights for n in own}
        unknown = defaultdict(list)
        for name, q in saved.quantizers.items():
            if parts := sorted(q.tensors.keys() - held.get(name, {"_amax"})):
                unknown[f"{some(parts)}: intaglio does not use it"].append(name)
            if q.facts.get("_rotate", False) not in (False, None):
                unknown["its rotation is not carried over"].append(name)
        yield from (f"{some(names)}: {what}" for what, names in unknown.items())


def read_modelopt(file: Path) -> SavedQuantizers:
    """Read a file of `modelopt.torch.opt.save`. Raises RecipeError for all other files; nothing in it is run."""
    where = printable(file)
    saved = load_torch_file(file)
    try:
        state: Any = saved["modelopt_state"]  # type: ignore[index]
        modes = [mode["metadata"] for _, mode in state["modelopt_state_dict"]]
        facts: Any = [mode["quantizer_state"] for mode in modes if "quantizer_state" in mode][-1]
        packed: Any = [mode["real_quantizer_state"] for mode in modes if "real_quantizer_state" in mode]
        facts = {**facts, **{f"{name}.weight_quantizer": each for name, each in (packed or [{}])[-1].items()}}
        tensors: Any = saved["model_state_dict"]  # type: ignore[index]
        version = shown(state["modelopt_version"]).strip("'")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{where}: {NOT_A_MODEL}") from error
    if not isinstance(tensors, dict):
        raise RecipeError(f"{where}: {NOT_A_MODEL}")
    if not all(isinstance(name, str) for name in (*facts, *tensors)):
        raise RecipeError(f"{where}: a name in it is no text")
    if others := [name for name, each in facts.items() if not isinstance(each, dict)]:
        raise RecipeError(f"{where}: {some(others)}: no attributes of a quantizer")
    if others := [name for name, value in tensors.items() if not _is_plain(value)]:
        raise RecipeError(f"{where}: {some(others)}: not a dense tensor whose values are all in the file")
    return grouped(tensors, facts, version)


def _is_plain(value: object) -> bool:
    """Return True for a dense tensor whose values are all in the file, each once."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
