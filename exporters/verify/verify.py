"""Compare the deployed graph with its simulation, layer by layer and as a whole, and both with full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    FRONT,
    GRAPH,
    MODEL,
    PLAN,
    QUANTIZED,
    SENSITIVITY,
    TARGET,
    TRAJECTORY,
    VERIFICATION,
    WORKLOAD,
)
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import LISTED, StepFailed
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from torch import nn

    from intaglio.exporters.verify.parity import Comparison
    from intaglio.pipeline.artifacts.verification import (
        Departure,
        DepartureFigures,
        SampleFigures,
        Verification,
        VerificationFigures,
    )
    from intaglio.pipeline.formats.target import Target

BETWEEN_HALVES = 10 * 2.0**-11
"""Relative L2 error allowed between two layers in float16: ten roundings, as in an attention with its neighbours."""


class Verify(Pass):
    """Compare the graph in its runtime with the simulation, and fail if they differ by more than the tolerances.

    Two correct implementations may round a tie differently, and every later layer then rounds other values. So each
    layer is compared alone, on the same input, and whole models by their distance to full precision. Samples are drawn
    until the difference of both distances is known.
    """

    name: ClassVar[str] = "verify"
    version: ClassVar[int] = 15
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TARGET, TRAJECTORY, QUANTIZED, GRAPH})
    wants: ClassVar[frozenset[AnyKey]] = frozenset({ADAPTER, FRONT, PLAN, SENSITIVITY, WORKLOAD})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({VERIFICATION})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime")
    efforts = ({"samples": 32}, {"samples": 32}, {"samples": 16}, {"samples": 8}, {"samples": 2}, {"samples": 1})

    samples: int = Field(
        64,
        ge=1,
        description="largest number of samples that each implementation draws, from the same noise; fewer are drawn if"
        " the difference between simulated and deployed PSNR is known well enough before (gap_error_db)",
    )
    gap_error_db: float = Field(
        0.25,
        ge=0,
        description="standard error in dB of the difference between simulated and deployed PSNR at which no further"
        " samples are drawn; 0: all `samples` are drawn",
    )
    rows: int = Field(8, ge=1, description="rows of a recorded call on which layers are compared")
    layer_tolerance: float = Field(
        1e-4,
        gt=0,
        description="largest relative L2 error allowed between a deployed layer and its simulation on the same input",
    )
    half_tolerance: float = Field(
        4e-3,
        gt=0,
        description="relative L2 error allowed for a layer in float16: that of about eight roundings of 2^-11",
    )
    code_tolerance: float = Field(
        1e-4,
        gt=0,
        description="largest share of a layer's input codes that may differ by 1 (a single code always may); a larger"
        " difference is an error",
    )
    gap_db_tolerance: float = Field(
        0.5,
        gt=0,
        description="dB by which the PSNR of simulated and of deployed samples may differ; two standard errors are"
        " subtracted from the difference first",
    )
    floor_db: float = Field(
        20, description="SQNR of the deployed samples, in dB, below which the run, its report and `show` warn"
    )
    predicted_db_tolerance: float = Field(
        1.5,
        gt=0,
        description="PSNR in dB by which deployed samples may be worse than predicted without a warning, or twice the"
        " standard error of this difference if that is more: prediction and verification draw different samples",
    )
    bisect: bool = Field(
        False,
        description="look into the whole graph as well, and name the first place that differs from the simulation",
    )

    def forward_rows(self, model: ModelCost) -> int:
        """Return the largest number of rows of all calls: each sample is drawn three times, in all steps."""
        return 3 * model.steps * self.samples * model.rows_per_sample

    def run(self, state: State, ctx: Context) -> Outputs:
        """Compare the graph with the model: per layer, per call and over whole samples."""
        from intaglio.exporters.float_graph.agreement import HALF_TOLERANCE, TOLERANCE
        from intaglio.exporters.verify.drawing import draw_until
        from intaglio.exporters.verify.parity import Comparison
        from intaglio.pipeline.artifacts.verification import DepartureFigures, Verification, VerificationFigures
        from intaglio.pipeline.model.calls import other_call
        from intaglio.pipeline.runs.registry import find_runtime

        quantized, graph, target = state[QUANTIZED].only(state[GRAPH].nodes), state[GRAPH], state[TARGET]
        checkpoint, trajectory = state[MODEL], state[TRAJECTORY]
        model = checkpoint.open()
        in_float = layers_in_float(model.module, state[QUANTIZED].layers, target)
        fp16_bytes = float(2 * sum(p.numel() for p in model.module.parameters()))  # the simulation adds scales
        halves = target.float_type == "float16"
        rounding = HALF_TOLERANCE if halves else TOLERANCE

        def compare() -> Comparison:
            return Comparison.of(model, quantized, graph, find_runtime(target.runtime))

        def enough(samples: Mapping[str, torch.Tensor]) -> bool:
            error_db = _distances(samples, trajectory.samples.peak, rounding).fidelity_gap_error_db
            return not error_db >= self.gap_error_db  # also for NaN, which is an error below

        both, samples = draw_until(enough, model, checkpoint, self.samples, compare, ctx)
        call = trajectory.call(len(trajectory.timesteps) // 2, trajectory.some_rows(self.rows))
        departed, departures = both.departures(call) if self.bisect else (DepartureFigures(), {})
        bad = [name for name, images in samples.items() if not images.isfinite().all()]
        if bad:
            raise StepFailed(
                *self._departed(departed, departures, halves=halves), f"NaN or Inf in the samples: {', '.join(bad)}"
            )
        parity, other = both.layer_parity(call, ctx), other_call(model, call)
        figures = VerificationFigures(
            **vars(departed),
            **vars(_distances(samples, trajectory.samples.peak, rounding)),
            psnr_predicted_db=_predicted_db(state),
            psnr_predicted_error_db=_predicted_error_db(state, samples, trajectory.samples.peak),
            parity_rel_l2=both.parity(call),
            parity_other_rel_l2=None if other is None else both.parity(other),
            parity_layer_rel_l2_max=max((p.rel_l2 for p in parity.values()), default=0.0),
            fp16_bytes=fp16_bytes,
        )
        _log(figures, in_float, len(both.layers), ctx)
        low = self._low(figures.sqnr_db, target, measured=SENSITIVITY in state)
        warnings = (*self._unpredicted(figures, state), *low)
        result = Verification(figures, parity, departures, warnings, samples=samples)
        self._judge(result, both.in_half() if halves else (), halves=halves)
        for warning in warnings:
            ctx.log.warning("WARNING: %s", warning)
        return {VERIFICATION: result}

    def _unpredicted(self, figures: VerificationFigures, state: State) -> tuple[str, ...]:
        """Return a warning if samples are worse than `assign` predicted, which names the layers that lose most.

        An error of float arithmetic alone, as in a plan that leaves all layers in float, is none.
        """
        from intaglio.exporters.float_graph.agreement import TOLERANCE
        from intaglio.exporters.verify.advice import largest_losses

        predicted_db = figures.psnr_predicted_db
        by_chance = 2 * (figures.psnr_predicted_error_db or 0.0)
        allowed_db = max(self.predicted_db_tolerance, by_chance)
        rounding = self.half_tolerance if state[TARGET].float_type == "float16" else TOLERANCE
        exact = figures.sqnr_db >= -20 * math.log10(rounding)
        if predicted_db is None or exact or figures.psnr_db >= predicted_db - allowed_db:
            return ()
        known = PLAN in state and SENSITIVITY in state and WORKLOAD in state
        worst = largest_losses(state[SENSITIVITY], state[PLAN], state[WORKLOAD], state[TARGET]) if known else []
        found = f"the deployed samples have a PSNR of {figures.psnr_db:.1f} dB"
        return ("; ".join((f"{found}, where {predicted_db:.1f} dB were predicted", *worst)),)

    def _low(self, sqnr_db: float, target: Target, *, measured: bool) -> tuple[str, ...]:
        """Return a warning if the deployed samples are below the floor, which says what would raise their quality."""
        if sqnr_db >= self.floor_db:
            return ()
        cure = "let the steps sensitivity and assign choose formats: `intaglio init` writes them, with enough --minutes"
        if measured:
            scheme = "w8a16" if "w8a16" in target.formats["linear"] else "float"
            where = "sensitivity.schemes and assign.schemes"
            cure = f"allow more in assign.budget, list {scheme} in {where}, or set assign.budget.psnr"
        return (
            f"the deployed samples have an SQNR of {sqnr_db:.1f} dB, below the floor of {self.floor_db:g} dB"
            f" (verify.floor_db), so they differ much from the model's. To raise the quality, {cure}",
        )

    def _judge(self, result: Verification, half: Collection[str] = (), *, halves: bool = False) -> None:
        """Raise StepFailed that lists every layer and figure outside its tolerance.

        `half`: the layers that compute in float16; `halves`: True if operators between layers compute in float16.
        """
        problems = self._departed(result.figures, result.departures, halves=halves)
        tolerances = {name: self.half_tolerance if name in half else self.layer_tolerance for name in result.layers}
        problems += [
            f"{name}: relative L2 error {p.rel_l2:.2e} on the same input, tolerance {tolerances[name]:.0e}"
            for name, p in result.layers.items()
            if not p.rel_l2 <= tolerances[name]
        ]
        problems += [
            f"{name}: {p.codes_differing} of {p.codes} input codes differ, by at most {p.code_distance_max}"
            for name, p in result.layers.items()
            if p.codes_differing > max(1, self.code_tolerance * p.codes) or p.code_distance_max > 1
        ]
        if not math.isfinite(result.figures.parity_other_rel_l2 or 0.0):
            problems.append("the graph or its simulation returns NaN or Inf at the model's other size")
        gap, error = result.figures.fidelity_gap_db, result.figures.fidelity_gap_error_db
        if not abs(gap) - 2 * error <= self.gap_db_tolerance:
            problems.append(
                f"samples: simulated and deployed PSNR differ by {gap:.2f} dB, standard error {error:.2f} dB"
                f" ({self.gap_db_tolerance} allowed)"
            )
        if problems:
            raise StepFailed(*problems)

    def _departed(self, figures: DepartureFigures, departures: Mapping[str, Departure], *, halves: bool) -> list[str]:
        """Return a line for every layer that is wrong inside the graph, then for the first with a wrong input."""
        tolerance = BETWEEN_HALVES if halves else self.layer_tolerance
        allowed = f"tolerance {tolerance:.0e}"
        problems = [
            f"{name}: relative L2 error {d.own_rel_l2:.2e} inside the whole graph, compared with its simulation on the"
            f" same input, {allowed}"
            for name, d in departures.items()
            if not d.own_rel_l2 <= tolerance
        ]
        reached = {name: d.input_rel_l2 for name, d in departures.items()}
        reached["the output"] = figures.departure_output_rel_l2 or 0.0
        wrong = [(name, error) for name, error in reached.items() if not error <= tolerance]
        if wrong:
            name, error = wrong[0]
            place = "its value" if name == "the output" else "its input"
            problems.append(
                f"{name}: {place} in the whole graph differs by {error:.2e} (relative L2, {allowed}) from the"
                " simulation. The simulation used the graph's own outputs of all earlier layers, so the fault is in the"
                f" operators between the earlier layers and {name}. {len(wrong) - 1} later places are wrong too"
            )
        return problems


def _predicted_db(state: State) -> float | None:
    """Return the PSNR that `assign` predicted, with what training gained on samples of its own; None without `assign`.

    Training is not predicted: its gain is that of the samples by which `distill` chose the state that it kept.
    """
    if FRONT not in state:
        return None
    return state[FRONT].psnr_db(state[FRONT].chosen) + (state[ADAPTER].gain_db if ADAPTER in state else 0.0)


def _predicted_error_db(state: State, samples: Mapping[str, torch.Tensor], peak: float) -> float | None:
    """Return the standard error of predicted minus deployed PSNR in dB; None where it is not known."""
    from intaglio.pipeline.numerics import quality

    predicted_db = state[FRONT].drawn_error_db if FRONT in state else None
    errors = quality.mean_squared_error(samples["deployed"], samples["full_precision"])
    deployed_db = quality.standard_error(quality.psnr_db(errors, peak))
    return None if predicted_db is None or deployed_db is None else math.hypot(predicted_db, deployed_db)


def _log(figures: VerificationFigures, in_float: Mapping[str, str], quantized: int, ctx: Context) -> None:
    """Log the figures that a user looks at first, and the layers that stay in float."""
    ctx.log.info(
        "%d samples: PSNR %.2f dB (SQNR %.2f) deployed, %.2f dB (%.2f) simulated; gap known to %.2f dB; worst layer"
        " %.1e on the same input",
        figures.samples_drawn,
        figures.psnr_db,
        figures.sqnr_db,
        figures.psnr_simulated_db,
        figures.sqnr_simulated_db,
        figures.fidelity_gap_error_db,
        figures.parity_layer_rel_l2_max,
    )
    ctx.log.info(
        "cosine similarity to full precision: mean %.6f, worst %.6f; largest error of a value: %.4g",
        figures.cosine,
        figures.cosine_min,
        figures.error_max,
    )
    if figures.psnr_predicted_db is not None:
        error_db = figures.psnr_predicted_error_db
        known = "" if error_db is None else f", on other samples; difference known to {error_db:.2f} dB"
        ctx.log.info("predicted PSNR: %.2f dB%s", figures.psnr_predicted_db, known)
    if in_float:
        count = len(in_float)
        ctx.log.info("%d of %d layers stay in float: %s", count, count + quantized, _by_reason(in_float))


def layers_in_float(module: nn.Module, quantized: Collection[str], target: Target) -> dict[str, str]:
    """Return the reason, by layer name, for each linear layer and convolution that stays in float."""
    from torch.nn.modules.conv import _ConvNd

    from intaglio.pipeline.formats.layer import admitted_schemes, unfit
    from intaglio.pipeline.formats.schemes import FLOAT
    from intaglio.pipeline.model.layers import layer_table
    from intaglio.pipeline.model.prepared import unquantizable

    table = {layer.name: layer for layer in layer_table(module)}
    found, other = {}, unquantizable(module)
    for name, child in module.named_modules():
        if name in quantized or (name not in table and not isinstance(child, _ConvNd)):
            continue
        found[name] = f"{other.get(name, f'a {type(child).__name__} of its form')} cannot be quantized"
        if name in table:
            schemes = [s for s in admitted_schemes(table[name]) if s != FLOAT]
            reasons = [unfit(table[name], scheme, target) for scheme in schemes]
            refused = all(reasons) and (reasons[0] or "").removeprefix(f"{name}: ")
            found[name] = refused or "the plan leaves it in float"
    return found


def _by_reason(in_float: Mapping[str, str]) -> str:
    """Return each reason with the names of its layers; of a long list, only the first names."""
    names: dict[str, list[str]] = {}
    for name, reason in in_float.items():
        names.setdefault(reason, []).append(name)
    more = {reason: f" and {len(them) - LISTED} more" if len(them) > LISTED else "" for reason, them in names.items()}
    return "; ".join(f"{reason} ({', '.join(them[:LISTED])}{more[reason]})" for reason, them in names.items())


def _distances(samples: Mapping[str, torch.Tensor], peak: float, rounding: float = 0.0) -> SampleFigures:
    """Return the distances of simulated and deployed samples to those of full precision; `peak` is that of PSNRs.

    An error below `rounding`, relative to full precision, comes from the order of summation. If the errors of both
    implementations are below it, the gap is zero.
    """
    from intaglio.pipeline.artifacts.verification import SampleFigures
    from intaglio.pipeline.numerics import quality

    reference = samples["full_precision"]
    simulated, deployed = (quality.mean_squared_error(samples[name], reference) for name in ("simulated", "deployed"))
    floor = (rounding**2 * reference.flatten(1).square().mean(1)).clamp_min(quality.LEAST_MSE)
    gap = quality.decibels(deployed.maximum(floor) / simulated.maximum(floor))
    psnr_B, sqnr_B = quality.psnr_db(deployed, peak), quality.sqnr_db(deployed, reference)
    cosine_B = quality.cosine_similarity(samples["deployed"], reference)
    return SampleFigures(
        samples_drawn=len(reference),
        psnr_peak=peak,
        psnr_db=float(psnr_B.mean()),
        psnr_db_min=float(psnr_B.min()),
        psnr_simulated_db=float(quality.psnr_db(simulated, peak).mean()),
        sqnr_db=float(sqnr_B.mean()),
        sqnr_db_min=float(sqnr_B.min()),
        sqnr_simulated_db=float(quality.sqnr_db(simulated, reference).mean()),
        cosine=float(cosine_B.mean()),
        cosine_min=float(cosine_B.min()),
        error_max=float(quality.largest_error(samples["deployed"], reference).max()),
        fidelity_gap_db=float(gap.mean()),
        fidelity_gap_error_db=quality.standard_error(gap) or 0.0,
    )
