"""Train two small models that are hard to quantize: emoji-mixer and emoji-jump.

    npm pack emoji-datasource-google@16.0.0
    python samples/train_hard.py emoji-mixer --steps 4000 --data emoji-datasource-google-16.0.0.tgz
    python samples/train_hard.py emoji-jump --steps 1600 --batch 16 --data emoji-datasource-google-16.0.0.tgz

Both learn to draw 24 emoji at 25 places in 24x24 pixels, as denoisers with the preconditioning of Karras et al. 2022
(Table 1, EDM). emoji-mixer is an MLP-mixer with ReLU on pictures that are not normalized (models/emoji-mixer/mixer.py);
it is sampled in 24 Euler steps. emoji-jump is a UNet that is sampled in 3 steps, sigma 80, 10 and 0.5, so that every
step has inputs of another range.

Shapes: B batch, H W pixels.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import EDMEulerScheduler, UNet2DModel
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from train_emoji import read_emoji, save_grid

from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.inputs import CLASS_LABELS
from intaglio.pipeline.model.received import call_factory
from intaglio.pipeline.model.sampler import Sampler

MODELS = Path(__file__).parent / "models"
SIZE, SMALL = 24, 20
"""Pixels of a side of a picture, and of the emoji in it."""
NAMES = (
    *("grinning", "heart_eyes", "sunglasses", "angry", "cry", "scream_cat", "monkey_face", "dog", "cat", "tiger"),
    *("pig", "frog", "koala", "chicken", "penguin", "octopus", "fish", "tomato", "strawberry", "watermelon"),
    *("lemon", "hamburger", "doughnut", "cherry_blossom"),
)
"""Short names of the emoji, which are the classes."""
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
LUMA = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
"""RGB to luma and chroma, as JPEG (ITU-T T.871)."""

CARD = """---
license: apache-2.0
library_name: diffusers
---
# {model}

{kind} of {parameters:.2f} M parameters that draws 24x24 emoji. It is hard to quantize on purpose: {hard}.

- **Data**: 24 pictures of Google Noto Emoji (Apache-2.0), as packed in `emoji-datasource-google` 16.0.0 on npm, on
  white, at 25 places; {coding}.
- **Classes**: the emoji, in `classes.json`; class 24 is the null class of guidance.
- **Training**: denoising with the preconditioning of Karras et al. 2022, log-uniform sigma, AdamW at {rate:g}, {steps}
  steps of {batch} pictures, seed {seed}, {minutes:.0f} minutes on one busy CPU core; the average of the weights is what
  is kept, in fp16.
- **Loss**: {loss:.4f} over the last steps, relative to the variance of the target.
- **Sampling**: Euler steps of the scheduler, {sampling} of them from sigma {first:g} to {last:g}.

    python samples/train_hard.py {model} --steps {steps} --batch {batch} --data emoji-datasource-google-16.0.0.tgz
"""


def load_pictures(archive: Path) -> torch.Tensor:
    """Return all pictures in all places, (24, 25, 3, H, W), RGB in 0..255."""
    found = {}
    for entry, rgba in read_emoji(archive, GROUPS):
        if entry["short_name"] in NAMES:
            found[entry["short_name"]] = rgba.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
    pictures = torch.full((len(NAMES), 25, 3, SIZE, SIZE), 255.0)
    for row, name in zip(pictures, NAMES, strict=True):
        for place, picture in enumerate(row):
            page = Image.new("RGBA", (SIZE, SIZE), "white")
            page.alpha_composite(found[name], (place // 5, place % 5))
            picture.copy_(torch.from_numpy(np.array(page.convert("RGB"), np.float32)).permute(2, 0, 1))
    return pictures


def mixer() -> DenoiserModel:
    return call_factory(MODELS / "emoji-mixer" / "mixer.py", "untrained")


def jump() -> DenoiserModel:
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(24, 40, 64),
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=16,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=len(NAMES) + 1,
    )
    scheduler = EDMEulerScheduler(sigma_min=0.5, sigma_max=80.0, sigma_data=0.5)
    return DenoiserModel(unet, scheduler, (3, SIZE, SIZE), classes=len(NAMES))


def to_luma(rgb: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cd,...dhw->...chw", LUMA, rgb)


def from_luma(x: torch.Tensor) -> torch.Tensor:
    """Return RGB in [-1, 1]."""
    return torch.einsum("cd,...dhw->...chw", LUMA.inverse(), x) / 127.5 - 1


@dataclass(frozen=True)
class Task:
    """Making and sampling of a model, its coding of pictures, there and back, and the text of its card."""

    make: Callable[[], DenoiserModel]
    sampling: int
    code: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    kind: str
    coding: str
    hard: str


TASKS: Mapping[str, Task] = {
    "emoji-mixer": Task(
        mixer,
        24,
        to_luma,
        from_luma,
        "An MLP-mixer (`mixer.py`)",
        "luma in 0..255 and chroma in -128..127, neither centred nor scaled",
        "every layer but the first reads the outputs of a ReLU or a residual stream without normalization",
    ),
    "emoji-jump": Task(
        jump,
        3,
        lambda rgb: rgb / 127.5 - 1,
        lambda x: x,
        "A UNet2DModel",
        "RGB in [-1, 1]",
        "its three steps are two decades of sigma apart, so every layer has inputs of another range in each",
    ),
}


def noisy_target(scheduler: EDMEulerScheduler, x0: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return the network's input, its timestep (B,) and its target for pictures x0 (B, 3, H, W).

    Sigma is log-uniform over the scheduler's range (Karras et al. 2022, Eqs. 7 and 8).
    """
    low, high = (torch.tensor(scheduler.config[name]).log() for name in ("sigma_min", "sigma_max"))
    sigma = (low + (high - low) * torch.rand(len(x0), generator=rng)).exp().view(-1, 1, 1, 1)
    x = x0 + sigma * torch.randn(x0.shape, generator=rng)
    data = scheduler.config.sigma_data
    total = (sigma**2 + data**2).sqrt()
    return x / total, sigma.flatten().log() / 4, (x0 - x * (data / total) ** 2) * total / (sigma * data)


def fit(
    net: torch.nn.Module, loss_of: Callable[[torch.Generator], torch.Tensor], steps: int, rate: float, seed: int
) -> float:
    """Train a network in place, and return the mean of the loss over the last steps.

    The network gets the average of its weights. `loss_of` draws a batch, and returns its loss.
    """
    net.train()
    loss_mean, average = 1.0, copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    rng = torch.Generator().manual_seed(seed)
    for step in track(range(steps), "training"):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))
        loss = loss_of(rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        loss_mean += 0.01 * (loss.item() - loss_mean)
    net.load_state_dict(average.state_dict())
    net.eval()
    return loss_mean


def train(model: DenoiserModel, pictures: torch.Tensor, steps: int, batch: int, rate: float, seed: int) -> float:
    """Train the model in place, and return the mean of the loss over the last steps."""

    def loss_of(rng: torch.Generator) -> torch.Tensor:
        label, place = (torch.randint(n, (batch,), generator=rng) for n in pictures.shape[:2])
        x, t, target = noisy_target(model.scheduler, pictures[label, place], rng)
        given = torch.where(torch.rand(batch, generator=rng) < 0.1, len(pictures), label)
        output = model.module(x, t, class_labels=given)
        error = (output if isinstance(output, torch.Tensor) else output.sample) - target
        return error.square().mean() / target.square().mean()

    return fit(model.module, loss_of, steps, rate, seed)


def drawn(model: DenoiserModel, steps: int) -> torch.Tensor:
    """Return two samples of each class."""
    labels = torch.arange(len(NAMES)).repeat_interleave(2)
    noise = torch.randn(len(labels), *model.sample_shape, generator=torch.Generator().manual_seed(1))
    start = Start(noise, {CLASS_LABELS: labels}, {CLASS_LABELS: torch.full_like(labels, len(NAMES))})
    return Sampler(model, steps, 1.0).sample(denoise_with(model.module, model), start)


def main(
    name: Annotated[str, typer.Argument(metavar="MODEL", help=", ".join(TASKS))],
    data: Annotated[Path, typer.Option(help="the npm archive of emoji-datasource-google 16.0.0")],
    steps: Annotated[int, typer.Option(help="optimizer updates")] = 3000,
    batch: Annotated[int, typer.Option(help="pictures in an update")] = 24,
    rate: Annotated[float, typer.Option(help="learning rate of AdamW")] = 2e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder for the model's folder and its picture")] = MODELS,
    threads: int = 1,
) -> None:
    """Train one model, and save it in fp16 with its classes, its card and a grid of samples."""
    if name not in TASKS:
        raise typer.BadParameter(f"unknown model {name}: use {' or '.join(TASKS)}")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    task, began = TASKS[name], time.monotonic()
    model = task.make()
    loss = train(model, task.code(load_pictures(data)), steps, batch, rate, seed)
    folder, net = out / name, model.module.half()
    if isinstance(net, UNet2DModel):
        net.save_pretrained(folder / "unet")
        model.scheduler.save_pretrained(folder / "scheduler")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), folder / "mixer.safetensors")
    (folder / "classes.json").write_text(json.dumps({"labels": NAMES, "null_label": len(NAMES)}, indent=1) + "\n")
    text = CARD.format(
        model=name,
        kind=task.kind,
        coding=task.coding,
        hard=task.hard,
        sampling=task.sampling,
        parameters=sum(p.numel() for p in net.parameters()) / 1e6,
        rate=rate,
        steps=steps,
        batch=batch,
        seed=seed,
        minutes=(time.monotonic() - began) / 60,
        loss=loss,
        first=model.scheduler.config.sigma_max,
        last=model.scheduler.config.sigma_min,
    )
    (folder / "README.md").write_text(text)
    net.float()
    save_grid(task.decode(drawn(model, task.sampling)), out.parent / f"{name}.png", columns=12)


if __name__ == "__main__":
    typer.run(main)
