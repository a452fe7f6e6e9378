"""Merge the adapters into the weights and round once: integer codes and scales are all that is left."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.schemes import FLOAT, Float, RoundedWeight


class MergeAdapters(Pass):
    """codes = Q(W0 + B A; s). The merged model computes what the trained one did, to float32 rounding.

    Layers without a part in the recorded calls stay in float. Tables with a scale a step can have entries at other
    timesteps than the calibrated ones, which are interpolated.
    """

    name: ClassVar[str] = "merge"
    version: ClassVar[int] = 4
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, ADAPTER, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({QUANTIZED})
    needs: ClassVar[tuple[str, ...]] = ("torch",)

    timesteps: tuple[float, ...] = Field(
        (), description="those that tables with a scale a step have an entry for; none listed: the calibrated ones"
    )
    between: int = Field(
        0, ge=0, le=99, description="entries between each two of them, for samplers that call at other timesteps"
    )

    def run(self, state: State, ctx: Context) -> Outputs:
        """Add the low-rank adapters to the weights and round the sums again."""
        from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
        from intaglio.pipeline.numerics import rounding as affine
        from intaglio.pipeline.numerics.step_tables import refine, resample_linear, resample_magnitude

        module, trajectory, adapter = state[MODEL].open().module, state[TRAJECTORY], state[ADAPTER]
        plan = state[PLAN]
        timesteps = refine(self.timesteps or trajectory.timesteps, self.between)
        schemes = trajectory.called(plan.schemes)
        ranges = trajectory.ranges(schemes, plan.balances, timesteps)
        merged = {}
        for layer in plan.layers:
            scheme, balance = schemes.get(layer.name, FLOAT), ranges.balance.get(layer.name)
            branch = plan.branches.get(layer.name)
            if not isinstance(scheme.weight, RoundedWeight):
                continue
            learnt = adapter.layers[layer.name]
            w = module.get_submodule(layer.name).get_parameter("weight").detach()
            w_NK = (w if balance is None else balance.weight(w)).flatten(1)
            w_NK = w_NK if branch is None else branch.rest(w_NK)
            if learnt.codes is not None:
                first = affine.product_scale(*scheme.weight.fit(w_NK))
                w_NK = affine.rounds_to(learnt.codes, w_NK, first, scheme.weight.grid, adapter.distance)
            if learnt.a is not None and learnt.b is not None:
                w_NK = w_NK + learnt.b @ learnt.a
            if not all(end.isfinite() for end in w_NK.aminmax()) or not (learnt.scale_NG > 0).all():
                raise StepFailed(f"{layer.name}: the merged weight has NaN or Inf, or a scale that is not positive")
            amax_T, shift_T = ranges.amax[layer.name], ranges.shift.get(layer.name)
            if learnt.amax_T is not None:
                amax_T = resample_magnitude(learnt.amax_T, trajectory.timesteps, timesteps)
            if learnt.shift_T is not None:
                shift_T = resample_linear(learnt.shift_T, trajectory.timesteps, timesteps)
            factor_T = learnt.factor_T
            if factor_T is not None:
                factor_T = resample_magnitude(factor_T, trajectory.timesteps, timesteps)
            merged[layer.name] = QuantizedLayerData(
                scheme,
                scheme.weight.quantize(w_NK, affine.product_scale(learnt.scale_NG, learnt.group_NG)),
                learnt.scale_NG,
                amax_T.clamp_min(affine.TOKEN_EPS) if scheme.by_step else None,
                None if learnt.group_NG is None else affine.group_integers(learnt.group_NG),
                None if isinstance(scheme.output, Float) else ranges.output_amax[layer.name],
                shift_T if scheme.by_step else None,
                balance,
                factor_T,
                branch,
            )
        return {QUANTIZED: Quantized(timesteps, merged)}
