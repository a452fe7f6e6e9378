"""Does every family compile? Tiny denoisers with random weights through the whole compiler, in W8A8 and balanced W4A8.

    python samples/benchmarks/families.py [flux sd3 ...] [--json]
    python samples/benchmarks/families.py --all [hidream ...] [--list]    # every denoiser class of diffusers, in W8A8

For each: the float graph against torch; every quantized layer of the graph alone against its simulation, in the forms
for ONNX Runtime and for TensorRT-RTX; the whole graph against the whole simulation; all of it at a second size where
the family has one. Then TensorRT-RTX builds the engine, and says how many products it executes on integers.

With `--all`, each line is a denoiser class that diffusers exports: what its tiny models gave for ONNX Runtime, or the
reason why there is nothing. `--list` runs nothing; families that are named are run alone.
"""

import inspect
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import typer
from _clip_families import CLIPS
from _other_families import OTHERS
from _rare_families import RARE
from _rarest_families import RAREST
from pydantic import Field
from rich.progress import track
from tiny_families import FAMILIES, NEWER

from intaglio import Context, Outputs, Pass, Recipe, State, Store, compile
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH, MODEL, PLAN, TARGET, TRAJECTORY, VERIFICATION
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import illegal, structural_schemes
from intaglio.pipeline.model.calls import denoise_with, other_call
from intaglio.pipeline.model.form_search import formed
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.runs.runner import CompiledTarget

PLANS = {"w8a8": ("w8a8_token", "w8a8_step"), "w4a8": ("w4a8_token", "w4a8_step", "w8a8_token", "w8a8_step")}
"""Schemes of each plan: every layer gets the first of them that it admits."""
ORT, RTX = "onnxruntime-cpu", "tensorrt-rtx"
STEPS = 2
"""Steps of the sampler."""
ALL = {**FAMILIES, **NEWER, **OTHERS, **RARE, **RAREST, **CLIPS}
EVERY: Mapping[str, Sequence[str]] = dict.fromkeys(PLANS, (ORT, RTX))


PACKED = "it takes one sequence for all rows, with tables of where each token is"
NO_FAMILY = {
    "AnyFlowFARTransformer3DModel": "it keeps keys and values of earlier frames from call to call",
    "Cosmos3OmniTransformer": PACKED,
    "DreamLiteTransformer2DModel": "part of DreamLiteUNetModel",
    "MiniMaxH3Transformer3DModel": PACKED,
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder: it takes no timestep",
    "MotionAdapter": "weights for a UNet: it cannot be called",
    "RFD4ProteinaTransformer": "two schedulers move two samples at once",
    "TransformerTemporalModel": "part of UNets: it takes no timestep of its own",
    "UVit2DModel": "its samples are tokens of a codebook: no noise is added to them",
    "WanAnimate2Transformer3DModel": "it keeps keys and values of earlier frames from call to call",
}
"""Classes of diffusers that are no denoisers here, and the reason."""


class Uniform(Pass):
    """Every layer that is called has the first of the schemes that its shape and the target admit."""

    name = "uniform"
    requires = frozenset({MODEL, TARGET, TRAJECTORY})
    provides = frozenset({PLAN})
    schemes: tuple[str, ...] = Field(description="names of schemes, the preferred first")

    def run(self, state: State, ctx: Context) -> Outputs:
        layers = layer_table(state[MODEL].open().module)
        chosen = {}
        for layer in layers:
            float_, *quantized = structural_schemes(layer, (32, 64), self.schemes)
            legal = [s for s in quantized if illegal(layer, s, state[TARGET]) is None]
            called = layer.name in state[TRAJECTORY].amax
            chosen[layer.name] = min(legal, key=lambda s: self.schemes.index(s.name)) if called and legal else float_
        return {PLAN: QuantPlan(layers, chosen)}


@dataclass(frozen=True)
class PlanFigures:
    """Results of a plan: relative L2 errors to the simulation, and the engine's products on integers and in float.

    `folded` counts those of the `balanced` layers whose channel scales are in the operators before them.
    """

    layers: int
    four_bit: int
    worst_layer: float
    whole: float
    int8: int | None
    floating: int | None
    balanced: int
    folded: int


@dataclass(frozen=True)
class Row:
    """A family: relative L2 error of its float graph to torch, the sizes of its dynamic axes, and its plans."""

    family: str
    dynamic: Mapping[str, tuple[int, int]]
    float_error: float
    plans: Mapping[str, PlanFigures]


def measure(family: str, store: Store, forms: Mapping[str, Sequence[str]] = EVERY) -> Row:
    """`forms` are the targets of each plan; engines are TensorRT-RTX's.

    Raises what the compiler raises where a layer is not what was simulated, or a graph not what torch computes.
    """
    plans = {}
    for plan, targets in forms.items():
        compiled = compile(recipe(family, plan, targets), store, base=Path(__file__).parent)
        one, checks = compiled[targets[0]], [done[VERIFICATION].figures for done in compiled.values()]
        engine = compiled[RTX][ENGINE] if RTX in targets else None
        plans[plan] = PlanFigures(
            layers=len(one[GRAPH].nodes),
            worst_layer=max(figures.parity_layer_rel_l2_max for figures in checks),
            whole=max(max(figures.parity_rel_l2, figures.parity_other_rel_l2 or 0.0) for figures in checks),
            four_bit=sum(scheme.weight_bits == 4 for scheme in one[PLAN].schemes.values()),
            int8=None if engine is None else engine.low_precision_products,
            floating=None if engine is None else engine.float_products,
            balanced=len(one[PLAN].balances),
            folded=sum(map(one[GRAPH].is_folded, one[PLAN].balances)),
        )
    return Row(family, one[FLOAT_GRAPH].sizes, float_error(family, one), plans)


def recipe(family: str, plan: str, targets: Sequence[str]) -> Recipe:
    """Two steps of the sampler, weights rounded to nearest, and no judgement of pictures that random weights draw.

    Layers with 4-bit weights are balanced.
    """
    steps = [
        {"calibrate": {"samples": 2}},
        {"uses": "./families.py:Uniform", "options": {"schemes": list(PLANS[plan])}},
        *([{"balance": {"steps": 1, "rows": 2, "gain_db": 0}}] if plan == "w4a8" else []),
        {"distill": {"updates": 0}},
        "merge",
        "export-float",
        "export-qdq",
        "onnxruntime",
        {"tensorrt": {"compute_capabilities": ["SM86"]}},
        {"verify": {"samples": 1, "gap_db_tolerance": 1e3}},
    ]
    model = {"path": f"./{Path(inspect.getfile(ALL[family])).name}:{family}", "sampling_steps": STEPS, "guidance": 2.0}
    return Recipe.model_validate({"model": model, "targets": list(targets), "steps": steps})


def float_error(family: str, compiled: CompiledTarget) -> float:
    """The larger of those at the two sizes."""
    model, call = formed(ALL[family](), STEPS), compiled[TRAJECTORY].call(0)
    module, graph = denoise_with(model.module, model, whole=True), graph_denoise(compiled[FLOAT_GRAPH], OnnxRuntime())
    errors = []
    for inputs in filter(None, (call, other_call(model, call))):
        with torch.no_grad():
            expected = module(inputs)
        errors.append(float((graph(inputs) - expected).norm() / expected.norm()))
    return max(errors)


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    head = ["family", "axes that vary", "float", *(f"{p.upper()}: worst layer, whole" for p in PLANS)]
    head += [*(f"{p.upper()}: INT8 products" for p in PLANS), "scales folded"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        errors = [f"{p.worst_layer:.0e}, {p.whole:.0e}" for p in row.plans.values()]
        products = [f"{p.int8} of {p.layers}" for p in row.plans.values()]
        folded = [f"{p.folded} of {p.balanced}" for p in row.plans.values() if p.balanced]
        lines.append([row.family, str(1 + len(row.dynamic)), f"{row.float_error:.0e}", *errors, *products, *folded])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def denoiser_classes() -> dict[str, type[torch.nn.Module]]:
    """Return the classes that diffusers exports as transformers and UNets, by name."""
    found = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
            continue
        inside = kind.__module__.startswith(("diffusers.models.transformers", "diffusers.models.unets"))
        if inside or (".pipelines." in kind.__module__ and ("UNet" in name or "Transformer" in name)):
            found[name] = kind
    return found


def every_class(store: Store, only: Collection[str], *, run: bool) -> Iterator[str]:
    """Yield the table of all denoiser classes line by line. Without `run`, families are named and not compiled.

    The table has the families in `only` alone; all classes if it is empty.
    """
    classes, families = denoiser_classes(), dict[str, list[str]]()
    for family, make in ALL.items():
        kinds = (type(part).__name__ for part in make().module.modules())
        if (kind := next((kind for kind in kinds if kind in classes), None)) is not None:
            families.setdefault(kind, []).append(family)
    yield "| class | family | result |\n|---|---|---|"
    for name, kind in classes.items():
        if name not in families and not only:
            taken = list(inspect.signature(kind.forward).parameters)[1:5]
            untried = f"not tried: no tiny model here; it is called with {', '.join(taken)}, ..."
            yield f"| {name} | | {NO_FAMILY.get(name, untried)} |"
        for family in families.get(name, ()):
            if only and family not in only:
                continue
            yield f"| {name} | {family} | {outcome(family, store) if run else ''} |"


def outcome(family: str, store: Store) -> str:
    """Compile a family in W8A8 for ONNX Runtime. Return its figures, or the reason why it does not compile."""
    try:
        row = measure(family, store, {"w8a8": [ORT]})
    except Exception as error:  # whatever ends the run is the reason
        reason = " ".join(str(error).split()).replace("|", "/")[:300]
        return f"{type(error).__name__}: {reason}"
    plan = row.plans["w8a8"]
    return f"{plan.layers} layers, worst {plan.worst_layer:.0e}, whole {plan.whole:.0e}, float {row.float_error:.0e}"


def main(
    families: Annotated[list[str] | None, typer.Argument(help="all if none is named")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every denoiser class of diffusers, or the reason")] = False,
    listed: Annotated[bool, typer.Option("--list", help="with --all: run nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if everything:
            for line in every_class(Store(Path(folder)), families or (), run=not listed):
                print(line, flush=True)
            return
        store = Store(Path(folder))
        rows = [measure(name, store) for name in track(families or [*FAMILIES, *NEWER], "families", disable=as_json)]
    print(json.dumps([asdict(row) for row in rows]) if as_json else table(rows))


if __name__ == "__main__":
    typer.run(main)
