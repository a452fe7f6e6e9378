"""Does every pipeline draw with its compiled denoiser? Pipelines of diffusers around tiny, random denoisers.

    python samples/benchmarks/pipelines.py [flux sd3 ...] [--json]

For each: `intaglio.record` records a call of the unmodified pipeline, the denoiser is compiled in W8A8 for ONNX
Runtime, and takes the original's place in the pipeline. Both draw from the same noise. Weights are rounded to nearest,
and nothing is chosen by the samples. PSNR is that of the latents; the peak is the range of the original's latents.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import _embedded_pipelines
import diffusers
import joined_pipelines
import torch
import typer
from joined_pipelines import call_of, null_of, save_denoiser
from rich.progress import track

import intaglio
from intaglio import Recipe, Store, compile
from intaglio.pipeline.numerics import quality

STEPS = 4
"""Steps of the sampler."""
GUIDANCE: Mapping[Callable[[], Any], Mapping[str, float]] = {**_embedded_pipelines.GUIDED, **joined_pipelines.GUIDED}
PIPELINES = {make.__name__: make for make in GUIDANCE}
PASSES = [
    {"calibrate": {"samples": 4}},
    {"uniform": {"schemes": ["w8a8_token", "w8a8_step"]}},
    {"distill": {"updates": 0}},
    "merge",
    "export-float",
    "export-qdq",
]


@dataclass(frozen=True)
class Row:
    """A pipeline: the classes of it and of its denoiser, its guidance, and the PSNR of each sample in dB."""

    pipeline: str
    denoiser: str
    guidance: float
    psnr_db: tuple[float, ...]


def measure(name: str, folder: Path) -> Row:
    """Compile the denoiser in `folder`, and draw with it. Raises what the compiler or the pipeline raises."""
    make = PIPELINES[name]
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)
    place = save_denoiser(pipe, folder / "model")
    denoiser = getattr(pipe, place)
    empty = any(name.startswith("negative_") for name in given)
    null = call_of(null_of(given), STEPS) if empty else None
    intaglio.record(pipe, call_of(given, STEPS), null).save(folder / "conditions.safetensors")
    guidance = next(iter(GUIDANCE[make].values()), 1.0)
    model = {"path": "model", "conditions": "conditions.safetensors", "sampling_steps": STEPS}
    model |= {"guidance": guidance} if empty else {}
    recipe = Recipe.model_validate({"model": model, "targets": ["onnxruntime-cpu"], "steps": PASSES})
    expected = drawn(pipe, given | GUIDANCE[make])
    compile(recipe, Store(folder / "store"), out=folder / "out", base=folder)
    setattr(pipe, place, intaglio.load(folder / "out/onnxruntime-cpu", threads=1))
    error = quality.mean_squared_error(drawn(pipe, given | GUIDANCE[make]), expected)
    psnr = quality.psnr_db(error, float(expected.max() - expected.min()))
    return Row(type(pipe).__name__, type(denoiser).__name__, guidance, tuple(psnr.tolist()))


def drawn(pipe: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """Return the latents that the pipeline draws."""
    with torch.no_grad():
        found = pipe(**call_of(dict(given), STEPS))
    return next(value for value in found.values() if isinstance(value, torch.Tensor))


def line(name: str, found: Row | Exception) -> str:
    """Return a row of the table, or the reason why there is no figure."""
    if isinstance(found, Exception):
        reason = " ".join(str(found).split()).replace("|", "/")[:300]
        return f"| {name} | | {type(found).__name__}: {reason} | |"
    mean, worst = sum(found.psnr_db) / len(found.psnr_db), min(found.psnr_db)
    return f"| {found.pipeline} | {found.denoiser} | {found.guidance:g} | {mean:.1f} dB, {worst:.1f} |"


def main(
    pipelines: Annotated[list[str] | None, typer.Argument(help="all if none is named")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if not as_json:
        print("| pipeline | denoiser | guidance | PSNR: mean, lowest |\n|---|---|---|---|", flush=True)
    for name in track(pipelines or PIPELINES, "pipelines", disable=as_json):
        found: Row | Exception
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measure(name, Path(folder))
            except Exception as error:  # whatever ends the run is the reason
                found = error
        if not as_json:
            print(line(name, found), flush=True)
        elif isinstance(found, Row):
            print(json.dumps(asdict(found)), flush=True)
        else:
            print(json.dumps({"pipeline": name, "error": str(found)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
