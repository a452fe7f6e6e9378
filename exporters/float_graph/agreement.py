"""Compare an exported graph with torch, and find the largest magnitudes of its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from intaglio.exporters.float_graph.lean_session import NO_WEIGHTS, Weights, lean_session
from intaglio.exporters.float_graph.onnx_file import read_model
from intaglio.pipeline.artifacts.graph import as_array
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.numerics.quality import rel_l2

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from intaglio.exporters.float_graph.in_parts import Session
    from intaglio.pipeline.model.types import Inputs

TOLERANCE = 1e-4
"""Relative L2 error allowed for a whole network, from the order of its float32 sums; a wrong graph has far more."""
HALF_TOLERANCE = 1e-2
"""Relative L2 error allowed for a graph with float16 values: a network may amplify an error of 2^-11 several times."""


class Expected(NamedTuple):
    """Torch's outputs for a call, by name in the order of the graph's outputs, and a description of the call.

    With `first`, only the first entries of each row of the graph's outputs are there, along any axis.
    """

    where: str
    inputs: Inputs
    outputs: Mapping[str, torch.Tensor]
    first: bool = False


def check_outputs(path: Path, expected: Iterable[Expected], tolerance: float, weights: Weights = NO_WEIGHTS) -> None:
    """Run the graph on calls. Raise StepFailed if an output differs from torch's by more than the tolerance.

    `weights` are those that the graph's files leave out, here and in `find_magnitudes`.
    """
    with lean_session(path, weights) as session:
        for call in expected:
            _check(call, _run(session, call), tolerance)


def find_magnitudes(
    path: Path, calls: Iterable[Expected], tolerance: float, weights: Weights = NO_WEIGHTS
) -> dict[str, float]:
    """Return the largest magnitude of each floating-point value in these calls, by name.

    Magnitudes have three digits: the order of a sum changes further digits, and with them the digest of the artifact.
    Raises StepFailed if the graph differs from torch in a call.
    """
    beside = path.with_name("ranges.onnx")  # in the same folder, so that it finds the weights
    names = _write_with_ends(path, beside)
    amax = np.zeros(len(names), np.float32)
    with lean_session(beside, weights) as session:
        beside.unlink()
        for call in calls:
            found = _run(session, call)
            _check(call, found[: len(call.outputs)], tolerance)
            ends = np.array(found[len(call.outputs) :], np.float32)
            amax = np.maximum(amax, np.abs(ends).reshape(-1, 2).max(1))
    return {name: float(f"{largest:.2e}") for name, largest in zip(names, amax, strict=True)}


def _run(session: Session, call: Expected) -> list[NDArray[np.float32]]:
    """Return all outputs for a call; the graph may read only some of the call's inputs. Raises StepFailed."""
    feed = {each.name: as_array(call.inputs[each.name]) for each in session.get_inputs()}
    try:
        found: list[NDArray[np.float32]] = session.run(None, feed)
    except Exception as e:  # ONNX Runtime has several
        raise StepFailed(f"{call.where}: the exported graph cannot be run, as it is not the model's: {e}") from e
    return found


def _check(call: Expected, found: Iterable[NDArray[np.float32]], tolerance: float) -> None:
    """Raise StepFailed unless the graph returned the same as torch."""
    for whole, expected in zip(found, call.outputs.values(), strict=True):
        y = torch.from_numpy(whole)
        y = first_entries(y, expected) if call.first else y
        if y.shape != expected.shape:
            raise StepFailed(
                f"{call.where}: the exported graph returns {tuple(y.shape)}, torch {tuple(expected.shape)}"
            )
        error = rel_l2(y, expected)
        if not error <= tolerance:  # also for NaN
            raise StepFailed(
                f"{call.where}: the exported graph differs from torch by {error:.1e},"
                f" relative L2 ({tolerance:.0e} allowed)"
            )


def first_entries(whole: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """Return the first entries of each row of `whole`, as many along every axis as `recorded` has."""
    return whole[:, *(slice(size) for size in recorded.shape[1:])]


def _write_with_ends(path: Path, beside: Path) -> list[str]:
    """Write the graph with the extremes of each floating-point value as further outputs; return the values' names."""
    model = read_model(path)
    made = [(node, v) for node in model.graph for v in node.outputs if v.type == ir.TensorType(ir.DataType.FLOAT)]
    for node, value in made:  # both extremes, not the magnitude: Abs would first copy the value, which may be large
        ends = [ir.node(op, [value], {"keepdims": 0}, name=f"{value.name}/{op}") for op in ("ReduceMax", "ReduceMin")]
        for end in ends:
            end.outputs[0].dtype, end.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            model.graph.outputs.append(end.outputs[0])
        # directly after the node: the runtime executes the first node that is ready, so the value is released early
        model.graph.insert_after(node, ends)
    ir.save(model, beside)
    return [str(value.name) for _, value in made]
