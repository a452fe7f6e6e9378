"""Draws pictures with the compiled emoji-dit in diffusers' own DiTPipeline, beside full precision from the same noise.

    python samples/draw.py --out draw.png

The recipe is compiled for ONNX Runtime first, or taken from the store. Then three denoisers draw by turns, each in the
place of the pipeline's own: the model in torch, its float32 graph and the compiled graph in ONNX Runtime. Pictures are
drawn without guidance, as the pipeline knows the null class of ImageNet alone.
"""

import json
import logging
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from diffusers import DiTPipeline
from rich.progress import track

import intaglio
from intaglio import Recipe, Store, compile
from intaglio.exporters.report.pictures import COMPILED, FULL, distances, save_picture
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL
from intaglio.pipeline.runs.runner import CompiledTarget

TARGET = "onnxruntime-cpu"


class Pixels:
    """Stand in for the autoencoder of a pipeline whose denoiser draws pixels: decoding returns the picture as it is."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=x)


def compiled(recipe_path: Path, store: Path) -> CompiledTarget:
    """The recipe for ONNX Runtime alone."""
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("intaglio").setLevel(logging.INFO)
    recipe = Recipe.read(recipe_path).model_copy(update={"targets": (TARGET,)})
    return compile(recipe, Store(store), base=recipe_path.parent)[TARGET]


def drawn(pipe: DiTPipeline, labels: list[int], steps: int, seed: int) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():  # the pipeline gives its scheduler no generator
        torch.manual_seed(seed)
        images = pipe(
            labels, guidance_scale=1.0, num_inference_steps=steps, generator=generator, output_type="pt"
        ).images
    return 2 * images - 1


def main(
    recipe: Annotated[Path, typer.Option(help="of a DiT with classes")] = Path(__file__).parent / "emoji-dit.yaml",
    out: Annotated[Path, typer.Option(help="the picture: full precision above, compiled below")] = Path("draw.png"),
    store: Annotated[Path, typer.Option(help="where finished steps are kept")] = Path(".intaglio/store"),
    samples: int = 16,
    seed: int = 0,
    rounds: Annotated[int, typer.Option(help="trajectories of each denoiser, by turns")] = 3,
    threads: Annotated[int, typer.Option(help="of torch and of ONNX Runtime")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    torch.set_num_threads(threads)
    made = compiled(recipe, store)
    checkpoint = made[MODEL]
    model, steps = checkpoint.open(), checkpoint.ref.sampling_steps
    denoisers = {
        FULL: model.module,
        "float32": intaglio.load(made[FLOAT_GRAPH].path.parent, threads=threads),
        COMPILED: intaglio.load(made[GRAPH].path.parent, threads=threads),
    }
    pipe = DiTPipeline(model.module, Pixels(), model.scheduler)
    pipe.set_progress_bar_config(disable=True)
    labels = [place % (model.classes or 1) for place in range(samples)]
    pictures: dict[str, torch.Tensor] = {}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in denoisers}
    turns = [name for _ in range(rounds) for name in denoisers]
    for name in track(turns, "trajectories", disable=as_json):
        pipe.transformer = denoisers[name]
        began = time.perf_counter(), time.process_time()
        pictures[name] = drawn(pipe, labels, steps, seed)
        spent[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    save_picture(pictures, out)
    speed, cpu_speed = (
        statistics.median(a[i] / b[i] for a, b in zip(spent["float32"], spent[COMPILED], strict=True)) for i in (0, 1)
    )
    figures = {
        "samples": samples,
        "steps": steps,
        **distances(pictures),
        "trajectory_ms": {n: 1e3 * statistics.median(clock for clock, _ in times) for n, times in spent.items()},
        "trajectory_speedup_fp32": speed,
        "trajectory_cpu_speedup_fp32": cpu_speed,
    }
    if as_json:
        print(json.dumps(figures))
    else:
        print(
            f"{out}: {samples} samples in {steps} steps, PSNR {figures['psnr_db']:.2f} dB to full precision, ", end=""
        )
        print(
            f"{figures['psnr_db_min']:.2f} at worst (SQNR {figures['sqnr_db']:.2f} and {figures['sqnr_db_min']:.2f}); ",
            end="",
        )
        print(f"{speed:.2f}x as fast as the float32 graph in the same pipeline", end="")
        print(f" ({cpu_speed:.2f}x by CPU time)")


if __name__ == "__main__":
    typer.run(main)
