"""Leave tensors in their files until an operation reads them, and write files of tensors one tensor at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map_only

from intaglio.pipeline.files import MIB, open_safetensors

_TYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of types in safetensors' files, in the order of safetensors' own enumeration."""


class StoredTensor(torch.Tensor):
    """A tensor on the CPU whose values are read by a function each time that an operation needs them.

    It has a shape and a type, and no memory. An operation reads the values, computes with them, and drops them; its
    result is an ordinary tensor, also that of `detach`. So a module whose parameters are stored tensors is called, and
    exported, with one weight in memory at a time. The values cannot be changed in place.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it
    _read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> Self:
        """Make the tensor; `read` returns its values, always the same, in a tensor of this shape and type."""
        made: Self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device="cpu")  # type: ignore[arg-type]  # torch
        made._read = read
        return made

    def as_parameter(self) -> torch.nn.Parameter:
        """Return the tensor as a parameter that is not trained; torch's own constructor would read the values."""
        self._is_param = True
        parameter: torch.nn.Parameter = self  # type: ignore[assignment]  # `isinstance` is true now
        return parameter

    def read(self) -> torch.Tensor:
        """Return the values as an ordinary tensor. Raises what the function raises that reads them."""
        return self._read()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array."""
        return self.read().numpy(force=force)

    def tolist(self) -> Any:
        """Return the values as Python's numbers, in lists."""
        return self.read().tolist()

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own has a private argument
        """Describe the tensor without its values."""
        return f"StoredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: object) -> Self:
        """Return the tensor itself: its values do not change."""
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's default has no types
        """Compute with the values. Raises TypeError for an operation that would change them."""
        for place, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
            if written and isinstance(given, StoredTensor):
                raise TypeError(f"{func}: a tensor that stays in its file cannot be changed")
        args, kwargs = tree_map_only(StoredTensor, StoredTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)


def read_tensor(path: Path, name: str, *, inside: Path | None = None) -> torch.Tensor:
    """Return one tensor of a safetensors file in memory of its own: the file is not mapped afterwards.

    Raises RecipeError as `open_safetensors` does.
    """
    with open_safetensors(path, inside=inside) as file:
        tensor: torch.Tensor = file.get_tensor(name).clone()
    return tensor


def save_tensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the safetensors file that `save_file` writes of all these tensors, and hold one of them at a time."""
    with tempfile.TemporaryFile(dir=path.parent) as spool, path.open("wb") as out:
        written = []
        for name, tensor in tensors:
            begin, (dtype, shape) = spool.tell(), (tensor.dtype, list(tensor.shape))
            spool.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written.append((list(_TYPES).index(dtype), name, shape, begin, spool.tell() - begin))
        written.sort(key=lambda each: (-each[0], each[1]))
        header, end = {}, 0
        for kind, name, shape, _, size in written:
            header[name] = {"dtype": list(_TYPES.values())[kind], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for *_, begin, size in written:
            spool.seek(begin)
            while size:
                part = spool.read(min(size, MIB))
                out.write(part)
                size -= len(part)
