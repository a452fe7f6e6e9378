"""Train the captioned sample models: pictures and clips of emoji from words, as diffusers folders.

    npm pack emoji-datasource-google@16.0.0
    python samples/train_captioned.py emoji-pixart --data emoji-datasource-google-16.0.0.tgz
    python samples/train_captioned.py emoji-latte  --data emoji-datasource-google-16.0.0.tgz

`emoji-pixart` draws a named emoji, 32x32; `emoji-latte` a clip of 8 frames, 16x16, in which one moves the way that the
caption says. A word's embedding is a fixed random vector: there is no text encoder. What the denoiser takes for all
captions goes into `conditions.safetensors` beside it. A stopped run goes on when the same command is given again.

Shapes: B batch, M captions, L words, F frames, H W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
from PIL import Image
from train_emoji import Training, careful_scheduler, read_emoji, sample, sampling_scheduler, save_grid

from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.recording import Recording

WORDS, EMBEDDING = 4, 32
"""Words of a caption, and numbers that a word is embedded in."""
CONDITION = "encoder_hidden_states"
GROUPS = ("Animals & Nature", "Food & Drink")
ACTORS = ("cat", "dog", "tiger", "pig", "frog", "apple", "tangerine", "watermelon", "avocado", "strawberry")
WAYS: Mapping[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
FRAMES, SMALL, ACTOR = 8, 16, 9
"""Frames of a clip, pixels of its side, and pixels of the side of the emoji in it."""
SHOWN = 8
"""Samples in a preview."""

CARD = """---
license: apache-2.0
library_name: diffusers
---
# {model}

A captioned {kind} of {parameters:.1f} M parameters that draws {what}. A sample for compilers, not for artists.

- **Data**: Google Noto Emoji (Apache-2.0), as packed in `emoji-datasource-google` 16.0.0 on npm, on white; {captions}
  captions. A word is a fixed random vector of {embedding} numbers; captions are in `captions.json`, embedded in
  `conditions.safetensors`, the empty one for guidance beside them.
- **Training**: epsilon prediction, linear schedule of 1000 steps, min-SNR weights, AdamW at {rate:g}, {steps} steps of
  {batch}, seed {seed}, {minutes:.0f} minutes on busy CPU cores; the average of the weights is what is kept, in fp16.
- **Loss**: mean squared error {mse:.4f} over the last steps.

    python samples/train_captioned.py {model} --steps {steps} --data emoji-datasource-google-16.0.0.tgz
"""


@dataclass(frozen=True)
class Task:
    """Training task: one caption for each clip or picture, and the function that makes a sample of caption m."""

    captions: tuple[str, ...]
    what: str
    shape: tuple[int, ...]
    build: Callable[[], torch.nn.Module]
    folder: str
    constants: Mapping[str, object]
    draw: Callable[[int, torch.Generator], torch.Tensor]


def embed(captions: tuple[str, ...]) -> torch.Tensor:
    """(M, L, EMBEDDING), zero behind the last word."""
    rows = torch.zeros(len(captions), WORDS, EMBEDDING)
    for row, caption in zip(rows, captions, strict=True):
        for place, word in enumerate(caption.split()[:WORDS]):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7])
            row[place] = torch.randn(EMBEDDING, generator=torch.Generator().manual_seed(seed))
    return rows


def load_named(archive: Path, size: int) -> dict[str, torch.Tensor]:
    """Pictures (4, H, W) in [0, 1] with alpha by lower-case name, of `GROUPS`."""
    found = {}
    for entry, rgba in read_emoji(archive, GROUPS):
        pixels = np.array(rgba.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255
        name = entry["name"] or entry["short_name"].replace("-", " ")
        found[name.lower()] = torch.from_numpy(pixels).permute(2, 0, 1)
    return found


def pictures(archive: Path) -> Task:
    named = load_named(archive, 32)
    images = torch.stack([2 * (p[:3] * p[3:] + 1 - p[3:]) - 1 for p in named.values()])

    def build() -> torch.nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=5,
            cross_attention_dim=128,
            sample_size=32,
            patch_size=4,
            caption_channels=EMBEDDING,
            use_additional_conditions=False,
        )

    constants = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return Task(
        tuple(named),
        "the emoji that is named, 32x32",
        (3, 32, 32),
        build,
        "transformer",
        constants,
        lambda m, _: images[m],
    )


def clips(archive: Path) -> Task:
    named = load_named(archive, ACTOR)
    faces = [next(p for name, p in named.items() if actor in name.split()) for actor in ACTORS]
    captions = tuple(f"{actor} {way}" for actor in ACTORS for way in WAYS)
    free = SMALL - ACTOR

    def build() -> torch.nn.Module:
        return LatteTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            cross_attention_dim=96,
            sample_size=SMALL,
            patch_size=4,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=EMBEDDING,
            video_length=FRAMES,
        )

    def draw(m: int, rng: torch.Generator) -> torch.Tensor:
        face, step = faces[m // len(WAYS)], list(WAYS.values())[m % len(WAYS)]
        across = int(torch.randint(free + 1, (1,), generator=rng))
        clip = torch.ones(3, FRAMES, SMALL, SMALL)
        for frame in range(FRAMES):
            y, x = (across if s == 0 else frame if s > 0 else free - frame for s in step)
            place = clip[:, frame, y : y + ACTOR, x : x + ACTOR]
            place.copy_(place * (1 - face[3:]) + face[:3] * face[3:])
        return 2 * clip - 1

    return Task(
        captions,
        f"clips of {FRAMES} frames, 16x16, of an emoji that moves",
        (3, FRAMES, SMALL, SMALL),
        build,
        "transformer",
        {},
        draw,
    )


TASKS: Mapping[str, Callable[[Path], Task]] = {"emoji-pixart": pictures, "emoji-latte": clips}


def drawn(net: torch.nn.Module, texts: torch.Tensor, task: Task) -> torch.Tensor:
    """Samples of the captions embedded in `texts`, (B, L, EMBEDDING): 50 DDIM steps over all timesteps, guidance 2."""
    given, null = {CONDITION: texts}, {CONDITION: torch.zeros_like(texts)}
    model = DenoiserModel(net, careful_scheduler(), task.shape, conditions=given, null=null, constants=task.constants)
    return sample(model, 50, 2.0, given, null, 1)


def save_samples(x: torch.Tensor, path: Path) -> None:
    """Pictures row by row; of a clip a row of its frames."""
    flat = x if x.dim() == 4 else x.transpose(1, 2).flatten(0, 1)
    save_grid(flat, path, columns=SHOWN)


def main(
    model: Annotated[str, typer.Argument(help=", ".join(TASKS))],
    data: Annotated[Path, typer.Option(help="the npm archive of emoji-datasource-google 16.0.0")],
    steps: Annotated[int, typer.Option(help="optimizer updates")] = 3000,
    batch: Annotated[int, typer.Option(help="samples an update")] = 16,
    rate: Annotated[float, typer.Option(help="learning rate of AdamW")] = 1e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="where the diffusers folder goes")] = Path(__file__).parent / "models",
    work: Annotated[Path, typer.Option(help="where the checkpoint and the preview grids go")] = Path(".train"),
    threads: int = 2,
) -> None:
    """Train one sample model and save it in fp16 with its scheduler, its captions and what they are embedded in."""
    if model not in TASKS:
        raise typer.BadParameter(f"unknown model {model}: use {' or '.join(TASKS)}")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    task = TASKS[model](data)
    texts = embed(task.captions)
    net, ema = task.build().eval(), task.build().eval()
    shown = torch.linspace(0, len(texts) - 1, SHOWN * (4 if len(task.shape) == 3 else 1)).long()

    def draw(rng: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pick = torch.randint(len(texts), (batch,), generator=rng)
        kept = (torch.rand(batch, generator=rng) >= 0.1).float().reshape(-1, 1, 1)
        x0 = torch.stack([task.draw(int(m), rng) for m in pick])
        return x0, {CONDITION: texts[pick] * kept, **task.constants}

    def preview(path: Path) -> None:
        save_samples(drawn(ema, texts[shown], task), path)

    loss, seconds = Training(model, steps, rate, seed, work).run(net, ema, draw, preview)
    folder = out / model
    ema.half().save_pretrained(folder / task.folder)
    sampling_scheduler().save_pretrained(folder / "scheduler")
    null = {CONDITION: torch.zeros(1, WORDS, EMBEDDING)}
    Recording(task.shape, conditions={CONDITION: texts}, null=null, constants=task.constants).save(
        folder / "conditions.safetensors"
    )
    (folder / "captions.json").write_text(json.dumps(task.captions, indent=1) + "\n")
    text = CARD.format(
        model=model,
        kind=type(net).__name__,
        parameters=sum(p.numel() for p in net.parameters()) / 1e6,
        what=task.what,
        captions=len(texts),
        embedding=EMBEDDING,
        rate=rate,
        steps=steps,
        batch=batch,
        seed=seed,
        minutes=seconds / 60,
        mse=loss,
    )
    (folder / "README.md").write_text(text)
    save_samples(drawn(ema.float(), texts[shown], task), out.parent / f"{model}.png")


if __name__ == "__main__":
    typer.run(main)
