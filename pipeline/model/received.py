"""Call a model factory of the user, and make its model a plain module in float32 on the CPU."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.errors import RecipeError, did_you_mean
from intaglio.pipeline.files import MIB, checked_file, printable
from intaglio.pipeline.model.model_files import blamed
from intaglio.pipeline.model.prepared import ordinary_

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize

MOST_SOURCE = 16 * MIB
"""Largest size in bytes of a factory's file."""
MOST_SAMPLE = 1 << 25
"""Largest number of values in one sample: 128 MiB in float32, several times in a call."""


def call_factory(file: Path, name: str) -> DenoiserModel:
    """Return the model that the function `name` of a Python file makes. Its prints go to standard error.

    Raises RecipeError if the file has no such function, if the function raises, and if it returns no DenoiserModel.
    """
    from intaglio.pipeline.model.denoiser import DenoiserModel

    entry = f"{file.name}:{name}"
    checked_file(file, most=MOST_SOURCE)
    spec = importlib.util.spec_from_file_location(f"intaglio_model_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"model: {file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with blamed(entry), redirect_stdout(sys.stderr):
        _Uncompiled(spec.name, str(file)).exec_module(module)
        factory: Callable[[], DenoiserModel] | None = getattr(module, name, None)
        if factory is None:
            functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
            raise RecipeError(f"model: {file.name} has no function {name}{did_you_mean(name, functions)}")
        made = factory()
    if not isinstance(made, DenoiserModel):
        raise RecipeError(f"model: {entry} returned a {type(made).__name__}, not an intaglio DenoiserModel")
    return as_computed(made, entry)


def call_copied_factory(file: Path, name: str) -> DenoiserModel:
    """Return what `call_factory` returns, from a copy of the user's file. Raises RecipeError.

    If the function misses files beside the copy, the error says how to name them.
    """
    try:
        return call_factory(file, name)
    except RecipeError as error:
        if str(file.parent) not in str(error):
            raise
        raise RecipeError(
            *error.problems,
            f"model: a run reads a copy of {file.name}, beside which only {file.stem}.safetensors is copied: let"
            f" {file.name} name other files and folders by absolute paths",
        ) from error


def as_computed(made: DenoiserModel, entry: str) -> DenoiserModel:
    """Return the model as it is computed: without wrappers, adapters fused, in evaluation mode, float32, on the CPU.

    Raises RecipeError, which names `entry`, if that is not possible, and for inputs that are no tensors.
    """
    from intaglio.pipeline.model.own_layers import plain_layers_

    with blamed(entry):
        module = _merged(_unwrapped(made.module, entry), entry).eval()
        _check_kind(module, entry)
        if lost := [name for name, each in module.named_parameters() if each.is_meta]:
            raise RecipeError(
                f"model: {entry}: {len(lost)} parameters are on torch's meta device, such as {lost[0]}: they have no"
                " values: load the model without offloading"
            )
        ordinary_(module).to("cpu").float()
        plain_layers_(module)
    check_sample_shape(made.sample_shape, entry)
    return replace(
        made,
        module=module,
        sample_shape=tuple(made.sample_shape),
        conditions=_plain(made.conditions, entry),
        null=_plain(made.null, entry),
        shared=_plain(made.shared, entry),
        other=None if made.other is None else _plain_size(made.other, entry),
    )


def check_sample_shape(shape: object, origin: str) -> None:
    """Raise RecipeError if `shape` is no shape of a sample, or of a sample too large to compute with."""
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    elements = 1
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            sizes = []
            break
        elements *= min(size, MOST_SAMPLE + 1)
    if not sizes:
        given = printable(shape)[:100]
        raise RecipeError(f"model: {origin}: {given} is no shape of a sample: give positive whole numbers")
    if elements > MOST_SAMPLE:
        raise RecipeError(
            f"model: {origin}: a sample of the shape {printable(shape)[:100]} has more than {MOST_SAMPLE:,} numbers:"
            " give a smaller sample"
        )


def check_other_size(size: Sequence[int], usual: Sequence[int]) -> None:
    """Raise RecipeError if a recipe's second size is not the shape of a sample with as many axes as the usual one."""
    check_sample_shape(size, "other_size")
    if len(size) != len(usual):
        raise RecipeError(
            f"model.other_size: {list(size)} has {len(size)} axes, but a sample {list(usual)} has {len(usual)}"
        )


class _Uncompiled(SourceFileLoader):
    """Load a source file without writing a compiled file beside it: a folder of the store stays as it is."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Write nothing."""


def _check_kind(module: nn.Module, entry: str) -> None:
    """Raise RecipeError for modules whose layers or weights cannot be read: TorchScript, quantized, not built yet."""
    import torch
    from torch import nn

    for name, part in module.named_modules():
        where = f"model: {entry}: {name or 'the module'} is a {type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise RecipeError(f"{where} of TorchScript, whose layers cannot be changed: return the module before that")
        if type(part).__module__.startswith("torch.ao.nn.") and "quantized" in type(part).__module__:
            raise RecipeError(f"{where}, quantized by torch already: return the module before that")
        if any(map(nn.parameter.is_lazy, part.parameters(recurse=False))):
            raise RecipeError(f"{where} that has no weights yet: call the module once before it is returned")


def _unwrapped(module: Any, entry: str) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and similar wrappers, without their hooks.

    Raises RecipeError if there is no module inside.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import extract_model_from_parallel
    from torch import nn

    inner, outer = module, None
    while isinstance(inner, nn.Module) and inner is not outer:  # wrappers can be nested in any order
        outer, inner = inner, extract_model_from_parallel(inner, keep_fp32_wrapper=False, keep_torch_compile=False)
    if not isinstance(inner, nn.Module):
        raise RecipeError(
            f"model: {entry}: its DenoiserModel has a {type(module).__name__} as module, not a torch.nn.Module"
        )
    compiled: list[tuple[str, Any]] = [(n, each) for n, each in inner.named_modules() if hasattr(each, "_orig_mod")]
    for name, block in reversed(compiled):  # inner blocks first
        inner.set_submodule(name, block._orig_mod)
    for child in inner.modules():
        if getattr(child, "_compiled_call_impl", None) is not None:  # `module.compile()`
            child._compiled_call_impl = None
        if hasattr(child, "_hf_hook"):
            remove_hook_from_module(child)
    return inner


def _merged(module: nn.Module, entry: str) -> nn.Module:
    """Fuse the active adapters of peft into their layers, so that calls compute the same."""
    if "peft" not in sys.modules:  # no module can have adapters of peft
        return module
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, PeftModel):
        config = module.active_peft_config
        if getattr(config, "is_prompt_learning", False):
            raise RecipeError(f"model: {entry}: {config.peft_type} adds inputs, not weights, so it cannot be fused")
        module = module.get_base_model()
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    adapted = [name for name, each in module.named_modules() if isinstance(each, kinds)]
    outer = [name for name in adapted if not any(name.startswith(f"{other}.") for other in adapted)]
    if outer:
        module.float()  # fused in full precision
    for name in outer:
        module.set_submodule(name, _without_adapters(module.get_submodule(name)))
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if outer and name in vars(module):
            delattr(module, name)
    return module


def _without_adapters(adapted: Any) -> nn.Module:
    """Return the layer below the adapters of peft, with the adapters fused into it unless they are disabled."""
    fused = not adapted.disable_adapters
    if not fused and getattr(adapted, "merged", False):
        adapted.unmerge()
    if hasattr(adapted, "unload_and_optionally_merge_module"):
        plain: nn.Module = adapted.unload_and_optionally_merge_module(merge=fused, safe_merge=True, adapter_names=None)
        return plain
    if fused:
        adapted.merge(safe_merge=True)
    base: nn.Module = adapted.get_base_layer()
    return base


def _plain(tensors: Mapping[str, Any], entry: str) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, floating point as float32. Raises RecipeError for other values and for NaN."""
    import torch

    made = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise RecipeError(f"model: {entry}: {name} is a {type(tensor).__name__}, no tensor: give it in constants")
        kept = tensor.detach().cpu()
        if kept.isnan().any():
            raise RecipeError(f"model: {entry}: {name} has NaN")
        made[name] = kept.float() if kept.is_floating_point() else kept
    return made


def _plain_size(other: SecondSize, entry: str) -> SecondSize:
    check_sample_shape(other.sample_shape, entry)
    return replace(
        other,
        sample_shape=tuple(other.sample_shape),
        conditions=_plain(other.conditions, entry),
        shared=_plain(other.shared, entry),
    )


def configured_shape(config: Any) -> tuple[int, ...]:  # a diffusers FrozenDict
    """Return the sample shape in a configuration; `check_sample_shape` checks it. Raises MissingInputs without one."""
    from intaglio.pipeline.model.inputs import MissingInputs

    size = config.get("sample_size")
    if size is None:
        raise MissingInputs(
            "model: its configuration has no sample_size: name a file of intaglio.record in `conditions`"
        )
    return (config.get("in_channels"), *(size if isinstance(size, list | tuple) else (size, size)))


def class_count(module: Any) -> int | None:  # a model of diffusers
    """Return the number of classes, the null class not counted.

    The configuration of a DiT leaves the null class out; that of a UNet counts it.
    """
    config = module.config
    if "class_labels" not in inspect.signature(module.forward).parameters:
        return None
    if config.get("num_embeds_ada_norm") is not None:
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]) - 1
    return None
