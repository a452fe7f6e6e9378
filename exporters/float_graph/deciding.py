"""Find the inputs whose values decide what a module computes, and compute with fixed values while torch exports.

A model may read how many tokens a mask keeps, and build tensors of that size. A graph cannot: there, sizes follow from
the sizes of the inputs alone. If the mask is the same in all calls, it can be a constant of the graph.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from intaglio.pipeline.model.types import Inputs

aten = torch.ops.aten
READS = frozenset(
    ["__bool__", "__float__", "__index__", "__int__", "allclose", "equal", "is_nonzero", "item", "numpy", "tolist"]
)
"""Functions that turn a tensor's values into values of Python."""
NEW = (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
"""Functions that make tensors of values that depend on no tensor."""
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)
_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)


def deciding_inputs(compute: Callable[[Inputs], object], inputs: Inputs) -> dict[str, str]:
    """Return the inputs whose values `compute` reads to choose sizes or branches, in order, with the first such place.

    A place is a file's name, a line and a function. `compute` is called once. A value that is computed from an input
    counts as that input.
    """
    fresh = {name: value.clone() for name, value in inputs.items()}
    with torch.no_grad(), _Origins(fresh) as mode:
        compute(fresh)
    return {name: mode.found[name] for name in inputs if name in mode.found}


class _Origins(TorchFunctionMode):
    """Follow the inputs of a call through its tensors; `found` has those whose values are read, and the first place."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.origins: MutableMapping[torch.Tensor, frozenset[str]] = WeakTensorKeyDictionary()
        self.found: dict[str, str] = {}
        for name, value in inputs.items():
            self.origins[value] = frozenset((name,))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        with _ValuesRead() as seen:
            made = func(*args, **kwargs)
        if getattr(func, "__name__", "") in READS:
            self._note(given)
        elif seen.read:
            self._note([value for value in given if any(value is each for each in seen.read)] or given)
        if not (names := self._names(given)):
            return made
        changed = given[:1] if _changes_first(func) else []
        bases = [value._base for value in changed if value._base is not None]
        for value in (*_tensors(made), *changed, *bases):
            self.origins[value] = names | self.origins.get(value, frozenset())
        return made

    def _note(self, values: Iterable[torch.Tensor]) -> None:
        """Note that the model's code reads these values here."""
        for name in self._names(values) - self.found.keys():
            self.found[name] = _caller()

    def _names(self, values: Iterable[torch.Tensor]) -> frozenset[str]:
        return frozenset[str]().union(*(self.origins.get(value, frozenset()) for value in values))


class _ValuesRead(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """See which tensors an operator reads whose output's size depends on values, or whose output is no tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.read: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten.index.Tensor:  # has the tag of a size that depends on values, but only masks make it so
            self.read += [each for each in args[1] if each is not None and each.dtype in _MASKS]
        elif func is aten.masked_select.default:
            self.read.append(args[1])
        elif any(tag in func.tags for tag in _BY_VALUES):
            self.read += _tensors((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Fixed(TorchFunctionMode):
    """Compute at once what depends on constants alone, while torch traces the rest, so that its values can be read.

    `known` are the values of tensors: of constants and what is computed from them, and of new tensors such as zeros.
    With `zero`, a scalar of the row that torch extends to all rows, new tensors become tensors of that row: the model
    may then write what it computes into them.
    """

    def __init__(self, constants: Iterable[torch.Tensor], zero: torch.Tensor | None = None) -> None:
        super().__init__()
        self.zero = zero
        self.known: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
        for value in constants:
            self.known[value] = value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        symbolic = any(isinstance(leaf, torch.SymInt | torch.SymFloat) for leaf in tree_leaves((args, kwargs)))
        changed = given[:1] if _changes_first(func) else []
        if not symbolic and given and all(value in self.known for value in given):
            made = self._at_once(func, args, kwargs)
            if not any(self.known[value] is not value for value in changed):
                return made
            return func(*args, **kwargs)  # a new tensor, which is traced too
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], self._places(args[1]), *args[2:])
        if func is torch.Tensor.__setitem__ and self._written(*args):
            return None
        if func in _REPEATS and (repeated := self._repeated(*args, **kwargs)) is not None:
            return repeated
        made = func(*args, **kwargs)
        if func in NEW and not given and not symbolic:
            with _disable_current_modes():
                value = func(*args, **kwargs)
            made = self._of_row(made)
            self.known[made] = value
        for value in changed:
            self.known.pop(value, None)
        return made

    def _at_once(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function with the values of known tensors while nothing is traced, and know what it returns."""
        values = tree_map_only(torch.Tensor, lambda value: self.known[value], (args, kwargs))
        with _disable_current_modes():
            made = func(*values[0], **values[1])

        def noted(value: torch.Tensor) -> torch.Tensor:
            one = self._of_row(value)
            self.known[one] = value
            return one

        return tree_map_only(torch.Tensor, noted, made)

    def _written(self, x: torch.Tensor, index: object, value: object) -> bool:
        """Write one value into all places of a mask that is not known. Return False for any other index or value."""
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool or index in self.known or not index.dim():
            return False
        if isinstance(value, torch.Tensor) and value.dim() > x.dim() - index.dim():
            return False
        chosen = value.to(x.dtype) if isinstance(value, torch.Tensor) else torch.full_like(x, value)  # type: ignore[arg-type]  # a number
        x.copy_(torch.where(index.reshape(*index.shape, *[1] * (x.dim() - index.dim())), chosen, x))
        self.known.pop(x, None)
        return True

    def _of_row(self, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor as one of the row: with the row's zero added to it."""
        if self.zero is None:
            return value
        return value | (self.zero != 0) if value.dtype == torch.bool else value + self.zero.to(value.dtype)

    def _repeated(
        self, x: torch.Tensor, repeats: object = None, dim: int | None = None, **_: object
    ) -> torch.Tensor | None:
        """Return what `repeat_interleave` returns for known repeats; None if they are not known for each place."""
        if dim is None or not isinstance(repeats, torch.Tensor) or repeats not in self.known:
            return None
        if repeats.dim() != 1 or repeats.shape[0] != x.shape[dim]:
            return None
        return x.index_select(dim, self._at_once(torch.repeat_interleave, (repeats,), {}))

    def _places(self, index: object) -> object:
        """Return an index with the places that known masks keep instead of the masks."""
        found: list[object] = []
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, torch.Tensor) and each in self.known and each.dtype in _MASKS and each.dim():
                found += self._at_once(torch.nonzero, (each,), {"as_tuple": True})
            else:
                found.append(each)
        return tuple(found) if isinstance(index, tuple) or len(found) > 1 else found[0]


def _caller() -> str:
    """Return the file, line and function of the innermost code outside torch and this module."""
    frames = (
        frame
        for frame in reversed(traceback.extract_stack())
        if frame.filename != __file__ and "torch" not in Path(frame.filename).parts
    )
    frame = next(frames)
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def _changes_first(func: Any) -> bool:
    """Return True for a function that changes its first tensor, such as `add_`."""
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__iadd__", "__imul__", "__iand__", "__ior__") or name.rstrip("_") + "_" == name


def _tensors(values: object) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested values, the ends of slices too."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, slice):
            yield from _tensors((leaf.start, leaf.stop, leaf.step))
