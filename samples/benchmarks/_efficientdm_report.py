"""Grids of samples, curves of training and tables of `efficientdm.py`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

Figures = Mapping[str, Any]
LABEL_WIDTH, ENLARGED = 230, 2
COLUMNS = {
    "output_mse": "{:.2e}",
    "psnr_db": "{:.2f}",
    "psnr_db_min": "{:.2f}",
    "ssim": "{:.4f}",
    "sqnr_db": "{:.2f}",
    "feature_distance": "{:.3f}",
    "kid": "{:.4f}",
}
COLOURS = ("#1f77b4", "#d62728", "#7f7f7f")


def grid(bench: Any, found: Figures, path: Path) -> None:
    """A row for each variant with the first seed, all from the same noise."""
    rows = {"full precision": found["full_precision"]}
    for plan, variants in found["variants"].items():
        rows |= {f"{plan} {name}": seeds[0] for name, seeds in variants.items()}
        best = found["best_peer"][plan]
        rows[f"{plan} modelopt {best['name']}"] = best["seeds"][0]
    strips({name: bench.rows.tensors(row)["samples"] for name, row in rows.items()}, path)


def strips(samples: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write an image with a labelled row for each name: its first 16 samples, (B, 3, H, W) in [-1, 1]."""
    made = []
    for name, x in samples.items():
        pixels = ((x[:16].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        strip = Image.fromarray(np.concatenate(list(pixels), axis=1))
        strip = strip.resize((strip.width * ENLARGED, strip.height * ENLARGED), Image.Resampling.NEAREST)
        labelled = Image.new("RGB", (LABEL_WIDTH + strip.width, strip.height), "white")
        labelled.paste(strip, (LABEL_WIDTH, 0))
        label = name.replace(" modelopt ", " modelopt\n").replace(", ", ",\n")
        ImageDraw.Draw(labelled).multiline_text((4, 8), label, fill="black")
        made.append(np.array(labelled))
    Image.fromarray(np.concatenate(made)).save(path)


def curves(training: Figures, path: Path, size: tuple[int, int] = (900, 520)) -> None:
    """Held-out error, logarithmic, against CPU seconds; ours begins with what it did before its first update."""
    start_s = training["ours_start_cpu_s"]
    lines = {
        name: [(spent + (start_s if name == "ours" else 0.0), error) for _, spent, error in curve]
        for name, curve in training["curves"].items()
    }
    right = max(x for line in lines.values() for x, _ in line)
    low, high = (end(y for line in lines.values() for _, y in line) for end in (min, max))
    ticks = [digit * 10.0**power for power in range(-7, 2) for digit in (1, 2, 5)]
    ticks = [t for t in ticks if low / 1.3 <= t <= high * 1.3]
    left, top, width, height = 70, 20, size[0] - 90, size[1] - 70
    span = math.log(high * 1.3) - math.log(low / 1.3)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * x / right, top + height * (math.log(high * 1.3) - math.log(y)) / span

    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for tick in ticks:
        pen.line([place(0, tick), place(right, tick)], fill="#dddddd")
        pen.text((8, place(0, tick)[1] - 6), f"{tick:.0e}", fill="black")
    for i in range(6):
        pen.text((place(right * i / 5, low)[0] - 12, top + height + 8), f"{right * i / 5:.0f} s", fill="black")
    pen.text((left + width / 2 - 60, top + height + 28), "CPU seconds; held-out output error", fill="black")
    for i, (name, line) in enumerate(lines.items()):
        pen.line([place(*point) for point in line], fill=COLOURS[i], width=2)
        pen.text((left + width - 150, top + 8 + 16 * i), name, fill=COLOURS[i])
    image.save(path)


def tables(model: str, found: Figures) -> str:
    """For people: means over seeds, with their spread for the error."""
    full = found["full_precision"]
    lines = [
        model,
        f"  full precision from other noise: feature distance 1 +- "
        f"{full['feature_distance_of_noises_spread'] / full['feature_distance_of_noises']:.2f} (samples), "
        f"KID {full['kid']:.4f}, once more {full['kid_again']:.4f}",
        f"  {'':78}" + "".join(f"{name:>17}" for name in COLUMNS),
    ]
    for plan, variants in found["variants"].items():
        lines += [row(f"{plan} {name}", seeds) for name, seeds in variants.items()]
        best = found["best_peer"][plan]
        lines += [row(f"{plan} modelopt {n}", [r]) for n, r in found["peers"][plan].items() if n != best["name"]]
        lines.append(row(f"{plan} modelopt, the best: {best['name']}", best["seeds"]))
    lines += [f"  {n:30} {f['mean']:8.3f} +- {f['spread']:.3f}" for n, f in found["figures"].items()]
    return "\n".join([*lines, *(training_lines(found["training"]) if "training" in found else ())])


def row(name: str, seeds: Sequence[Figures]) -> str:
    text = f"  {name:78}"
    for column, form in COLUMNS.items():
        values = [seed[column] for seed in seeds if column in seed]
        cell = form.format(statistics.mean(values)) if values else ""
        if len(values) > 1 and column in ("output_mse", "psnr_db"):
            cell += " +-" + form.format(statistics.stdev(values))
        text += f"{cell:>17}" if len(cell) < 17 else f" {cell}"
    return text


def training_lines(training: Figures) -> list[str]:
    lines = [f"  ours starts after {training['ours_start_cpu_s']:.0f} CPU seconds"]
    for kind, curve in training["curves"].items():
        lines.append(
            f"  {kind:16} error {curve[0][2]:.3e} -> {min(e for _, _, e in curve):.3e} in {curve[-1][1]:.0f} CPU s of"
            f" {curve[-1][0]} updates, gradients and optimizer {training['training_bytes'][kind] / 1e6:.1f} MB,"
            f" peak {training['peak_bytes'][kind] / 1e9:.2f} GB"
        )
    for kind in ("qat", "qat on our loss"):
        found = training[kind]
        for ratio, what in (("ratio", "to the least error of both"), ("ratio_to_our_best", "to our least error")):
            bound = ">= " if found[f"{ratio}_is_bound"] else ""
            lines.append(f"  {kind} takes {bound}{found[ratio]:.2f} times the CPU time of ours {what}")
    return [*lines, f"  gradients and optimizer of ours: {training['memory_ratio']:.3f} of all weights'"]
