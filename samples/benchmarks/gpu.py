"""Do calibrate, sensitivity, assign and distill find the same on a GPU as on the CPU, and how much faster?

    python samples/benchmarks/gpu.py samples/emoji-dit.yaml [--json]

The steps of the recipe up to `merge` run twice for its first target, each time in a process and a store of their own:
on the CPU alone, and on the GPU that torch finds. Printed are the seconds of each step, the layers whose scheme
differs, and the share of codes that differ in layers of the same scheme, with the largest difference. Float sums have
another order on a GPU, so values halfway between two codes may be rounded the other way. Without a GPU, the program
says so and runs nothing; `--without-gpu` compares the CPU with itself, which has to print no difference.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from intaglio import Recipe, Store, compile
from intaglio.pipeline.artifacts.keys import PLAN, QUANTIZED
from intaglio.pipeline.runs.runner import CompiledTarget

RUN = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import gpu; gpu.run(*map(pathlib.Path, sys.argv[2:]))"


def main(
    recipe_file: Path,
    without_gpu: Annotated[bool, typer.Option("--without-gpu", help="compare the CPU with itself")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    if not (torch.cuda.is_available() or without_gpu):
        raise typer.BadParameter("torch finds no GPU here: give --without-gpu to compare the CPU with itself")
    with tempfile.TemporaryDirectory() as folder:
        done = {}
        for name, hidden in (("cpu", True), ("gpu", without_gpu)):
            store = Path(folder) / name
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if hidden else dict(os.environ)
            command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(recipe_file), str(store)]
            subprocess.run(command, env=environment, check=True)
            done[name] = run(recipe_file, store)  # every step is in the store
        found = figures(done["cpu"], done["gpu"])
    device = "CPU" if without_gpu else torch.cuda.get_device_name()
    if as_json:
        print(json.dumps({"device": device, **found}))
        return
    print(f"the other device: {device}")
    for step, seconds in found["seconds"].items():
        print(f"{step}: {seconds['cpu']:.1f} s on the CPU, {seconds['gpu']:.1f} s there")
    print(f"layers with another scheme: {', '.join(found['other_scheme']) or 'none'}")
    print(f"codes that differ: {100 * found['codes_differing']:.4f} %, by at most {found['largest_difference']}")


def run(recipe_file: Path, store: Path) -> CompiledTarget:
    """Run the recipe's steps up to `merge` for its first target, or find them in the store."""
    recipe = Recipe.read(recipe_file)
    names = [step.name for step in recipe.steps]
    short = {"steps": recipe.steps[: names.index("merge") + 1], "targets": recipe.targets[:1]}
    return compile(recipe.model_copy(update=short), Store(store), base=recipe_file.parent)[recipe.targets[0]]


def figures(cpu: CompiledTarget, gpu: CompiledTarget) -> dict[str, Any]:
    """Return the seconds of each step on both, and what differs in the plans and codes."""
    seconds = {a.step: {"cpu": a.seconds, "gpu": b.seconds} for a, b in zip(cpu.runs, gpu.runs, strict=True)}
    plans = {name: one[PLAN].schemes for name, one in (("cpu", cpu), ("gpu", gpu))}
    other = [name for name, scheme in plans["cpu"].items() if plans["gpu"].get(name) != scheme]
    differing = codes = largest = 0
    theirs = gpu[QUANTIZED].layers
    for name, layer in cpu[QUANTIZED].layers.items():
        if name in other:
            continue
        apart = (layer.codes.int() - theirs[name].codes.int()).abs()
        codes, differing = codes + apart.numel(), differing + int(apart.count_nonzero())
        largest = max(largest, int(apart.max()))
    return {
        "seconds": seconds,
        "other_scheme": other,
        "codes_differing": differing / max(1, codes),
        "largest_difference": largest,
    }


if __name__ == "__main__":
    typer.run(main)
