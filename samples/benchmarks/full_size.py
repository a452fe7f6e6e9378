"""Measure the cost of compiling a full-size denoiser: seconds and peak memory of every step, and bytes of the results.

    python samples/benchmarks/full_size.py [dit-xl pixart-xl ...] [--json]

Weights and texts are random, so quality says nothing here; every layer is rounded to nearest, with the ranges of one
call. Each step runs in a process of its own on what the store has from the steps before, so that the peak (VmHWM) is
its own, the interpreter and its libraries included. `torch.onnx.export` alone is the yardstick of export-float.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.memory import resident_bytes
from intaglio.pipeline.runs.runner import StepEvent

P = ParamSpec("P")
R = TypeVar("R")
PLANS: Mapping[str, list[str]] = {
    "w8a8": ["w8a8_token", "w8a8o8_step", "w8a8_step"],
    "w4a8": ["w4a8_token", "w4a8o8_step", "w4a8_step", "w8a8_token", "w8a8o8_step", "w8a8_step"],
}
TARGETS = ("onnxruntime-cpu", "tensorrt-rtx")
CONDITIONS = "conditions.safetensors"


@dataclass(frozen=True)
class Denoiser:
    """A class of diffusers with its configuration, what it takes beside sample and timestep, and its sampler's class.

    Shapes are those of one row.
    """

    folder: str
    kind: str
    config: Mapping[str, int | tuple[int, ...]]
    sample_shape: tuple[int, ...]
    texts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"


TOKENS = 77
"""Tokens of one text."""
MODELS: Mapping[str, Denoiser] = {
    # 256 x 256; 750 M parameters, as diffusers has an embedder in every block
    "dit-xl": Denoiser(
        "transformer",
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        (4, 32, 32),
    ),
    # 512 x 512; 611 M
    "pixart-xl": Denoiser(
        "transformer",
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096},
        (4, 64, 64),
        {"encoder_hidden_states": (TOKENS, 4096)},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    # 512 x 512; 860 M
    "sd15-unet": Denoiser(
        "unet",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        (4, 64, 64),
        {"encoder_hidden_states": (TOKENS, 768)},
    ),
    # 512 x 512; 2.1 G, of which 0.06 G are its table of positions
    "sd3": Denoiser(
        "transformer",
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        (16, 64, 64),
        {"encoder_hidden_states": (TOKENS, 4096), "pooled_projections": (2048,)},
        scheduler="FlowMatchEulerDiscreteScheduler",
    ),
}


Figures = dict[str, str | float]


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    plans: Annotated[str, typer.Option(help="which plans, of w8a8 and w4a8")] = "w8a8,w4a8",
    targets: Annotated[str, typer.Option(help="for which targets")] = ",".join(TARGETS),
    build: Annotated[bool, typer.Option(help="build TensorRT-RTX's engine too")] = False,
    yardstick: Annotated[bool, typer.Option(help="time torch.onnx.export alone too")] = True,
    work: Annotated[Path | None, typer.Option(help="a folder for checkpoints and store; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    with folder(work) as place:
        for model in models or MODELS:
            size = alone(make_checkpoint, model, place / model / "checkpoint")["float32_bytes"]
            if not as_json:
                print(f"{model}: {size / 1e9:.2f} GB in float32", flush=True)
            rows = []
            for row in measure(place / model, plans.split(","), targets.split(","), yardstick=yardstick, build=build):
                rows.append(row)
                if not as_json:
                    print(line(row, size), flush=True)
            if as_json:
                print(json.dumps({"model": model, "float32_bytes": size, "steps": rows}), flush=True)


@contextmanager
def folder(work: Path | None) -> Iterator[Path]:
    """`work`, or one that is removed afterwards."""
    if work is not None:
        yield work.resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def measure(place: Path, plans: list[str], targets: list[str], *, yardstick: bool, build: bool) -> Iterator[Figures]:
    """A row for each step, as it is done."""
    first = (Step(uses="calibrate", options={"samples": 1}), Step(uses="export-float"))
    for count in (1, 2):
        yield {"step": first[count - 1].name, **alone(last_step, place, first[:count], targets[0])}
    if yardstick:
        yield {"step": "torch.onnx.export", **alone(bare_export, place)}
    for plan in plans:
        rest = (
            Step(uses="uniform", options={"schemes": PLANS[plan]}),
            Step(uses="distill", options={"updates": 0, "input_rate": 0}),
            Step(uses="merge"),
            Step(uses="export-qdq"),
        )
        for target in targets:
            here = (*rest, Step(uses="tensorrt")) if build and target == "tensorrt-rtx" else rest
            for count in range(1, len(here) + 1):
                found = alone(last_step, place, first + here[:count], target)
                yield {"plan": plan, "target": target, "step": here[count - 1].name, **found}


def alone(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def spent(began: float) -> Figures:
    """Since `began`: seconds by the clock, and of the process's own, which other jobs on the machine do not stretch."""
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time(),
        "peak_bytes": resident_bytes("VmHWM"),  # mapped files included
    }


def make_checkpoint(model: str, checkpoint: Path) -> dict[str, float]:
    """Random weights as a diffusers folder, and what the denoiser takes beside sample and timestep, as recorded."""
    import diffusers
    import torch

    from intaglio.pipeline.model.recording import Recording

    torch.manual_seed(0)
    wanted = MODELS[model]
    if not checkpoint.exists():
        module = getattr(diffusers, wanted.kind)(**wanted.config)
        module.save_pretrained(checkpoint / wanted.folder, max_shard_size="100GB")
        getattr(diffusers, wanted.scheduler)().save_pretrained(checkpoint / "scheduler")
        if wanted.texts:
            texts = {name: torch.randn(2, *shape) for name, shape in wanted.texts.items()}
            recording = Recording(wanted.sample_shape, conditions=texts, constants=wanted.constants)
            recording.save(checkpoint / CONDITIONS)
    size = sum(file.stat().st_size for file in (checkpoint / wanted.folder).glob("*.safetensors"))
    return {"float32_bytes": size}


def model_ref(place: Path) -> ModelRef:
    """The model in `place`, sampled in one step."""
    conditions = place / "checkpoint" / CONDITIONS
    recorded = str(conditions) if conditions.exists() else None
    return ModelRef(path=str(place / "checkpoint"), sampling_steps=1, conditions=recorded)


def bare_export(place: Path) -> Figures:
    """`torch.onnx.export` with its own optimizer, from the files of the model to those of the graph."""
    import torch

    from intaglio.pipeline.model.sampler import Sampler

    began = time.perf_counter()
    model = Checkpoint.resolve(model_ref(place), Path()).open()
    sampler = Sampler(model, 1, 1.0)
    start = sampler.start(2, torch.Generator().manual_seed(0))
    call = sampler.rows(start.noise, torch.tensor(1), start)
    with torch.no_grad():
        program = torch.onnx.export(
            model.module,
            kwargs={name: value.contiguous() for name, value in call.items()} | dict(model.constants),
            dynamo=True,
            opset_version=21,
            # the constants of MODELS are None throughout, as their axes are here
            dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC} for name in call} | dict(model.constants),
            verbose=False,
        )
    (place / "bare").mkdir(exist_ok=True)
    program.save(place / "bare" / "model.onnx", external_data=True)
    return spent(began)


def last_step(place: Path, steps: tuple[Step, ...], target: str) -> Figures:
    """The last of `steps`; those before it are in the store. No figures where the last one is, too."""
    recipe = Recipe(model=model_ref(place), targets=(target,), steps=steps)
    told: list[StepEvent] = []
    began = time.perf_counter()
    done = compile(recipe, Store(place / "store"), base=Path(__file__).parent, on_step=told.append)[target]
    figures = {} if told[-1].status == "hit" else spent(began)
    if (made := {"export-float": FLOAT_GRAPH, "export-qdq": GRAPH}.get(steps[-1].name)) is not None:
        figures["file_bytes"] = done[made].size_bytes
    if steps[-1].name == "tensorrt":
        engine = done[ENGINE]
        figures["file_bytes"] = len(engine.plan or b"")
        figures |= {"int8": engine.int8_gemm or 0, "floating": engine.fp_gemm or 0}
    return figures


def line(row: Figures, model_bytes: float) -> str:
    """For people."""
    text = f"  {' '.join(str(row[k]) for k in ('plan', 'target', 'step') if k in row):35}"
    if "seconds" in row:
        text += (
            f" {row['seconds']:7.1f} s, {row['cpu_seconds']:6.1f} s of CPU, peak {row['peak_bytes'] / 1e9:5.2f} GB"
            f" = {row['peak_bytes'] / model_bytes:.2f} of the model"
        )
    else:
        text += " was in the store"
    text += f", {row['file_bytes'] / 1e6:.0f} MB" if "file_bytes" in row else ""
    return text + (f", {row['int8']} products on integers, {row['floating']} not" if "int8" in row else "")


if __name__ == "__main__":
    typer.run(main)
