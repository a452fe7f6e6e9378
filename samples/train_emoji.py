"""Train the sample models: class-conditional diffusion of 32x32 emoji, as diffusers folders.

    npm pack emoji-datasource-google@16.0.0
    python samples/train_emoji.py emoji-dit  --data emoji-datasource-google-16.0.0.tgz
    python samples/train_emoji.py emoji-unet --data emoji-datasource-google-16.0.0.tgz

A stopped run goes on from its last checkpoint when the same command is given again. The learning rate is constant and
then falls linearly to zero over the last fifth of `--steps`, so a run may be lengthened by resuming it with more steps.

Shapes: B batch, H W pixels.
"""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.inputs import CLASS_LABELS
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.types import Inputs

SIZE = 32
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
"""The Unicode emoji groups that are learnt; a class is a subgroup of these, such as `animal-bird`."""
FIRST_BETA, LAST_BETA = 1e-4, 0.02
GUIDANCE = 1.5
SHOWN = (
    "face-smiling",
    "cat-face",
    "animal-mammal",
    "animal-bird",
    "food-fruit",
    "food-vegetable",
    "plant-flower",
    "heart",
)
"""Classes in the sample grid, one a row."""

CARD = """---
license: apache-2.0
library_name: diffusers
---
# {model}

A class-conditional {kind} of {parameters:.1f} M parameters that draws 32x32 emoji. A sample for compilers, not for
artists: it is small, it was trained on few images, and much of what it draws it has seen.

- **Data**: {images} images of Google Noto Emoji (Apache-2.0), as packed in `emoji-datasource-google` 16.0.0 on npm:
  the groups {groups}, on white, 32x32 RGB.
- **Classes**: {classes} Unicode subgroups, in `classes.json`; class {classes} is the null class of guidance.
- **Training**: epsilon prediction, linear schedule of 1000 steps, min-SNR weights, AdamW at {rate:g}, {steps} steps of
  {batch} images, seed {seed}, {hours:.1f} hours on busy CPU cores; the average of the weights is what is kept, in fp16.
- **Loss**: mean squared error {mse:.4f} over the last steps.
- **Sampling**, as the scheduler beside it does: DDIM, 20 steps from timestep 570 down to 0, guidance {guidance:g}.
  The grid of samples took 50 steps over all 1000 timesteps, guidance 2.

    python samples/train_emoji.py {model} --steps {steps} --rate {rate:g} --data emoji-datasource-google-16.0.0.tgz
"""


def read_emoji(archive: Path, groups: Collection[str]) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield the archive's entry and the picture, 64x64, alpha, of each emoji of these groups, in Unicode's order."""
    with tarfile.open(archive) as tar:
        files = {m.name: m for m in tar.getmembers()}

        def read(name: str) -> bytes:
            return tar.extractfile(files[name]).read()  # type: ignore[union-attr]  # a regular file by construction

        entries = [e for e in json.loads(read("package/emoji.json")) if e["has_img_google"] and e["category"] in groups]
        for entry in sorted(entries, key=lambda e: e["sort_order"]):
            yield entry, Image.open(io.BytesIO(read(f"package/img/google/64/{entry['image']}"))).convert("RGBA")


def load_emoji(archive: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (M, 3, H, W) uint8 on white, labels (M,), and the sorted class names."""
    images, subgroups = [], []
    for entry, rgba in read_emoji(archive, GROUPS):
        white = Image.new("RGBA", rgba.size, "white")
        rgb = Image.alpha_composite(white, rgba).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
        subgroups.append(entry["subcategory"])
    names = sorted(set(subgroups))
    return torch.stack(images), torch.tensor([names.index(subgroup) for subgroup in subgroups]), names


def build(model: str, classes: int) -> torch.nn.Module:
    """The untrained denoiser. Class number `classes` is the null class of classifier-free guidance."""
    if model == "emoji-dit":
        net = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=3,
            out_channels=3,
            num_layers=5,
            sample_size=SIZE,
            patch_size=4,
            num_embeds_ada_norm=classes,
        )
        for layer in (*(block.norm1.linear for block in net.transformer_blocks), net.proj_out_1, net.proj_out_2):
            torch.nn.init.zeros_(
                layer.weight
            )  # adaLN-zero, Peebles and Xie 2023, section 3.2: blocks start as identity
            torch.nn.init.zeros_(layer.bias)
        return net
    if model == "emoji-unet":
        return UNet2DModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=32,
            num_class_embeds=classes + 1,
        )
    raise typer.BadParameter(f"unknown model {model}: use emoji-dit or emoji-unet")


def sampling_scheduler() -> DDIMScheduler:
    """The first 600 of the 1000 steps that are learnt: 20 DDIM steps start at timestep 570, with 0.19 of a signal left.

    At timestep 999 an error of the predicted noise is 157 times as large in the predicted image: from there two models
    that agree to one in a hundred draw different pictures, and a model this small draws none better.
    """
    last = 600
    beta_end = FIRST_BETA + (LAST_BETA - FIRST_BETA) * (last - 1) / 999
    return DDIMScheduler(
        num_train_timesteps=last,
        beta_start=FIRST_BETA,
        beta_end=beta_end,
        beta_schedule="linear",
        timestep_spacing="leading",
        clip_sample=True,
    )


def careful_scheduler() -> DDIMScheduler:
    """All steps that are learnt, to look at what was."""
    return DDIMScheduler(1000, FIRST_BETA, LAST_BETA, beta_schedule="linear", timestep_spacing="trailing")


def sample(model: DenoiserModel, steps: int, guidance: float, given: Inputs, null: Inputs, seed: int) -> torch.Tensor:
    """Samples in [-1, 1], one for each row of the conditions `given`, guided away from those that are `null`."""
    rows = len(next(iter(given.values())))
    noise = torch.randn(rows, *model.sample_shape, generator=torch.Generator().manual_seed(seed))
    return Sampler(model, steps, guidance).sample(denoise_with(model.module, model), Start(noise, given, null))


def drawn(
    net: torch.nn.Module, scheduler: DDIMScheduler, labels: torch.Tensor, null: int, steps: int, guidance: float
) -> torch.Tensor:
    """DDIM samples (B, 3, H, W) of these classes."""
    model = DenoiserModel(net, scheduler, (3, SIZE, SIZE), classes=null)
    return sample(model, steps, guidance, {CLASS_LABELS: labels}, {CLASS_LABELS: torch.full_like(labels, null)}, 1)


def save_grid(x_B3HW: torch.Tensor, path: Path, columns: int) -> None:
    """Write the images row by row, enlarged three times."""
    x = ((x_B3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(x[i : i + columns]), axis=1) for i in range(0, len(x), columns)]
    grid = Image.fromarray(np.concatenate(rows, axis=0))
    grid.resize((grid.width * 3, grid.height * 3), Image.Resampling.NEAREST).save(path)


def write_atomically(value: dict[str, object], path: Path) -> None:
    torch.save(value, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@dataclass(frozen=True)
class Training:
    """Training of a denoiser to predict noise, and the place of its checkpoint, from which a stopped run continues."""

    name: str
    steps: int
    rate: float
    seed: int
    work: Path

    def run(
        self,
        net: torch.nn.Module,
        ema: torch.nn.Module,
        draw: Callable[[torch.Generator], tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
        preview: Callable[[Path], None],
    ) -> tuple[float, float]:
        """Loss and seconds. `draw` returns samples in [-1, 1] and what the denoiser takes beside them."""
        self.work.mkdir(parents=True, exist_ok=True)
        ema.load_state_dict(net.state_dict())
        scheduler = DDIMScheduler(1000, FIRST_BETA, LAST_BETA, beta_schedule="linear")
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01)
        checkpoint, done, loss_mean, spent = self.work / f"{self.name}.pt", 0, 1.0, 0.0
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            for name, part in {"net": net, "ema": ema, "optimizer": optimizer}.items():
                part.load_state_dict(saved[name])
            done, loss_mean, spent = saved["step"], saved["loss"], saved["seconds"]
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        fast_half = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # without the instructions it is slower than float32
        began = time.monotonic()
        with Progress(*columns) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=done)
            for step in range(done, self.steps):
                rng = torch.Generator().manual_seed(
                    self.seed * 1_000_003 + step
                )  # a function of the step, so that a resumed run draws the same
                x0, conditions = draw(rng)
                t = torch.randint(1000, (len(x0),), generator=rng)
                noise = torch.randn(x0.shape, generator=rng)
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * min(1.0, (step + 1) / 200, (self.steps - step) / (0.2 * self.steps))
                with torch.autocast("cpu", torch.bfloat16, enabled=fast_half):
                    predicted = net(scheduler.add_noise(x0, noise, t), timestep=t, return_dict=False, **conditions)[0]
                error_B = (predicted.float() - noise).square().flatten(1).mean(1)
                loss = (
                    error_B * (snr[t].clamp(max=5) / snr[t])
                ).mean()  # min-SNR weighting, Hang et al. 2023, Eq. 7, gamma = 5
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                decay = min(0.999, (step + 1) / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
                loss_mean += 0.01 * (error_B.mean().item() - loss_mean)
                progress.update(task, advance=1, description=f"{self.name} mse {loss_mean:.4f}")
                if (step + 1) % 500 == 0 or step + 1 == self.steps:
                    preview(self.work / f"{self.name}-{step + 1:06d}.png")
                    progress_so_far = {
                        "net": net.state_dict(),
                        "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                        "loss": loss_mean,
                        "seconds": spent + time.monotonic() - began,
                    }
                    write_atomically(progress_so_far, checkpoint)
        return loss_mean, spent + time.monotonic() - began


def main(
    model: Annotated[str, typer.Argument(help="emoji-dit or emoji-unet")],
    data: Annotated[Path, typer.Option(help="the npm archive of emoji-datasource-google 16.0.0")],
    steps: Annotated[int, typer.Option(help="optimizer updates")] = 12_000,
    batch: Annotated[int, typer.Option(help="images an update")] = 32,
    rate: Annotated[float, typer.Option(help="learning rate of AdamW")] = 4e-4,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="where the diffusers folder goes")] = Path(__file__).parent / "models",
    work: Annotated[Path, typer.Option(help="where the checkpoint and the preview grids go")] = Path(".train"),
    threads: int = 2,
) -> None:
    """Train one sample model and save it in fp16 with its scheduler, its classes and a sample grid."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images, labels, names = load_emoji(data)
    null = len(names)
    net, ema = (build(model, null).eval() for _ in range(2))  # eval: labels are dropped below, once for all blocks
    sampling = sampling_scheduler()
    shown = torch.tensor([names.index(n) for n in SHOWN]).repeat_interleave(8)

    def draw(rng: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pick = torch.randint(len(images), (batch,), generator=rng)
        label = torch.where(torch.rand(batch, generator=rng) < 0.1, null, labels[pick])
        return images[pick].float() / 127.5 - 1, {"class_labels": label}

    def preview(path: Path) -> None:
        save_grid(drawn(ema, sampling, shown, null, 20, GUIDANCE), path, columns=8)

    loss, seconds = Training(model, steps, rate, seed, work).run(net, ema, draw, preview)
    folder = out / model
    ema.half().save_pretrained(folder / ("transformer" if model == "emoji-dit" else "unet"))
    sampling.save_pretrained(folder / "scheduler")
    (folder / "classes.json").write_text(json.dumps({"labels": names, "null_label": null}, indent=1) + "\n")
    text = CARD.format(
        model=model,
        kind=type(net).__name__,
        parameters=sum(p.numel() for p in net.parameters()) / 1e6,
        images=len(images),
        groups=", ".join(GROUPS),
        classes=null,
        steps=steps,
        batch=batch,
        rate=rate,
        seed=seed,
        mse=loss,
        hours=seconds / 3600,
        guidance=GUIDANCE,
    )
    (folder / "README.md").write_text(text)
    save_grid(drawn(ema.float(), careful_scheduler(), shown, null, 50, 2.0), out.parent / f"{model}.png", columns=8)


if __name__ == "__main__":
    typer.run(main)
