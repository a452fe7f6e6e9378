"""Write the report, a page for people and figures for programs, from the measurements of the other passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.exporters.report import figures as figures
from intaglio.exporters.report.curves import is_trajectory
from intaglio.exporters.report.grids import CurveFigure, Drawn, SampleFigure, laid_out
from intaglio.exporters.report.page import render
from intaglio.exporters.report.pictures import picture, png
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    ENGINE,
    FRONT,
    GRAPH,
    LATENCY,
    LINT,
    MODEL,
    PLAN,
    PROVENANCE,
    REPORT,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.artifacts.verification import Latency, Report, VerificationFigures, dotted
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.errors import StoreError
from intaglio.pipeline.files import parse_json
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.numerics.quality import mean_squared_error, psnr_db, sqnr_db
from intaglio.pipeline.runs.registry import find_runtime
from intaglio.pipeline.runs.versions import find_version

if TYPE_CHECKING:
    import torch

MEASURED = (
    "samples_drawn",
    "psnr_db",
    "psnr_db_min",
    "psnr_simulated_db",
    "psnr_predicted_db",
    "psnr_predicted_error_db",
    "psnr_peak",
    "fidelity_gap_db",
    "fidelity_gap_error_db",
    "sqnr_db",
    "sqnr_db_min",
    "sqnr_simulated_db",
    "cosine",
    "cosine_min",
    "error_max",
    "parity_layer_rel_l2_max",
    "parity_rel_l2",
)
"""Figures of the verification that metrics.json has under the same names, in this order."""


class WriteReport(Pass):
    """Writes the report: one HTML file that needs no network and no other file, and metrics.json."""

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 13
    requires = frozenset({MODEL, TARGET, PLAN, GRAPH})
    wants = frozenset({ENGINE, VERIFICATION, LATENCY, SENSITIVITY, FRONT, ADAPTER, LINT, PROVENANCE})
    provides = frozenset({REPORT})
    needs: ClassVar[tuple[str, ...]] = ("diffusers", "intaglio", "onnx", "torch")  # the page names their versions

    samples: int = Field(16, ge=1, le=64, description="largest number of samples that are shown")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Write all measurements. A figure that was not measured is a dash on the page, and null in metrics."""
        model, target, plan = state[MODEL], state[TARGET], state[PLAN]
        verification = state.find(VERIFICATION)
        drawn = {} if verification is None else verification.samples
        parity = {} if verification is None else verification.layers
        measured = None if verification is None else verification.figures
        warnings = () if verification is None else verification.warnings
        latency = state.find(LATENCY)
        engine = state[ENGINE] if ENGINE in state else Engine(target.runtime, "not built yet", None, None)
        metrics = {"model": model.name, "target": target.name} | collect_metrics(
            plan, state[GRAPH], engine, measured, latency
        )
        metrics["warnings"] = list(warnings)
        html = render(
            "report.html.j2",
            model=metrics["model"],
            sampling=model.ref,
            target=target,
            graph=state[GRAPH],
            engine=engine,
            parity=parity,
            departures={} if verification is None else verification.departures,
            metrics=metrics,
            warnings=warnings,
            flat_metrics={name: json.dumps(entry) for name, entry in dotted(metrics)},
            plan=plan,
            schemes=figures.scheme_rows(plan),
            in_float=figures.float_rows(plan, target),
            bit_maps=figures.bit_maps(plan),
            gain_maps=figures.gain_maps(plan, state[GRAPH]),
            folded=sum(state[GRAPH].is_folded(name) for name in plan.balances),
            heat=figures.heat_map(state[SENSITIVITY], plan) if SENSITIVITY in state else None,
            front=figures.front_figure(state[FRONT]) if FRONT in state else None,
            curve=figures.curve(state[ADAPTER].loss if ADAPTER in state else ()),
            drawn=figures.drawn_figure(state[ADAPTER]) if ADAPTER in state else None,
            samples=_comparison(drawn, self.samples),
            strip=None if measured is None else figures.strip(*_decibels(drawn, measured.psnr_peak)),
            parity_shares=figures.log_shares({name: layer.rel_l2 for name, layer in parity.items()}),
            lint=state.find(LINT),
            origin=_origin(state[PROVENANCE]) if PROVENANCE in state else None,
            sizes=_sizes(state[GRAPH], engine, measured),
            latency=latency,
            latencies=() if latency is None else _latencies(latency),
            runs_engine=not find_runtime(engine.runtime).runs_graph,
            versions={name: find_version(name) or "not installed" for name in self.needs},
        )
        ctx.log.info("report of %d layers, %s", len(plan.layers), figures.size(len(html.encode())))
        return {REPORT: Report(html, metrics, _picture(drawn, 8))}


def collect_metrics(
    plan: QuantPlan,
    graph: Graph,
    engine: Engine,
    figures: VerificationFigures | None = None,
    latency: Latency | None = None,
) -> dict[str, object]:
    """Return the metrics of one target; None where a figure was not measured or is not finite.

    Both ratios are full precision over compiled: above one, the compiled graph is smaller, or faster.
    """
    measured: dict[str, float | None] = {} if figures is None else asdict(figures)
    fp16_bytes = None if figures is None else figures.fp16_bytes
    return {
        "layers_total": len(plan.layers),
        "layers_quantized": plan.quantized,
        "weight_bits_mean": plan.weight_bits_mean,
        "size_bytes": graph.size_bytes,
        "size_ratio_fp16": _finite(fp16_bytes / graph.size_bytes if fp16_bytes and graph.size_bytes else None),
        "latency_ms": None if latency is None else latency.compiled_ms,
        "latency_fp32_ms": None if latency is None else latency.float32_ms,
        "latency_ratio_fp32": None if latency is None else latency.float32_ms / latency.compiled_ms,
        **{name: _finite(measured.get(name)) for name in MEASURED},
        "engine": {
            "path": "model.onnx" if engine.plan is None else "engine.plan",
            "runtime": engine.runtime,
            "version": engine.version,
            "bytes": graph.size_bytes if engine.plan is None else len(engine.plan),
            "low_precision_products": engine.low_precision_products,
            "float_products": engine.float_products,
        },
    }


def metrics_of_files(folder: Path) -> dict[str, object]:
    """Return the metrics of a compiled folder without a report, as far as its other files have them.

    Raises RecipeError for damaged files.
    """
    found: dict[str, object] = {"target": folder.resolve().name}
    there = {name: (folder / name).exists() for name in ("plan.json", "graph.json", "engine.json")}
    if there["plan.json"] and there["graph.json"]:
        runtime = "" if found["target"] not in target_names() else load_target(str(found["target"])).runtime
        engine = Engine.load(folder) if there["engine.json"] else Engine(runtime, "not built yet", None, None)
        whole = collect_metrics(QuantPlan.load(folder), Graph.load(folder), engine)
        found |= {name: entry for name, entry in whole.items() if entry is not None}
    return found


_IMPLEMENTATIONS = {
    "full_precision": ("Full precision", "the model as it was given"),
    "simulated": ("Simulated", "its quantization, in PyTorch"),
    "deployed": ("Deployed", "the ONNX graph, as verify executed it"),
}


def _comparison(samples: Mapping[str, torch.Tensor], count: int) -> SampleFigure | CurveFigure | None:
    drawn = {key: Drawn(*about, samples[key]) for key, about in _IMPLEMENTATIONS.items() if key in samples}
    pairs = [pair for pair in (("full_precision", "deployed"), ("simulated", "deployed")) if {*pair} <= drawn.keys()]
    return laid_out(drawn, pairs, count)


def _decibels(
    samples: Mapping[str, torch.Tensor], peak: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the PSNR and the SQNR of each sample to full precision in dB, by the implementation's title."""
    psnr: dict[str, list[float]] = {}
    sqnr: dict[str, list[float]] = {}
    reference = samples.get("full_precision")
    for key, (title, _) in _IMPLEMENTATIONS.items():
        if reference is not None and key in samples and key != "full_precision":
            mse_B = mean_squared_error(samples[key], reference)
            psnr[title], sqnr[title] = psnr_db(mse_B, peak).tolist(), sqnr_db(mse_B, reference).tolist()
    return psnr, sqnr


def _picture(samples: Mapping[str, torch.Tensor], count: int) -> bytes | None:
    """Return a PNG file of the first `count` samples in full precision, with the deployed ones below.

    None where samples are neither images nor trajectories.
    """
    found = [samples[key][:count].float() for key in ("full_precision", "deployed") if key in samples]
    if not found or any(x.ndim != 4 and not is_trajectory(x.shape[1:]) for x in found):
        return None
    return png(picture(found, columns=count))


@dataclass(frozen=True)
class PastStep:
    """One step before the report: its time and memory as text, and the digests of its outputs by key."""

    name: str
    pass_version: str
    took: str
    held: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """The command, the recipe and the artifacts from which the page can be made again."""

    command: str
    recipe: str
    model: str
    seed: int
    start: list[tuple[str, str]]
    steps: tuple[PastStep, ...]


def _origin(provenance: Provenance) -> Origin:
    steps = tuple(
        PastStep(
            run.step,
            _pass_of(run),
            f"{run.seconds:,.1f} s",
            figures.size(run.peak_bytes),
            run.outputs,
        )
        for run in provenance.runs
    )
    start = [(f"{key}, sha256", digest) for key, digest in provenance.start.items()]
    recipe = provenance.recipe
    return Origin("intaglio run recipe.yaml", recipe.to_yaml(), recipe.model.path, recipe.seed, start, steps)


def _pass_of(run: RunRecord) -> str:
    """Return `module:Class@version` of the step's pass."""
    match parse_json(run.ingredients, source=f"the record of {run.step}", error=StoreError):
        case {"pass": str(name)}:
            return name
    return run.origin


@dataclass(frozen=True)
class Bar:
    """An amount with its label, its share of the largest amount, and its ratio to the first one."""

    label: str
    amount: str
    share: float
    ratio: str


def _sizes(graph: Graph, engine: Engine, measured: VerificationFigures | None) -> tuple[Bar, ...]:
    fp16_bytes = None if measured is None else measured.fp16_bytes
    amounts = {"weights in float16": fp16_bytes, "model.onnx": float(graph.size_bytes)}
    if engine.plan is not None:
        amounts["engine.plan"] = float(len(engine.plan))
    return _bars(amounts, figures.size)


def _latencies(latency: Latency) -> tuple[Bar, ...]:
    amounts = {"float32 graph": latency.float32_ms, "deployed graph": latency.compiled_ms}
    return _bars(amounts, lambda latency_ms: f"{figures.number(latency_ms)} ms")


def _bars(amounts: Mapping[str, float | None], text: Callable[[float], str]) -> tuple[Bar, ...]:
    """Return a bar for each amount that is known. Ratios are relative to the first of all amounts, if it is known."""
    known = {label: amount for label, amount in amounts.items() if amount is not None}
    largest, first = max(known.values(), default=0.0), next(iter(amounts.values()))
    return tuple(
        Bar(label, text(amount), amount / largest, figures.number(amount / first if first else None))
        for label, amount in known.items()
    )


def _finite(quantity: float | None) -> float | None:
    return quantity if quantity is not None and math.isfinite(quantity) else None
