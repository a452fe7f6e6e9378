"""Draw the full-precision samples that quantized ones are compared with, once for all steps, targets and plans.

Shapes: B samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import diffusers
import torch

from intaglio.pipeline.artifacts.keys import SAMPLES
from intaglio.pipeline.artifacts.samples import Samples

if TYPE_CHECKING:
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.call_rows import Start
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise

CHOICE = "choice"
"""Label of the starts of samples by which steps choose a plan or a trained state: the same starts in every step.

The samples that judge the choice have other starts."""
PART = 4
"""Samples that are drawn at once."""
VERSION = 1
"""Version of what is kept: raise it whenever the same start gives another sample."""


def draw_starts(sampler: Sampler, count: int, ctx: Context, label: str) -> list[Start]:
    """Return the starts of `count` samples in parts of PART; a longer list begins with the parts of a shorter one."""
    return [
        sampler.start(min(PART, count - first), ctx.torch_rng(label, first // PART)) for first in range(0, count, PART)
    ]


def shared_starts(parts: Sequence[Start], own: slice) -> Iterator[Start]:
    """Yield those of all starts that are at the positions `own`, in the same parts."""
    first = 0
    for part in parts:
        low, high = max(own.start - first, 0), min(own.stop - first, len(part.noise))
        if low < high:
            yield part.part(slice(low, high))
        first += len(part.noise)


def full_precision_samples(sampler: Sampler, denoise: Denoise, start: Start, ctx: Context) -> torch.Tensor:
    """Return the samples (B, ...) from this start, drawn with `denoise` if the store does not have them.

    `denoise` is the denoiser of the step's model in full precision.
    """
    about = {
        "start": _digest(start),
        "device": ctx.device,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "version": VERSION,
    }
    return ctx.keep(SAMPLES, about, lambda: Samples(sampler.sample(denoise, start))).drawn


def _digest(start: Start) -> str:
    """Return the sha256 of the noise, the conditions and the null rows."""
    digest = hashlib.sha256()
    for name, tensor in (("noise", start.noise), *sorted(start.conditions.items()), *sorted(start.null.items())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
