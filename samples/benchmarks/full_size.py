"""Measure the cost of compiling a full-size denoiser: seconds and peak memory of every step, and bytes of the results.

    python samples/benchmarks/full_size.py [dit-xl pixart-xl ...] [--json]

Weights and texts are random, so quality says nothing here; every layer is rounded to nearest, with the ranges of one
call, unless --updates trains blocks on it. Weights are in bfloat16, in shards of 2 GB that are made one after the
other. Each step runs in a process of its own on what the store has from the steps before. Two peaks are its own, the
interpreter and its libraries included: of what it allocates (RssAnon, every 20 ms), which has to fit the machine, and
with the mapped files (VmHWM), which the system drops when it needs the memory. `torch.onnx.export` alone is the
yardstick of export-float.
"""

import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from _full_size_models import MODELS, SIDE, TOKENS

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import ENGINE, FLOAT_GRAPH, GRAPH
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.memory import resident_bytes
from intaglio.pipeline.runs.runner import StepEvent

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
PLANS: Mapping[str, list[str]] = {
    "w8a8": ["w8a8_token", "w8a8o8_step", "w8a8_step"],
    "w4a8": ["w4a8_token", "w4a8o8_step", "w4a8_step", "w8a8_token", "w8a8o8_step", "w8a8_step"],
}
TARGETS = ("onnxruntime-cpu", "tensorrt-rtx")
CONDITIONS = "conditions.safetensors"


SHARD_BYTES = 2_000_000_000


Figures = dict[str, str | float]


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    plans: Annotated[str, typer.Option(help="which plans, of w8a8 and w4a8")] = "w8a8,w4a8",
    targets: Annotated[str, typer.Option(help="for which targets")] = ",".join(TARGETS),
    updates: Annotated[int, typer.Option(help="train each block with so many updates")] = 0,
    build: Annotated[bool, typer.Option(help="build TensorRT-RTX's engine too")] = False,
    yardstick: Annotated[bool, typer.Option(help="time torch.onnx.export alone too")] = True,
    work: Annotated[Path | None, typer.Option(help="a folder for checkpoints and store; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    with folder(work) as place:
        for model in models or MODELS:
            made = alone(watched, make_checkpoint, model, place / model / "checkpoint")
            size = made["float32_bytes"]
            if not as_json:
                print(
                    f"{model}: {size / 1e9:.2f} GB in float32, made with {made['anon_bytes'] / 1e9:.2f} GB", flush=True
                )
            rows = []
            wanted = plans.split(","), targets.split(","), updates
            for row in measure(place / model, *wanted, yardstick=yardstick, build=build):
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


def measure(
    place: Path, plans: list[str], targets: list[str], updates: int, *, yardstick: bool, build: bool
) -> Iterator[Figures]:
    """A row for each step, as it is done."""
    trained = {"scope": "block", "samples": 1, "drawn": 1, "enough_db": 200} if updates else {}
    first = (Step(uses="calibrate", options={"samples": 1}), Step(uses="export-float"))
    for count in (1, 2):
        yield {"step": first[count - 1].name, **alone(watched, last_step, place, first[:count], targets[0])}
    if yardstick:
        yield {"step": "torch.onnx.export", **alone(watched, bare_export, place)}
    for plan in plans:
        rest = (
            Step(uses="uniform", options={"schemes": PLANS[plan]}),
            Step(uses="distill", options={"updates": updates, "input_rate": 0, **trained}),
            Step(uses="merge"),
            Step(uses="export-qdq"),
        )
        for target in targets:
            here = (*rest, Step(uses="tensorrt")) if build and target == "tensorrt-rtx" else rest
            for count in range(1, len(here) + 1):
                found = alone(watched, last_step, place, first + here[:count], target)
                yield {"plan": plan, "target": target, "step": here[count - 1].name, **found}


def alone(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def watched(work: Callable[P, Figures], *args: P.args, **kwargs: P.kwargs) -> Figures:
    """Return what `work` returns, and the peaks of this process's memory and of the store in `args`, if any."""
    anon, disk, done = [0], [0], threading.Event()
    stores = [each / "store" for each in args if isinstance(each, Path)]

    def watch() -> None:
        for turn in itertools.count():
            anon[0] = max(anon[0], resident_bytes("RssAnon"))
            if turn % 20 == 0:
                disk[0] = max(disk[0], sum(map(bytes_below, stores)))
            if done.wait(0.02):
                return

    (watcher := threading.Thread(target=watch)).start()
    try:
        found = work(*args, **kwargs)
    finally:
        done.set()
        watcher.join()
    found |= {"most_disk_bytes": disk[0], "disk_bytes": sum(map(bytes_below, stores))}
    return {**found, "anon_bytes": anon[0], "peak_bytes": resident_bytes("VmHWM")}


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; another thread may be removing some of them."""
    total = 0
    for file in (Path(place, name) for place, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def spent(began: float) -> Figures:
    """Since `began`: seconds by the clock, and of the process's own, which other jobs on the machine do not stretch."""
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time()}


def make_checkpoint(model: str, checkpoint: Path) -> Figures:
    """Random weights as a diffusers folder, and what the denoiser takes beside sample and timestep, as recorded."""
    import accelerate
    import diffusers
    import torch

    from intaglio.pipeline.model.recording import Recording

    torch.manual_seed(0)
    wanted = MODELS[model]
    with accelerate.init_empty_weights():
        module = getattr(diffusers, wanted.kind)(**wanted.config)
    if not checkpoint.exists():
        module.save_config(checkpoint / wanted.folder)
        write_shards(module.state_dict(), checkpoint / wanted.folder)
        getattr(diffusers, wanted.scheduler)().save_pretrained(checkpoint / "scheduler")
        if wanted.texts:
            texts = {name: torch.randn(2, *shape) for name, shape in wanted.texts.items()}
            scale, shared = wanted.timestep_scale, coordinates(wanted.places)
            recording = Recording(
                wanted.sample_shape, scale, conditions=texts, shared=shared, constants=wanted.constants
            )
            recording.save(checkpoint / CONDITIONS)
    return {"float32_bytes": 4 * sum(tensor.numel() for tensor in module.state_dict().values())}


def coordinates(axes: int) -> Mapping[str, "torch.Tensor"]:
    """Coordinates of the tokens of image and text, (tokens, axes); none for 0 axes."""
    import torch

    if not axes:
        return {}
    image = torch.zeros(SIDE, SIDE, axes)
    image[..., 1] = torch.arange(SIDE)[:, None]
    image[..., 2] = torch.arange(SIDE)[None]
    return {"img_ids": image.reshape(-1, axes), "txt_ids": torch.zeros(TOKENS, axes)}


def write_shards(state: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    """Write random weights in bfloat16 for a state on the meta device; buffers are written as they are."""
    from intaglio.pipeline.stored_tensors import save_tensors

    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in state.items():
        if (room := room - 2 * tensor.numel()) < 0:
            shards.append([])
            room = SHARD_BYTES - 2 * tensor.numel()
        shards[-1].append(name)
    placed = {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        save_tensors(folder / file, ((name, random_weight(state[name])) for name in names))
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(empty: "torch.Tensor") -> "torch.Tensor":
    """A weight (N, ...) such as training begins with, a norm's ones or a bias; a tensor with values keeps them."""
    import torch

    if not empty.is_meta:
        return empty.bfloat16() if empty.is_floating_point() else empty
    if empty.ndim < 2:
        return torch.rand(empty.shape).add_(0.5).bfloat16()
    return torch.randn(empty.shape, dtype=torch.bfloat16).mul_(empty[0].numel() ** -0.5)


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
        figures |= {"int8": engine.low_precision_products or 0, "floating": engine.float_products or 0}
    return figures


def line(row: Figures, model_bytes: float) -> str:
    """For people."""
    text = f"  {' '.join(str(row[k]) for k in ('plan', 'target', 'step') if k in row):35}"
    if "seconds" in row:
        text += (
            f" {row['seconds']:7.1f} s, {row['cpu_seconds']:6.1f} s of CPU, allocated {row['anon_bytes'] / 1e9:5.2f} GB"
            f" = {row['anon_bytes'] / model_bytes:.2f} of the model, with files {row['peak_bytes'] / 1e9:5.2f} GB,"
            f" disk at most {row['most_disk_bytes'] / 1e9:5.2f} GB, then {row['disk_bytes'] / 1e9:5.2f} GB"
        )
    else:
        text += " was in the store"
    text += f", {row['file_bytes'] / 1e6:.0f} MB" if "file_bytes" in row else ""
    return text + (f", {row['int8']} products on integers, {row['floating']} not" if "int8" in row else "")


if __name__ == "__main__":
    typer.run(main)
