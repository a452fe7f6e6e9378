"""Bring a module of the user into the form that the compiler works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

    Module = TypeVar("Module", bound=nn.Module)


def prepare_(module: nn.Module, loras: Iterable[tuple[Path, float]], *, weights: bool = True) -> None:
    """Bring a model into the form that the compiler works on, with its LoRAs fused, each a file and its scale.

    Without `weights`, the module is moved to torch's meta device and no LoRA is read. Changes `module`. Raises
    RecipeError and StepFailed as `fuse_lora_` does.
    """
    from intaglio.pipeline.model.experts import dense_experts_
    from intaglio.pipeline.model.lora import fuse_lora_

    plain_weights_(module)
    dense_experts_(module)
    if not weights:
        module.to("meta")
    for position, (path, scale) in enumerate(loras if weights else ()):
        fuse_lora_(module, path, scale, f"model.loras[{position}]")
    split_(module)


def plain_weights_(module: Module) -> Module:
    """Replace every computed weight by the value that it has now, as an ordinary parameter. Changes `module`.

    Weights are computed by parametrizations (weight_norm, spectral_norm, orthogonal, one's own), by the hooks of
    torch.nn.utils.weight_norm and spectral_norm, and by the masks of torch.nn.utils.prune. The module has to be in
    evaluation mode: in training mode spectral norms change each time the weight is read.
    """
    import torch
    from torch import nn
    from torch.nn.utils import parametrize, prune
    from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
    from torch.nn.utils.weight_norm import WeightNorm

    with torch.no_grad():
        for part in list(module.modules()):
            if parametrize.is_parametrized(part):
                for name in list(part.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                    parametrize.remove_parametrizations(part, name, leave_parametrized=True)
                    if not isinstance(weight := getattr(part, name), nn.Parameter):  # the case with several originals
                        delattr(part, name)
                        part.register_parameter(name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, WeightNorm):
                    hook.remove(part)
                    del part._forward_pre_hooks[key]
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(part, hook.name)
                elif isinstance(hook, prune.BasePruningMethod):
                    prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]  # torch's has no types
    return module


def ordinary_(module: Module) -> Module:
    """Make every weight and bias of a layer an ordinary parameter, to be computed in float32. Changes `module`.

    They may be buffers or plain attributes. Tensors made in torch's inference mode are copied out of it. An attribute
    that is a shorter floating-point type, to which the module casts its inputs, becomes float32.
    """
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    for part in module.modules():
        types = {name: held for name, held in vars(part).items() if isinstance(held, torch.dtype)}
        short = [name for name, held in types.items() if held.is_floating_point and held.itemsize < 4]
        vars(part).update(dict.fromkeys(short, torch.float32))
        tensors: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in tensors:
            for name, tensor in held.items():
                if tensor is not None and tensor.is_inference():
                    copied = tensor.clone()
                    held[name] = nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
        for name in ("weight", "bias") if isinstance(part, nn.Linear | _ConvNd) else ():
            tensor = part._buffers.get(name, vars(part).get(name))
            if isinstance(tensor, torch.Tensor):
                delattr(part, name)
                part.register_parameter(name, nn.Parameter(tensor.detach(), tensor.is_floating_point()))
    return module


def split_(module: nn.Module) -> None:
    """Give modules of torch that compute more than one step a layer to quantize for each product. Changes `module`."""
    from intaglio.pipeline.model.attention import split_attention_
    from intaglio.pipeline.model.padding import split_padding_

    split_attention_(module)
    split_padding_(module)


def own_forward(layer: nn.Module) -> bool:
    """Return True if a Linear or a convolution overrides torch's `forward`, in its class or in itself."""
    from torch import nn

    if "forward" in vars(layer):
        return True
    match layer:
        case nn.Linear():
            return type(layer).forward is not nn.Linear.forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, kind):
            theirs = (type(layer).forward, type(layer)._conv_forward)
            return theirs != (kind.forward, kind._conv_forward)
    return False


def unquantizable(module: nn.Module) -> dict[str, str]:
    """Return, by name of the layer, the reason why a layer with weights cannot be quantized."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    from intaglio.pipeline.model.attention import SplitAttention

    found = {}
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        match layer:
            case nn.Linear() | nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if own_forward(layer):
                found[name] = f"a {kind} has a forward of its own"
            case nn.Linear() | _ConvNd() if layer.weight.numel() == 0:
                found[name] = f"a {kind} without weights"
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                if layer.padding_mode != "zeros":
                    found[name] = f"a {kind} with padding_mode {layer.padding_mode}"
            case _ConvNd():
                found[name] = f"a transposed convolution ({kind})"
            case nn.MultiheadAttention() if not isinstance(layer, SplitAttention):
                found[name] = f"a {kind} computes its projections by itself"
            case nn.Bilinear() | nn.RNNBase() | nn.RNNCellBase():
                found[name] = f"a {kind}"
    return found
