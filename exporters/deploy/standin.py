"""Define modules that replace a compiled model: they can be read, but not changed.

A runtime computes what was compiled. A later change of the model (a LoRA, an attention processor, a weight) would have
no effect, so the attributes and tables of the modules refuse every change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn, Self

import torch
from torch import nn

from intaglio.pipeline.errors import CallError

ADVICE = "a compiled model cannot be changed: change the original, and compile it again"
ADAPTER_ADVICE = "name LoRAs in the recipe, model.loras; put any other adapter into the original, and compile it again"
PICKLE_ADVICE = "call intaglio.load with its folder in each process"
HARMLESS = (
    "compile",
    "compile_repeated_blocks",
    "disable_forward_chunking",
    "disable_gradient_checkpointing",
    "disable_slicing",
    "disable_tiling",
    "disable_xformers_memory_efficient_attention",
    "enable_forward_chunking",
    "enable_gradient_checkpointing",
    "enable_slicing",
    "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "reset_attention_backend",
    "set_attention_backend",
    "set_attention_slice",
    "set_chunk_feed_forward",
    "set_use_memory_efficient_attention_xformers",
)
"""Methods that change how a model computes, but not its result: they do nothing here."""
READ = frozenset(
    (
        "device",
        "dim",
        "dtype",
        "element_size",
        "is_complex",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_leaf",
        "is_meta",
        "layout",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "requires_grad",
        "shape",
        "size",
    )
)
"""Attributes and methods that a tensor without values still has."""


class Standin(nn.Module):
    """Module that replaces `original`: it shows the attributes of `original`, which it freezes.

    Without an original it has only its own attributes.

    `name` is the prefix of messages, "" for the denoiser.
    """

    def __init__(
        self, original: nn.Module | None, name: str = "", compiled: str = "this folder has only the whole denoiser"
    ) -> None:
        super().__init__()
        own = self.__dict__
        own["_parameters"], own["_buffers"] = _Fixed({}, name), _Fixed({}, name)
        own["_original"], own["_name"], own["_compiled"], own["training"] = original, name, compiled, False
        if original is not None:
            freeze(original, name, compiled)
            own["_tables_as_made"] = [(place, table, table._version) for place, table in _tables(original, name)]
            own["_modules"] = original._modules

    def check_unchanged(self) -> None:
        """Raise CallError if a table that can be read, such as that of positions, was changed in place."""
        for place, table, version in self.__dict__.get("_tables_as_made", ()):
            if table._version != version:
                raise CallError(f"{place} was changed after loading, without effect on the compiled model: {ADVICE}")

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None:
            return super().__getattr__(name)
        found = getattr(original, name)
        if name == "attn_processors":  # a caller that reads them is about to change them
            raise CallError(f"{self._called(name)}: attention of a compiled model cannot be changed: {ADVICE}")
        return self._refused(name, ADAPTER_ADVICE) if _is_of_loaders(type(original), name) else found

    def __setattr__(self, name: str, value: object) -> None:
        if name == "training" and value is False:  # already the case
            return
        raise CallError(f"{self._called(name)} cannot be set on a compiled model: {ADVICE}")

    def __delattr__(self, name: str) -> None:
        raise CallError(f"{self._called(name)} cannot be deleted from a compiled model: {ADVICE}")

    @property
    def dtype(self) -> torch.dtype:
        """Element type of inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of outputs."""
        raise NotImplementedError

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield one parameter without elements: callers read the device and the type of a model from its first."""
        yield _shown(torch.empty(0, dtype=self.dtype, device=self.device), self._called("parameters"))  # type: ignore[misc]  # it is a parameter

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield nothing: the weights are not here."""
        return iter(())

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield nothing: the buffers are not here."""
        return iter(())

    def train(self, mode: bool = True) -> Self:
        """Return itself, in evaluation mode. Raises CallError for training mode."""
        if mode:
            raise CallError(f"{self._called('train')}: a compiled model cannot be trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return itself, without gradients. Raises CallError if gradients are requested."""
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return itself unchanged. Raises CallError for another device or element type."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        called = self._called("to")
        if dtype not in (None, self.dtype):
            raise CallError(
                f"{called}: it computes in the formats that it was compiled with; its inputs and outputs are"
                f" {self.dtype}: do not convert it to {dtype}"
            )
        here = self.device
        if device is not None and (device.type != here.type or device.index not in (None, here.index, 0)):
            raise CallError(f"{called}: it runs on {here}, not on {device}: choose the backend when you load it")
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        raise CallError(f"{self._name or 'the denoiser'} cannot be converted or moved: {ADVICE}")

    def float(self) -> Self:
        """Return itself, which takes and returns float32."""
        return self.to(torch.float32)

    def cpu(self) -> Self:
        """Return itself if it runs on the CPU. Raises CallError if not."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Return itself if it runs on that GPU. Raises CallError if not."""
        return self.to("cuda" if device is None else torch.device(device))

    def state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raise CallError: the weights are in the compiled folder."""
        raise CallError(f"{self._called('state_dict')}: its weights are in the compiled folder alone")

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raise CallError: a compiled model takes no weights."""
        raise CallError(f"{self._called('load_state_dict')}: no weights can be put into a compiled model: {ADVICE}")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raise CallError: the compiled folder can be copied instead."""
        raise CallError(f"{self._called('save_pretrained')}: its weights are in the compiled folder alone: copy that")

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Raise CallError, as `save_pretrained` does."""
        self.save_pretrained()

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: a runtime has compiled the model."""

    def __deepcopy__(self, memo: object) -> Self:
        """Return itself, as it cannot be changed."""
        return self

    def __copy__(self) -> Self:
        """Return itself, as it cannot be changed."""
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise CallError: a session of a runtime belongs to its process."""
        raise CallError(f"{self._called('pickle')}: a compiled model is not pickled: {PICKLE_ADVICE}")

    def cache_context(self, name: str, **_: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context without effect: no cache can be enabled, but pipelines open one around every call."""
        return contextlib.nullcontext()

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Do nothing: there is no cache, but pipelines reset it after every run."""

    def _called(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name

    def _refused(self, name: str, advice: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise CallError(f"{self._called(name)} would have no effect on a compiled model: {advice}")

        return refuse


def freeze(root: nn.Module, name: str, compiled: str) -> None:
    """Make a model and all modules in it refuse every change and every call, with CallError; they can be read.

    `compiled` is a text for the message that says which methods can be called.
    """
    for path, module in list(root.named_modules()):
        place = f"{name}.{path}".strip(".")
        tables = module.__dict__
        for key in ("_parameters", "_buffers"):
            kept = module._non_persistent_buffers_set if key == "_buffers" else ()  # made from the config
            tables[key] = {
                n: v if v is None or n in kept else _shown(v, f"{place}.{n}") for n, v in tables[key].items()
            }
        for key, value in list(tables.items()):
            if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
                tables[key] = _Fixed(value, place)
        tables["_place"], tables["_compiled"] = place, compiled
        kind: Any = type(module)
        object.__setattr__(module, "__class__", _frozen(kind))


def _tables(root: nn.Module, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the place and the values of every buffer that a frozen model keeps."""
    for path, module in root.named_modules():
        for key in module._non_persistent_buffers_set:
            if (table := module._buffers.get(key)) is not None and not table.is_inference():
                yield f"{name}.{path}.{key}".strip("."), table


class _Fixed(dict[Any, Any]):
    """Table of a frozen module, which refuses changes."""

    def __init__(self, content: dict[Any, Any], place: str) -> None:
        super().__init__(content)
        self.place = place or "the denoiser"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise CallError(f"{self.place} cannot be changed in a compiled model: {ADVICE}")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = move_to_end = _refuse


class _Shown(nn.Parameter):
    """Tensor without values that has a type and a shape."""

    place: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in READ:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        place = next((arg.place for arg in args if isinstance(arg, cls)), "a weight")
        raise CallError(f"{place} can neither be read nor changed ({name}): a compiled model does not keep its weights")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # an argument that nobody gives
        return f"<{self.place}: {tuple(self.shape)}, not kept>"


def _shown(tensor: torch.Tensor, place: str) -> torch.Tensor:
    shown: Any = torch.Tensor._make_subclass(_Shown, tensor.detach(), False)
    shown.__dict__["place"] = place
    found: torch.Tensor = shown
    return found


@cache
def _frozen(kind: Any) -> Any:
    """Return the frozen version of a module's class."""

    def set_attribute(self: Any, name: str, value: object) -> NoReturn:
        raise CallError(f"{self._place}.{name}".lstrip(".") + f" cannot be set in a compiled model: {ADVICE}")

    def delete_attribute(self: Any, name: str) -> NoReturn:
        raise CallError(f"{self._place}.{name}".lstrip(".") + f" cannot be deleted in a compiled model: {ADVICE}")

    def forward(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise CallError(f"{self._place} was not compiled: {self._compiled}; its weights are not in the folder")

    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise CallError(f"{self._place} has no weights to convert, save or load: {ADVICE}")

    def train(self: Any, mode: bool = True) -> Any:
        return self if not mode else refuse(self)

    def harmless(self: Any, *_: Any, **__: Any) -> None:
        """Do nothing: a runtime computes in its own way."""

    def reduce(self: Any, protocol: object) -> NoReturn:
        raise CallError(f"{self._place}: a part of a compiled model is not pickled or copied: {PICKLE_ADVICE}")

    changed: dict[str, Any] = {
        "__reduce_ex__": reduce,
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "__module__": kind.__module__,
        "forward": forward,
        "train": train,
    }
    changed |= dict.fromkeys(("_apply", "to", "state_dict", "load_state_dict", "save_pretrained"), refuse)
    changed |= {name: harmless for name in HARMLESS if hasattr(kind, name)}
    return type(kind)(kind.__name__, (kind,), changed)


def _is_of_loaders(kind: type, name: str) -> bool:
    """Return True if a method belongs to the adapter loaders of diffusers or transformers."""
    owner = next((base for base in kind.__mro__[1:] if name in vars(base)), None)
    return owner is not None and (".loaders" in owner.__module__ or owner.__module__.endswith("peft"))
