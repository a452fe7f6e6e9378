"""Merge the adapters into the weights and round once, to integer codes and scales."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.schemes import FLOAT, RoundedWeight

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.formats.layer_tables import LayerTables
    from intaglio.pipeline.formats.schemes import LayerScheme
    from intaglio.pipeline.simulation.weight import WeightRounding


class MergeAdapters(Pass):
    """Round each weight as it was trained: codes = Q(W0 + B A; s). The merged model computes what the trained one did.

    Weights are read from the model's files one after the other, and their codes are written one after the other: the
    memory that this takes is a few times that of the largest layer.

    Layers that the recorded calls do not reach stay in float. Tables with one scale for each step can have entries at
    timesteps that were not calibrated; these entries are interpolated.
    """

    name: ClassVar[str] = "merge"
    version: ClassVar[int] = 5
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, ADAPTER, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({QUANTIZED})
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    timesteps: tuple[float, ...] = Field(
        (), description="timesteps of the tables with one scale per step; empty: the calibrated timesteps"
    )
    between: int = Field(
        0, ge=0, le=99, description="further entries between two timesteps, for samplers that call at other timesteps"
    )

    def stored_bytes(self, parameters: int, in_files: int) -> int:
        """Return the bytes of 8-bit codes; those of fewer bits take fewer."""
        return parameters

    def run(self, state: State, ctx: Context) -> Outputs:
        """Add the low-rank adapters to the weights, and round the sums."""
        from intaglio.pipeline.artifacts.quantized import Quantized
        from intaglio.pipeline.numerics.step_tables import refine

        timesteps = refine(self.timesteps or state[TRAJECTORY].timesteps, self.between)
        folder = Path(mkdtemp(dir=ctx.scratch))
        Quantized.write(folder, timesteps, _merged(state, timesteps))
        return {QUANTIZED: Quantized.load(folder)}


def _merged(state: State, timesteps: tuple[float, ...]) -> Iterator[tuple[str, QuantizedLayerData]]:
    """Yield each layer with an integer weight, in the order of the plan. Raises StepFailed as `_integers` does."""
    from intaglio.passes.distill.trainable import load_learnt
    from intaglio.pipeline.numerics.basis import bases_of
    from intaglio.pipeline.simulation.weight import WeightRounding

    module, trajectory, adapter = state[MODEL].open(stored=True).module, state[TRAJECTORY], state[ADAPTER]
    plan = state[PLAN]
    schemes, balances = trajectory.called(plan.schemes), bases_of(plan.balances)
    tables = trajectory.tables(schemes, plan.balances, timesteps)
    for layer in plan.layers:
        name, scheme = layer.name, schemes.get(layer.name, FLOAT)
        if not isinstance(scheme.weight, RoundedWeight):
            continue
        grid = WeightRounding(scheme.weight, balances.get(name), plan.branches.get(name))
        weight = module.get_submodule(name).get_parameter("weight").detach()
        load_learnt(grid, weight, adapter.layers[name], adapter.distance)
        learnt = adapter.layers[name].tables.resampled(trajectory.timesteps, timesteps)
        needed = tables[name].replaced_by(learnt).needed_by(scheme, padded=layer.padded)
        yield name, _integers(name, scheme, grid, weight, needed)


def _integers(
    name: str, scheme: LayerScheme, grid: WeightRounding, weight: torch.Tensor, tables: LayerTables
) -> QuantizedLayerData:
    """Round a layer's weight as it was trained. Raises StepFailed for NaN, Inf, and scales that are not positive."""
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

    if not all(end.isfinite() for end in grid.float_weight(weight).aminmax()) or not (grid.scale > 0).all():
        raise StepFailed(f"{name}: the merged weight has NaN or Inf, or a scale that is not positive")
    group_NG = None if grid.group is None else grid.rounded_form.stored_groups(grid.group)
    codes, scale_NG = grid.codes(weight), grid.scale.detach()
    return QuantizedLayerData(scheme, codes, scale_NG, group_NG, tables, grid.balance, grid.branch)
