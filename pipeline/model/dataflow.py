"""Follow the tensors of one call: which layers the output depends on, and whose weights other code reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import nn

NEVER_CALLED = "it is never called"
NO_EFFECT = "its result does not reach the output"
WEIGHT_READ = "the model also uses its weight outside the layer"


class Uses(NamedTuple):
    """Names of layers in one call: those that the output depends on, and those whose weight other code reads."""

    needed: frozenset[str]
    read: frozenset[str]


class _Operation(NamedTuple):
    """Storages that one operation reads and writes.

    An operation that writes no storage returns a plain value, which the model's code may use for a decision.
    """

    reads: frozenset[int]
    writes: frozenset[int]


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's has no types


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """Record every operation, and every read of a weight outside the module that holds it."""

    supports_higher_order_operators = True  # such as flex_attention, which is one operation here

    def __init__(self, holders: Mapping[int, frozenset[nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.operations: list[_Operation] = []
        self.read: set[int] = set()
        self.running: list[nn.Module] = []
        self._holders = holders
        self._kept: dict[int, StorageWeakRef] = {}  # while a storage is kept here, its number is not reused

    def numbers(self, values: Any) -> frozenset[int]:
        """Return the numbers of the storages behind all tensors in `values`."""
        found = set()
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                reference = _storage(tensor)
                self._kept.setdefault(reference.cdata, reference)
                found.add(reference.cdata)
        return frozenset(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads, writes = self.numbers((args, kwargs)), self.numbers(result)
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            writes |= reads
        self.operations.append(_Operation(reads, writes))
        inside = self.running[-1] if self.running else None
        self.read |= {n for n in reads if n in self._holders and inside not in self._holders[n]}
        return result


def follow(module: nn.Module, layers: Iterable[str], call: Callable[[], torch.Tensor]) -> Uses:
    """Follow the tensors of one `call` of the module.

    If it is uncertain whether the output depends on a layer, the layer counts as needed: when memory is written again,
    or when the model's Python code reads a value.
    """
    named = {name: module.get_submodule(name) for name in layers}
    holders: dict[int, frozenset[nn.Module]] = {}
    own = [part for part in module.modules() if part._parameters]
    for part in own:
        for parameter in part.parameters(recurse=False):
            number = _storage(parameter).cdata
            holders[number] = holders.get(number, frozenset()) | {part}
    tracer = _Tracer(holders)
    outputs: dict[str, frozenset[int]] = {}

    def begin(part: nn.Module, _: object) -> None:
        tracer.running.append(part)

    def end(part: nn.Module, _: object, output: object) -> None:
        tracer.running.pop()
        for name in names.get(part, ()):
            outputs[name] = outputs.get(name, frozenset()) | tracer.numbers(output)

    names: dict[nn.Module, list[str]] = {}
    for name, layer in named.items():
        names.setdefault(layer, []).append(name)
    with contextlib.ExitStack() as hooks:
        for part in own:
            hooks.enter_context(part.register_forward_pre_hook(begin))
            hooks.enter_context(part.register_forward_hook(end))
        with torch.no_grad(), tracer:
            live = set(tracer.numbers(call()))
    for operation in reversed(tracer.operations):
        if not operation.writes or operation.writes & live:
            live |= operation.reads
    weights = {name: _storage(layer.get_parameter("weight")).cdata for name, layer in named.items()}
    return Uses(
        frozenset(name for name, numbers in outputs.items() if numbers & live),
        frozenset(name for name, number in weights.items() if number in tracer.read),
    )
