"""Check the inputs of a compiled graph, and convert them to the form that the graph takes.

Shapes: R rows of one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph, TensorSpec, fixed_tensor
from intaglio.pipeline.errors import CallError, IntaglioError
from intaglio.pipeline.model.arguments import flatten, plain_name
from intaglio.pipeline.model.call_form import CallForm, alike, of_rows

if TYPE_CHECKING:
    import onnx

KEEPS_INDICES = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators whose output has only values of their first input."""
KEEPS_TABLE = frozenset({"Cast", "DequantizeLinear", "Identity"})
"""Operators whose output has the shape of their first input."""


class CallInputs:
    """Inputs of one graph.

    Raises CallError, which names the tensor, for inputs on which the graph would not compute what torch does.
    """

    def __init__(self, graph: Graph, compiled_with: Mapping[str, object], name: str = "") -> None:
        """Prepare the checks of a graph's inputs.

        `compiled_with`: arguments that are no inputs of the graph. `name`: prefix of messages, for a component.

        Raises RecipeError if model.onnx cannot be read, or graph.json is damaged.
        """
        from intaglio.exporters.float_graph.onnx_file import read_proto

        self._graph, self._compiled_with, self._name = graph, compiled_with, name
        self._names = [input_name for input_name in graph.inputs if input_name != STEP_INPUT]
        constants = {name: fixed_tensor(constant) for name, constant in graph.interface.constants.items()}
        self._fixed = {name: tensor for name, tensor in constants.items() if tensor is not None}
        tables = table_sizes(read_proto(graph.path).graph)
        self._form = graph.interface.form or CallForm()
        self._flat = {plain_name(n): n for n in (*compiled_with, *self._names)}
        self._tables = {n: size for n, size in tables.items() if n in self._names}

    def arguments(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments of a call by name. Raises CallError for surplus or repeated arguments."""
        called, known = self._called, self._graph.interface.arguments
        if len(args) > len(known):
            raise CallError(f"{called} with {len(args)} arguments, but it takes {', '.join(known)}")
        given = dict(zip(known, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise CallError(f"{called} with {', '.join(twice)} twice: by position and by name")
        return given | dict(kwargs)

    def flat(self, given: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments by the flat names of the graph's inputs; a list, a tuple and a dict count as the same.

        Raises CallError for lists whose tensors do not fit together.
        """
        whole = {
            name: self._stacked(name, value) if name in self._form.apart else value for name, value in given.items()
        }
        found = {self._flat.get(plain_name(name), name): value for name, value in flatten(whole)}
        return {name: self._as_compiled(name, value) for name, value in found.items()}

    def _as_compiled(self, name: str, value: object) -> object:
        """Return an argument with its rows on the first axis, and a list of rows with as many items as compiled."""
        if name in self._form.row_lists and alike(value):
            compiled: Any = self._compiled_with.get(name)
            return of_rows(value, len(compiled))
        return self._grouped(name, value) if name in self._form.repeats else self._rows_first(name, value)

    def _stacked(self, name: str, value: object) -> object:
        """Return the rows of a list as one tensor (R, ...)."""
        if not isinstance(value, list | tuple) or not value or not all(isinstance(row, torch.Tensor) for row in value):
            return value
        if len(shapes := {tuple(row.shape) for row in value}) > 1:
            raise CallError(f"{self._place(name)} has rows of the shapes {sorted(shapes)}: give rows of one shape")
        return torch.stack(list(value))

    def _rows_first(self, name: str, value: object) -> object:
        """Return rows on another axis, such as (L, R, ...), as (R, L, ...)."""
        axis = self._form.row_axes.get(name, 0)
        return value.movedim(axis, 0) if isinstance(value, torch.Tensor) and value.dim() > axis > 0 else value

    def _grouped(self, name: str, value: object) -> object:
        """Return rows (R k, ...) as (R, k, ...)."""
        count = self._form.repeats[name]
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if len(value) % count:
            raise CallError(f"{self._place(name)} has {len(value)} rows: give {count} for each row of the sample")
        return value.reshape(-1, count, *value.shape[1:])

    def tensors(self, given: Mapping[str, object], device: torch.device) -> dict[str, torch.Tensor]:
        """Return the graph's inputs, except the step, by name on the device, from arguments by flat name."""
        specs, sample, timestep = self._graph.inputs, self._graph.interface.sample, self._graph.timestep
        if absent := [name for name in (*self._names, *self._fixed) if given.get(name) is None]:
            raise CallError(f"{self._called} without {', '.join(absent)}, which it was compiled with")
        for name, constant in self._fixed.items():
            self._check_fixed(name, self._tensor(name, given[name]), constant)
        check_others(given, (*self._names, *self._fixed), self._compiled_with, self._called)
        found = {name: self._tensor(name, given[name]) for name in self._names}
        if sample in found and not found[sample].is_floating_point():
            raise CallError(f"{self._place(sample)} is of {found[sample].dtype}: give floating-point numbers")
        if timestep in found and len(specs[timestep].shape) == 1:
            rows = found.get(sample)
            if rows is None or rows.dim() == len(specs[sample].shape):
                found[timestep] = self._for_rows(found[timestep], rows)
        check_shapes({name: specs[name] for name in found}, found, self._name)
        self._check_multiples(found)
        for name, size in self._tables.items():
            self._check_indices(name, found[name], size)
        converted = {name: self._converted(name, value) for name, value in found.items()}
        return {name: value.to(device).contiguous() for name, value in converted.items()}

    @contextlib.contextmanager
    def blamed(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Turn a runtime's error for these inputs into a CallError with their sizes."""
        try:
            yield
        except IntaglioError:
            raise
        except Exception as e:  # each runtime raises its own
            raise CallError(f"{self._sizes(inputs)}: the graph does not accept these inputs: {e}") from e

    def check_outputs(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Raise CallError if an output has other sizes than the inputs' axes of the same names."""
        sizes = dict(_named_sizes(self._graph.inputs, inputs))
        for name, size in _named_sizes(self._graph.outputs, outputs):
            if size != sizes.get(name, size):
                raise CallError(
                    f"{self._sizes(inputs)}: the axis {name} of the output has the size {size}, but {sizes[name]} in"
                    " the inputs"
                )

    def _sizes(self, inputs: Mapping[str, torch.Tensor]) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        compiled = [f"{axis} {usual} and {other}" for axis, (usual, other) in self._graph.sizes.items()]
        return f"{self._called} with {shapes}" + (f", but compiled for {', '.join(compiled)}" if compiled else "")

    def _tensor(self, name: str, value: object) -> torch.Tensor:
        """Return the value as a tensor; it may be a number. Raises CallError for a value that the graph cannot take."""
        if isinstance(value, Real):
            try:
                value = torch.as_tensor(value)
            except (OverflowError, RuntimeError, TypeError, ValueError) as e:  # a number that no type of torch holds
                raise CallError(f"{self._place(name)} is {value}: {e}") from e
        if not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise CallError(f"{self._place(name)} is a {kind}: give a tensor of torch")
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise CallError(
                f"{self._place(name)} is a tensor on the device {value.device.type} with the layout {value.layout}"
                f"{', quantized' if value.is_quantized else ''}: give a dense, unquantized tensor with values"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise CallError(
                f"{self._place(name)} requires a gradient, and none goes through a compiled graph: call it under"
                " torch.no_grad()"
            )
        spec = self._graph.inputs.get(name)
        if value.is_complex() and spec is not None and len(spec.shape) == value.dim() + 1:
            return torch.view_as_real(value.detach())
        return value.detach()

    def _for_rows(self, timestep: torch.Tensor, sample: torch.Tensor | None) -> torch.Tensor:
        """Return the timestep (R,), from one value for all rows or one for each."""
        flat = timestep.reshape(-1)
        if sample is None or not sample.dim() or len(flat) == len(sample):
            return flat
        if len(flat) != 1:
            name = self._graph.timestep or ""
            raise CallError(
                f"{self._place(name)} has {len(flat)} values for {len(sample)} rows: give 1 or {len(sample)}"
            )
        return flat.expand(len(sample))

    def _check_fixed(self, name: str, value: torch.Tensor, constant: torch.Tensor) -> None:
        """Raise CallError for a value that differs from the graph's constant, whose one row stands for all rows."""
        one_row = value.dim() > 0 and constant.shape == (1, *value.shape[1:])
        rows = constant.expand(value.shape) if one_row else constant
        advice = "its values decide what the model computes, so they are constants of the graph: compile for these"
        if value.shape != rows.shape:
            raise CallError(
                f"{self._place(name)} has the shape {tuple(value.shape)}, but compiled with {tuple(constant.shape)}:"
                f" {advice}"
            )
        for place in (value.cpu() != rows).nonzero().tolist()[:1]:
            given, compiled = value[tuple(place)].item(), rows[tuple(place)].item()
            raise CallError(
                f"{self._place(name)} has {given:g} at {tuple(place)}, but the graph was compiled with {compiled:g}:"
                f" {advice}"
            )

    def _check_multiples(self, found: Mapping[str, torch.Tensor]) -> None:
        """Raise CallError, once for each axis, for sizes that the network cannot divide."""
        problems = {}
        for axis, size in _named_sizes(self._graph.inputs, found):
            least = self._graph.multiples.get(axis, 1)
            if size % least:
                name, place = next((n, s.shape.index(axis)) for n, s in self._graph.inputs.items() if axis in s.shape)
                near = " or ".join(str(each) for each in (size // least * least, size // least * least + least) if each)
                problems[axis] = (
                    f"{self._place(name)} has {size} at axis {place}, but the network divides this size by {least}:"
                    f" give {near}"
                )
        if problems:
            raise CallError(*problems.values())

    def _check_indices(self, name: str, value: torch.Tensor, size: int) -> None:
        """Raise CallError for indices outside 0 to size - 1; torch refuses negative ones too."""
        if value.is_complex() or value.dtype == torch.bool:
            raise CallError(f"{self._place(name)} is of {value.dtype}: give whole numbers from 0 to {size - 1}")
        for number in (float(end) for end in value.aminmax()):
            if not 0 <= number < size:
                raise CallError(
                    f"{self._place(name)} has the index {number:g}, but the table has the indices 0 to {size - 1}"
                )

    def _converted(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Convert a tensor to the graph's element type. Raises CallError if its values do not fit that type."""
        wanted: torch.dtype = getattr(torch, self._graph.inputs[name].dtype)
        if value.is_complex() and not wanted.is_complex:
            raise CallError(f"{self._place(name)} is complex, but the graph accepts {wanted} only")
        converted = value.to(wanted)
        if wanted.is_floating_point and not converted.isfinite().all():
            where = f"values beyond {wanted}" if value.isfinite().all() else "NaN or Inf"
            raise CallError(
                f"{self._place(name)} has {where}: integer codes cannot represent these values, so the output would be"
                " wrong: give finite values"
            )
        if not (wanted.is_floating_point and value.is_floating_point()):
            changed = converted.to(value.dtype) != value
            if changed.any():
                raise CallError(f"{self._place(name)} has {value[changed][0].item():g}, which {wanted} cannot hold")
        return converted

    @property
    def _called(self) -> str:
        return f"{self._name or 'the denoiser'} was called"

    def _place(self, name: str) -> str:
        return f"{self._name}: {name}" if self._name else name


def table_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the size of the smallest table that each graph input indexes, by the input's name."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origins = {value.name: value.name for value in graph.input}
    sizes: dict[str, int] = {}
    for node in graph.node:  # nodes are in an order of execution
        first = node.input[0] if node.input else ""
        if node.op_type in KEEPS_INDICES and first in origins:
            origins[node.output[0]] = origins[first]
        if node.op_type in KEEPS_TABLE and first in shapes:
            shapes[node.output[0]] = shapes[first]
        if node.op_type == "Constant" and (values := [a.t for a in node.attribute if a.name == "value"]):
            shapes[node.output[0]] = tuple(values[0].dims)
        if node.op_type == "Gather" and first in shapes and node.input[1] in origins:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            name = origins[node.input[1]]
            sizes[name] = min(shapes[first][axis], sizes.get(name, shapes[first][axis]))
    return sizes


def check_others(
    given: Mapping[str, object],
    inputs: Collection[str],
    compiled_with: Mapping[str, object],
    called: str = "the denoiser was called",
) -> None:
    """Raise CallError for arguments that are no inputs of the graph, unless it was compiled with their values."""
    problems = []
    for argument, value in given.items():
        if value is None or argument in inputs:
            continue
        if isinstance(value, torch.Tensor):
            problems.append(f"{called} with {argument}, which it was compiled without")
        elif _differs(value, compiled := compiled_with.get(argument)) and (value is not False or compiled is not None):
            problems.append(f"{called} with {argument} = {value!r}, but compiled with {compiled!r}")
    if problems:
        raise CallError(*problems)


def _differs(value: object, compiled: object) -> bool:
    """Return True if two arguments differ; an array always counts as different."""
    try:
        return bool(_as_lists(value) != _as_lists(compiled))
    except (TypeError, ValueError, RuntimeError):
        return True


def _as_lists(value: object) -> object:
    """Return a constant with lists in the place of tuples."""
    return [_as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def check_shapes(specs: Mapping[str, TensorSpec], inputs: Mapping[str, torch.Tensor], name: str = "") -> None:
    """Raise CallError for sizes that a graph does not accept."""
    before = f"{name}: " if name else ""
    sizes: dict[str, int] = {}
    problems = []
    for tensor, value in inputs.items():
        wanted = specs[tensor].shape
        if len(wanted) != value.dim():
            shown = f"({', '.join(map(str, wanted))})"
            problems.append(f"{before}{tensor} has the shape {tuple(value.shape)}, but the graph accepts {shown}")
            continue
        for axis, (size, there) in enumerate(zip(wanted, value.shape, strict=True)):
            taken = size if isinstance(size, int) else sizes.setdefault(size, there)
            if there != taken:
                problems.append(f"{before}{tensor} has {there} at axis {axis}, but the graph accepts {taken}")
            elif not there and not isinstance(size, int):
                problems.append(f"{before}{tensor} has 0 at axis {axis}, but the graph accepts 1 or more")
    if problems:
        raise CallError(*problems)


def _named_sizes(specs: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of every axis that has a name."""
    for tensor, value in tensors.items():
        for name, size in zip(specs[tensor].shape, value.shape, strict=False):
            if isinstance(name, str):
                yield name, size
