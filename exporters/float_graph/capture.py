"""Trace one call with torch's exporter, for any number of rows: in the usual way, or where that fails, row by row.

Shapes: R rows of one call.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from intaglio.exporters.float_graph.by_row import ROWS, merged
from intaglio.exporters.float_graph.complex_pairs import with_pairs
from intaglio.exporters.float_graph.deciding import Fixed, deciding_inputs
from intaglio.exporters.float_graph.of_weights import with_values_of_weights
from intaglio.exporters.float_graph.spelled import Spelled
from intaglio.pipeline.errors import IntaglioError, StepFailed

if TYPE_CHECKING:
    import onnx_ir as ir

    from intaglio.pipeline.model.types import Inputs

Compute: TypeAlias = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Function that calls a module: flat inputs to flat outputs, by name."""


@dataclass(frozen=True)
class Calls:
    """Recorded call, and one where every dynamic axis has another size, by input name.

    `shared` names the inputs that have no axis of rows. `recorded` are those that have the same values in all recorded
    calls, with one row.
    """

    usual: Inputs
    other: Inputs | None
    shared: frozenset[str]
    recorded: Inputs = field(default_factory=dict)

    @property
    def traced(self) -> Inputs:
        """Call to trace: the larger one, with more than one row, as an axis of size 1 would become a constant."""
        both = (self.usual,) if self.other is None else (self.usual, self.other)
        larger = max(both, key=lambda call: sum(value.numel() for value in call.values()))
        return self.with_rows(larger, max(2, self.rows))

    @property
    def rows(self) -> int:
        """Return the number of rows of the usual call."""
        return next(len(value) for name, value in self.usual.items() if name not in self.shared)

    @property
    def one_size(self) -> bool:
        """Return True if only the number of rows is dynamic."""
        return all(self.dynamic_axes(name) in ((), (0,)) for name in self.usual) and all(
            self.dynamic_axes(name) == () for name in self.shared & self.usual.keys()
        )

    def with_rows(self, call: Inputs, rows: int) -> dict[str, torch.Tensor]:
        """Return the call with this number of rows, repeated if it has fewer."""
        return {
            name: value.contiguous() if name in self.shared else value[torch.arange(rows) % len(value)]
            for name, value in call.items()
        }

    def dynamic_axes(self, name: str) -> tuple[int, ...]:
        """Return the dynamic axes of an input: the rows, then those whose size differs in the other call."""
        shape, other = self.usual[name].shape, (self.other or self.usual)[name].shape
        if len(shape) != len(other):
            raise StepFailed(f"{name}: {len(shape)} axes in the recorded call, {len(other)} at the other size")
        varying = tuple(axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)
        return varying if name in self.shared else tuple(dict.fromkeys((0, *varying)))

    def sizes(self, axes: Mapping[str, tuple[str, str, int]]) -> dict[str, tuple[int, int]]:
        """Return the size of each dynamic axis except the batch, in the recorded call and in the other, by name."""
        other = self.other or self.usual
        found = {name: (owner, axis) for name, owner, axis in axes.values() if name != "batch"}
        return {
            name: (self.usual[owner].shape[axis], other[owner].shape[axis]) for name, (owner, axis) in found.items()
        }


def shapes(inputs: Inputs) -> str:
    """Write the shapes of all inputs in one line."""
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())


class _Called(nn.Module):
    """Call as a module with the arguments `names`; inputs in `fixed` have these values.

    The model may read values that depend on `fixed` and on new tensors alone; with None, on no tensor. Complex
    arguments are given as pairs of real numbers.
    """

    def __init__(self, module: nn.Module, compute: Compute, calls: Calls, fixed: Inputs | None) -> None:
        super().__init__()
        self.module = module
        self.compute, self.fixed, self.reads = compute, fixed or {}, fixed is not None
        self.names = [name for name in calls.usual if name not in self.fixed]
        self.with_rows = [name for name in self.names if name not in calls.shared]
        self.complex = frozenset(name for name in self.names if calls.usual[name].is_complex())

    def given(self, call: Inputs) -> tuple[torch.Tensor, ...]:
        """Return the arguments of `forward` for a call."""
        return tuple(torch.view_as_real(call[n]) if n in self.complex else call[n] for n in self.names)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(self.names, values, strict=True))
        rows = inputs[self.with_rows[0]].shape[0]
        for name in self.with_rows[1:]:  # one symbol for the batch: masks and latents are combined in some models
            torch._check(inputs[name].shape[0] == rows)  # type: ignore[no-untyped-call]  # torch
        return tuple(self.computed(inputs).values())

    def computed(self, inputs: Inputs) -> Mapping[str, torch.Tensor]:
        """Call the module, with fixed inputs if any."""
        given = {n: torch.view_as_complex(value) if n in self.complex else value for n, value in inputs.items()}
        with Fixed(self.fixed.values(), self.zero_of(inputs)) if self.reads else contextlib.nullcontext(), Spelled():
            return self.compute({**given, **self.fixed})

    def zero_of(self, inputs: Inputs) -> torch.Tensor | None:
        """Return the zero that new tensors get, None for none."""
        return None


class _ByRow(_Called):
    """Call as a module whose `compute` sees one row at a time; torch extends this call to all rows."""

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(self.names, values, strict=True))
        common = {name: value for name, value in inputs.items() if name not in self.with_rows}

        def one_row(rows: Inputs) -> tuple[torch.Tensor, ...]:
            alone = {name: value.unsqueeze(0) for name, value in rows.items()}
            found = self.computed({name: {**alone, **common}[name] for name in self.names})
            return tuple(value.squeeze(0) for value in found.values())

        rows = {name: inputs[name] for name in self.with_rows}
        made: tuple[torch.Tensor, ...] = torch.func.vmap(one_row, in_dims=(dict.fromkeys(rows, 0),))(rows)
        return made


class _ByRowWritten(_ByRow):
    """Call by rows as a module that writes what it computes from a row into new tensors."""

    def zero_of(self, inputs: Inputs) -> torch.Tensor | None:
        """Return a zero that depends on the row."""
        return inputs[next(n for n in self.with_rows if inputs[n].is_floating_point())].flatten()[0] * 0


def capture(
    module: nn.Module, compute: Compute, calls: Calls, outputs: Sequence[str], opset: int, called: str
) -> tuple[ir.Model, Inputs]:
    """Run torch's exporter on one call with its dynamic axes, without simplification.

    If the usual way fails, complex numbers become pairs, values of weights alone become constants, and so do inputs
    whose values decide what the model computes, if they are the same in all recorded rows; these inputs are returned,
    by name. If that fails too, the model is traced with one row. Fourier transforms become products with matrices
    where that can be exported. Raises StepFailed.
    """
    task = _Export(module, compute, calls, outputs, opset, called)
    # models may keep tables from their first call: if torch traced that call, the tables would have no values
    with torch.no_grad():
        compute(calls.usual)
    try:
        made = task.usual()
    except StepFailed as error:
        usual = error
    else:
        if any(node.op_type in TRANSFORMS for node in made.graph):
            with contextlib.suppress(StepFailed):  # the graph with these operators is right, only TensorRT refuses it
                return task.any_rows({}), {}
        return made, {}
    decide = deciding_inputs(compute, calls.with_rows(calls.usual, 1))
    if varying := [name for name in decide if name not in calls.recorded]:
        if floats := [name for name in varying if calls.usual[name].is_floating_point()]:
            raise StepFailed(
                *usual.problems,
                f"{decide[floats[0]]}: the model reads values that it computes from {', '.join(floats)}, and chooses"
                " sizes or branches by them, as experts do that take a varying number of tokens: a graph cannot, so"
                " change this code, such as to compute all experts for all tokens",
            ) from usual
        raise StepFailed(
            *usual.problems,
            f"{', '.join(varying)}: the values decide what the model computes, and differ between the recorded rows or"
            " sizes: record rows with the same values, such as texts that fill all their tokens",
        ) from usual
    fixed = {name: calls.recorded[name] for name in decide}
    ways = [task.any_rows] if fixed.keys() <= calls.shared else []  # an axis of constant rows would be constant
    ways += [task.row_by_row, partial(task.row_by_row, kind=_ByRowWritten)] if calls.one_size else []
    for way in ways:
        with contextlib.suppress(StepFailed):  # the usual way failed first, and its error is the one to show
            return way(fixed), fixed
    raise usual


@dataclass(frozen=True)
class _Export:
    """Export of one call."""

    module: nn.Module
    compute: Compute
    calls: Calls
    outputs: Sequence[str]
    opset: int
    called: str

    def usual(self) -> ir.Model:
        """Export as torch does by itself, with symbols for the dynamic axes. Raises StepFailed."""
        called = self._module(None)
        with self._blamed():
            made = self._converted(called, called, called.given(self.calls.traced), self._axes(called))
        return self._checked(made, called)

    def any_rows(self, fixed: Inputs) -> ir.Model:
        """Export with symbols for the dynamic axes, and pairs for complex numbers. Raises StepFailed."""
        called = self._module(fixed)
        with self._blamed():
            made = self._converted(self._program(called, self.calls.traced, self._axes(called)), called)
        return self._checked(made, called)

    def _module(self, fixed: Inputs | None) -> _Called:
        return _Called(self.module, self.compute, self.calls, fixed).eval()

    def _axes(self, called: _Called) -> Any:
        # AUTO and not DYNAMIC: an axis that has to be constant is named later, all of them together
        return (tuple(dict.fromkeys(self.calls.dynamic_axes(name), torch.export.Dim.AUTO) for name in called.names),)

    def _checked(self, made: torch.onnx.ONNXProgram, called: _Called) -> ir.Model:
        assert made.exported_program is not None  # it is, with dynamo
        _check_dynamic(made.exported_program, self.calls, called.names)
        return made.model

    def row_by_row(self, fixed: Inputs, kind: type[_ByRow] = _ByRow) -> ir.Model:
        """Export one row, for two numbers of rows, and merge the graphs. Raises StepFailed."""
        called = kind(self.module, self.compute, self.calls, fixed).eval()
        # other backends of attention have no rule for many rows, and are called once for each
        with self._blamed(), sdpa_kernel(SDPBackend.MATH):
            two, three = (
                self._converted(self._program(called, self.calls.with_rows(self.calls.usual, rows), None), called).model
                for rows in ROWS
            )
        return merged(two, three, called.with_rows[0])

    def _program(self, called: _Called, call: Inputs, axes: Any) -> torch.export.ExportedProgram:
        oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with oblivious:  # as torch.onnx.export itself does
            program = torch.export.export(called, called.given(call), dynamic_shapes=axes, strict=False)
        return with_pairs(with_values_of_weights(program))

    def _converted(
        self,
        program: torch.export.ExportedProgram | nn.Module,
        called: _Called,
        args: tuple[torch.Tensor, ...] = (),
        axes: Any = None,
    ) -> torch.onnx.ONNXProgram:
        made = torch.onnx.export(
            program,
            args,
            dynamo=True,
            opset_version=self.opset,
            input_names=called.names,
            output_names=list(self.outputs),
            dynamic_shapes=axes,
            custom_translation_table={torch.ops.prims.view_of.default: _same},
            verbose=False,
            optimize=False,
        )
        assert made is not None  # it is, with dynamo
        _rename_other_values(made.model)
        return made

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Silence the exporter, and turn its errors into StepFailed."""
        try:
            with silent(), _rare_collections(), torch.no_grad():
                yield
        except IntaglioError:
            raise
        except Exception as e:  # the model's own code runs, and raises any exception
            called = f"{self.called} called with {shapes(self.calls.traced)}"
            raise StepFailed(f"torch cannot export {called}: {_first_cause(e)}") from e


def _same(x: Any) -> Any:
    """Return a view of a whole tensor: the tensor. An Identity would come between a layer's product and its bias."""
    return x


def _rename_other_values(model: ir.Model) -> None:
    """Rename inner values that have the name of an input: torch names inputs last, and does not compare other names."""
    taken = {value.name for value in model.graph.inputs}
    made = [value for node in model.graph for value in node.outputs]
    inner = [value for value in (*model.graph.initializers.values(), *made) if not value.is_graph_input()]
    names = taken | {value.name for value in inner}
    for value in inner:
        if value.name in taken:
            value.name = next(name for i in itertools.count() if (name := f"{value.name}_inner_{i}") not in names)
            names.add(value.name)


def _check_dynamic(program: torch.export.ExportedProgram, calls: Calls, names: Sequence[str]) -> None:
    """Raise StepFailed for every axis that was to be dynamic and is a constant: the ONNX graph does not show it."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    # a size of 0 or more may have no finite end in torch's range
    limits = program.range_constraints.items()
    single = {str(symbol): int(r.lower) for symbol, r in limits if r.lower == r.upper and r.lower.is_finite}
    constant = []
    for name, user_input in zip(names, program.graph_signature.user_inputs, strict=True):
        for axis in calls.dynamic_axes(name):
            size = str(values[user_input].shape[axis])  # a number, also where a symbol has become a constant
            only = int(size) if size.isdecimal() else single.get(size)
            if only is not None:
                constant.append(
                    f"{name}: the size of axis {axis} is fixed at {only}, because the model computes a constant from"
                    " it, such as a position table: use one size only, or make that constant an input of the model"
                )
    if constant:
        raise StepFailed(*constant)


def _first_cause(error: BaseException) -> str:
    """Return the first cause of an error in one line, with the operator of torch and the model's line if known."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = str(chain[-1]).strip()
    first = f"{type(chain[-1]).__name__}: {text.splitlines()[0] if text else 'no message'}"
    operators = re.findall(r"target=torch\.ops\.([\w.]+)", "\n".join(map(str, chain)))
    operator = f", in the operator {operators[0]}" if operators else ""
    return first + operator + next((place for each in reversed(chain) if (place := _model_line(each))), "")


def _model_line(error: BaseException) -> str:
    """Return the innermost line of code of neither torch, this package nor Python's library; nothing if none is."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _NOT_THE_MODEL:
            return f", at {Path(frame.f_code.co_filename).name}:{line} in {frame.f_code.co_name}"
    return ""


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python collect garbage less often: the exporter makes millions of objects, and nearly all of them live on."""
    usual = gc.get_threshold()
    gc.set_threshold(*map(max, zip(usual, _COLLECTIONS, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*usual)


_NOT_THE_MODEL = sys.stdlib_module_names | {"torch", "onnxscript", "onnx_ir", __name__.partition(".")[0]}
"""Packages whose code is not that of the exported model."""

TRANSFORMS = frozenset({"DFT", "STFT"})
"""Operators of ONNX that TensorRT lacks, and which products with matrices can replace."""

_COLLECTIONS = (50_000, 20, 20)
"""New objects before a collection of the youngest, and collections of each generation before one of the next."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence the exporter's progress, warnings and log lines."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
