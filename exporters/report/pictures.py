"""Draw samples with a compiled denoiser, and lay them out as a picture.

Shapes: B samples, C channels, F frames, H W pixels; N pictures in R lines of K, from P denoisers.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from intaglio.exporters.report.curves import ends, is_trajectory, over_time, plots
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import DENOISER_FOLDERS
from intaglio.pipeline.numerics.quality import (
    SampleRange,
    cosine_similarity,
    largest_error,
    mean_squared_error,
    psnr_db,
    sqnr_db,
)
from intaglio.pipeline.output_files import check_output, whole_file

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.types import Denoise, Inputs

FULL, COMPILED = "full_precision", "compiled"
MOST_STEPS, MOST_SAMPLES = 1000, 4096
IMAGES = 0.99
"""Smallest share of values in [-1, 1] for which samples are shown as images in that range, and clipped to it."""
COLUMNS = 8
SIDE = 96
"""Smallest width, in pixels, to which pictures are enlarged by whole factors, if possible."""


@dataclass(frozen=True)
class Drawing:
    """Settings of a drawing: samples of conditions, or of a text.

    `rows` are classes, or rows of the recorded conditions, taken in turn; all of them where none is given. A text,
    `prompt`, needs a whole diffusers pipeline, `pipeline`: its folder or hub id; its denoiser is replaced. `compare`
    draws with full precision too, from the same noise.
    """

    samples: int
    steps: int
    rows: tuple[int, ...] = ()
    prompt: str | None = None
    pipeline: str | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        """Raise RecipeError for options that exclude each other, and for too many steps or samples."""
        if not 1 <= self.steps <= MOST_STEPS:
            raise RecipeError(f"--steps {self.steps}: give 1 to {MOST_STEPS}")
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise RecipeError(f"--samples {self.samples}: give 1 to {MOST_SAMPLES}")
        if self.prompt is not None and self.rows:
            raise RecipeError("--prompt and --class exclude each other")
        if self.prompt is not None and self.pipeline is None:
            raise RecipeError(
                "--prompt: a compiled folder and its store have the denoiser alone, and no text encoder: give the whole"
                " diffusers pipeline as --pipeline, or draw what was recorded, --class N"
            )


def draw(checkpoint: Checkpoint, compiled: nn.Module, wanted: Drawing, ctx: Context) -> Mapping[str, torch.Tensor]:
    """Draw samples (B, ...) with the recipe's scheduler and guidance.

    Returns those of the compiled denoiser as COMPILED, and those of full precision as FULL where `wanted` compares.
    Raises RecipeError for samples that cannot be drawn, CallError for steps that the denoiser was not compiled for.
    """
    model = checkpoint.open()
    _check_steps(model, wanted.steps)
    denoisers = ({FULL: model.module} if wanted.compare else {}) | {COMPILED: compiled}
    through = _sampled if wanted.prompt is None else partial(_piped, place=checkpoint.ref.subfolder)
    return through(model, checkpoint.ref.guidance, denoisers, wanted, ctx)


def _sampled(
    model: DenoiserModel, guidance: float, denoisers: Mapping[str, nn.Module], wanted: Drawing, ctx: Context
) -> Mapping[str, torch.Tensor]:
    """Draw with the sampler that calibration and verification use."""
    from intaglio.pipeline.model.calls import denoise_with
    from intaglio.pipeline.model.sampler import Sampler

    sampler = Sampler(model, wanted.steps, guidance)
    _check(model, sampler.condition_rows, wanted.rows)
    generator = ctx.torch_rng("sample")
    start = sampler.start(wanted.samples, generator, wanted.rows or range(sampler.condition_rows))
    with ctx.progress("steps", len(denoisers) * len(sampler.timesteps)) as advance:

        def told(denoise: Denoise) -> Denoise:
            def and_tells(inputs: Inputs) -> torch.Tensor:
                output = denoise(inputs)
                advance()
                return output

            return and_tells

        return {n: sampler.sample(told(denoise_with(module, model)), start) for n, module in denoisers.items()}


def _piped(
    model: DenoiserModel,
    guidance: float,
    denoisers: Mapping[str, nn.Module],
    wanted: Drawing,
    ctx: Context,
    place: str | None,
) -> Mapping[str, torch.Tensor]:
    """Draw with the whole pipeline; samples are decoded images in [-1, 1].

    `place` is the component that the denoisers replace, None for the pipeline's transformer or UNet.
    """
    from diffusers import DiffusionPipeline

    from intaglio.pipeline.model.scheduler import seeded

    try:
        pipe = DiffusionPipeline.from_pretrained(wanted.pipeline)
    except (OSError, ValueError) as e:
        raise RecipeError(f"--pipeline {wanted.pipeline}: diffusers finds no whole pipeline there: {e}") from e
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise RecipeError(f"--prompt: {type(pipe).__name__} takes no text: draw rows of conditions, --class N")
    place = place or next(name for name in DENOISER_FOLDERS if getattr(pipe, name, None) is not None)
    found = {}
    for name, denoiser in denoisers.items():
        setattr(pipe, place, denoiser)
        pipe.scheduler = copy.deepcopy(model.scheduler)
        generator = ctx.torch_rng("sample")
        with seeded(generator.initial_seed()):  # some schedulers draw without the generator
            (drawn,) = pipe(
                prompt=[wanted.prompt] * wanted.samples,
                num_inference_steps=wanted.steps,
                guidance_scale=guidance,
                generator=generator,
                output_type="pt",
                return_dict=False,
            )[:1]
        found[name] = 2 * (drawn.transpose(1, 2) if drawn.ndim == 5 else drawn) - 1
    return found


def distances(drawn: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return distances of compiled samples to full precision, mean and worst; empty without full precision.

    These are PSNR and SQNR in dB, the cosine similarity and the largest error of a value. The peak of the PSNR is the
    range of the full-precision samples that were drawn.
    """
    if FULL not in drawn:
        return {}
    mse_B = mean_squared_error(drawn[COMPILED], drawn[FULL])
    psnr_B, sqnr_B = psnr_db(mse_B, SampleRange.of(drawn[FULL]).peak), sqnr_db(mse_B, drawn[FULL])
    cosine_B = cosine_similarity(drawn[COMPILED], drawn[FULL])
    every = {"psnr_db": psnr_B, "sqnr_db": sqnr_B, "cosine": cosine_B}
    found = {n: float(x) for name, x_B in every.items() for n, x in ((name, x_B.mean()), (f"{name}_min", x_B.min()))}
    return found | {"error_max": float(largest_error(drawn[COMPILED], drawn[FULL]).max())}


def check_file(path: Path) -> None:
    """Raise RecipeError if no picture can be written to `path`."""
    from PIL.Image import registered_extensions

    if path.suffix.lower() not in registered_extensions():
        raise RecipeError(f"{path}: not the name of a picture: end it in .png")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: the folder {path.parent} does not exist")
    check_output(path)


def save_picture(drawn: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a picture of the samples, with full precision, where it is there, above each line of compiled ones."""
    parts = [drawn[name] for name in (FULL, COMPILED) if name in drawn]
    with whole_file(path) as partial:
        picture(parts, enlarged=max(1, SIDE // parts[0].shape[-1])).save(partial)


def picture(parts: Sequence[torch.Tensor], columns: int = COLUMNS, enlarged: int = 3) -> Image:
    """Lay out samples (B, C, H, W), or clips (B, C, F, H, W), each with its frames in one line.

    Below each line of the first part are the same lines of the other parts. Channels that are no colours are mapped to
    colours as those of the first part. Trajectories, (B, C, L) or (B, L, C), are plotted over time, above pale lines
    of the first part; `enlarged` is not used for them.
    """
    import torch
    from PIL.Image import Resampling

    if is_trajectory(parts[0].shape[1:]):
        curves = over_time(parts)
        below = curves[0] if len(curves) > 1 else None
        return plots(curves, ends(curves[0]), min(columns, len(curves[0])), below)
    if parts[0].ndim == 5:
        columns = parts[0].shape[2]
        parts = [frames(x) for x in parts]
    colour = Colours(parts[0])
    lines_RPCHW = torch.stack([lines(colour(x_NCHW), columns) for x_NCHW in parts], dim=1)
    image = as_image(lines_RPCHW.permute(2, 0, 1, 3, 4).flatten(1, 3))
    return image.resize((image.width * enlarged, image.height * enlarged), Resampling.NEAREST)


def frames(x: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, C, H, W): samples as they are, clips (B, C, F, H, W) frame by frame."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def lines(x_NCHW: torch.Tensor, columns: int) -> torch.Tensor:
    """Put pictures side by side in lines (R, C, H, K W), white where the last line has no picture."""
    import torch

    columns = min(columns, len(x_NCHW))
    white = x_NCHW.new_ones(-len(x_NCHW) % columns, *x_NCHW.shape[1:])
    x_RKCHW = torch.cat([x_NCHW, white]).view(-1, columns, *x_NCHW.shape[1:])
    return x_RKCHW.permute(0, 2, 3, 1, 4).flatten(3)


class Colours:
    """Maps samples (B, C, H, W) to colours (B, 1 or 3, H, W) in [0, 1], always by the ranges of one reference.

    Images whose values are in [-1, 1] (a share of `IMAGES` of them) are black at -1 and white at 1. Other images
    have the range of the reference, and latents have one range for each channel.
    """

    def __init__(self, reference_BCHW: torch.Tensor) -> None:
        channels = reference_BCHW.shape[1]
        self.kept = 3 if channels >= 3 else 1
        kept = reference_BCHW[:, : self.kept].nan_to_num(0.0, 0.0, 0.0)
        alike = (0, 1, 2, 3) if channels in (1, 3) else (0, 2, 3)
        self.low: torch.Tensor | float = kept.amin(alike, keepdim=True)
        self.span: torch.Tensor | float = (kept.amax(alike, keepdim=True) - self.low).clamp(min=1e-6)
        if channels in (1, 3) and float((kept.abs() <= 1).float().mean()) >= IMAGES:
            self.low, self.span = -1.0, 2.0

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Scale the kept channels to the range 0 to 1, and cut off what lies outside."""
        return self.scaled(x_BCHW).clamp(0, 1)

    def scaled(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Scale the kept channels so that the reference's range becomes 0 to 1."""
        return (x_BCHW[:, : self.kept].nan_to_num(0.0) - self.low) / self.span


def as_image(x_CHW: torch.Tensor) -> Image:
    """Return an image of colours in [0, 1], with one or three channels."""
    from PIL.Image import fromarray

    levels = (x_CHW * 255).round().byte().permute(1, 2, 0).numpy()
    return fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)


def png(image: Image) -> bytes:
    """Return the content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _check_steps(model: DenoiserModel, steps: int) -> None:
    """Raise RecipeError if the model's scheduler refuses this number of steps."""
    from intaglio.pipeline.model.scheduler import set_schedule

    try:
        set_schedule(model.scheduler, steps, model.schedule)
    except Exception as e:  # each scheduler has its own
        kind = type(model.scheduler).__name__
        raise RecipeError(f"--steps {steps}: {kind}, the model's scheduler, refuses this number of steps: {e}") from e


def _check(model: DenoiserModel, count: int, rows: Sequence[int]) -> None:
    """Raise RecipeError for samples that are no pictures, and for rows that do not exist."""
    problems = []
    if len(model.sample_shape) not in (3, 4) and not is_trajectory(model.sample_shape):
        problems.append(f"samples of the shape {model.sample_shape} are no pictures: draw a text, --prompt TEXT")
    if rows and not count:
        problems.append("--class: the model has neither classes nor recorded conditions")
    elif absent := [row for row in rows if not 0 <= row < count]:
        problems.append(f"--class {', '.join(map(str, absent))}: give numbers from 0 to {count - 1}")
    if problems:
        raise RecipeError(*problems)
