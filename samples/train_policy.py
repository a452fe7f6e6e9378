"""Train a robot's policy, samples/models/policy, and draw what it does.

    python samples/train_policy.py

The robot is a gripper that moves in a plane to a goal, around a round obstacle. The expert's trajectories have a closed
form, so every batch is new. Where the obstacle is in the middle of the way, the expert passes on either side by chance:
a policy that predicts the mean of its actions would run into the obstacle.

Shapes: B batch, L waypoints.
"""

import math
import runpy
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.sampler import Sampler

MODEL = Path(__file__).parent / "models" / "policy"
TASK = runpy.run_path(str(MODEL / "policy.py"))
"""Names that the file of the model factory defines."""
STEPS = TASK["STEPS"]
MARGIN, MIDDLE = 0.04, 0.06
"""Distance that the expert keeps from the obstacle, and offset of the obstacle up to which it passes on either side."""
NEAR = 0.05
"""Largest distance of the last waypoint from the goal with which a trajectory has reached it."""
PANEL, SMOOTH, FRAME = 160, 4, 1.25
"""Pixels of a situation's side, factor by which it is drawn larger, and the length that the side shows."""

CARD = """---
license: apache-2.0
library_name: diffusers
---
# policy

A transformer (`policy.py`) of {parameters:.2f} M parameters that draws the next 16 target positions of a gripper. It
moves in a plane to a goal ahead, around a round obstacle; it sees the goal and the obstacle.

- **Data**: trajectories of an expert in closed form (`samples/train_policy.py`), new ones in each step of the training.
  With the obstacle in the middle of the way, the expert passes on its left or on its right, by chance.
- **Training**: flow matching (Lipman et al. 2023) with times uniform in [0, 1], AdamW at {rate:g}, {steps} steps of
  {batch} trajectories, seed {seed}, {minutes:.0f} minutes on one busy CPU core; the running average of the
  weights is saved, in fp16.
- **Loss**: {loss:.4f} over the last steps, relative to the variance of the target.
- **Sampling**: {sampling} Euler steps.
- **Success**: {success:.1%} of 1000 trajectories end within 0.05 of the goal and touch no obstacle.

    python samples/train_policy.py --steps {steps} --batch {batch}
"""


def places(seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the places that observations (B, 5) name.

    These are the goal (B, 2), the direction to the left of the way to it (B, 2), and of the obstacle the part of the
    way, the distance to the left of it, and the radius, (B,) each.
    """
    distance, angle, part, beside, radius = (TASK["LOW"] + (TASK["HIGH"] - TASK["LOW"]) * (seen + 1) / 2).unbind(1)
    goal = distance[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return goal, torch.stack([-angle.sin(), angle.cos()], 1), part, beside, radius


def expert(seen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a trajectory (B, 2, L) of the expert for each observation (B, 5).

    The gripper moves along the line to the goal with the least jerk (Flash and Hogan 1985), u = 10 t^3 - 15 t^4 + 6
    t^5, and beside it by A sin(pi u), which keeps it MARGIN from the obstacle.
    """
    goal, left, part, beside, radius = places(seen)
    coin = torch.randint(0, 2, beside.shape, generator=generator) * 2.0 - 1
    side = torch.where(beside.abs() < MIDDLE, coin, -beside.sign())
    amplitude = (1.1 * (radius + MARGIN) + side * beside).clamp(min=0) / (math.pi * part).sin()
    t = torch.arange(1, 17) / 16
    u = t**3 * (10 - 15 * t + 6 * t**2)
    return goal[:, :, None] * u + ((side * amplitude)[:, None] * left)[:, :, None] * (math.pi * u).sin()


def succeeded(trajectories: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return which trajectories (B, 2, L) end near the goal and touch no obstacle between two waypoints, (B,)."""
    goal, left, part, beside, radius = places(seen)
    obstacle = part[:, None] * goal + beside[:, None] * left
    path = torch.cat([torch.zeros_like(trajectories[..., :1]), trajectories], 2)
    between = torch.linspace(0, 1, 9)
    ways = path[..., :-1, None] * (1 - between) + path[..., 1:, None] * between
    clear = (ways - obstacle[:, :, None, None]).norm(dim=1).flatten(1).amin(1) >= radius
    return clear & ((trajectories[..., -1] - goal).norm(dim=1) <= NEAR)


def train(model: DenoiserModel, steps: int, batch: int, rate: float, seed: int) -> float:
    """Train the model in place, and return the mean of the loss over the last steps."""
    from train_hard import fit  # a script beside this one, found when this one runs

    def loss_of(rng: torch.Generator) -> torch.Tensor:
        seen = TASK["situations"](batch, rng)
        x0 = expert(seen, rng)
        noise, t = torch.randn(x0.shape, generator=rng), torch.rand(batch, 1, 1, generator=rng)
        error = model.module((1 - t) * x0 + t * noise, STEPS * t.flatten(), seen) - (noise - x0)
        return error.square().mean() / (noise - x0).square().mean()

    return fit(model.module, loss_of, steps, rate, seed)


def drawn(model: DenoiserModel, seen: torch.Tensor) -> torch.Tensor:
    """Return one trajectory (B, 2, L) for each observation (B, 5)."""
    noise = torch.randn(len(seen), *model.sample_shape, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(model, STEPS, 1.0)
    return sampler.sample(denoise_with(model.module, model), Start(noise, {"observation": seen}, {}))


def save_panels(trajectories: torch.Tensor, seen: torch.Tensor, path: Path, columns: int = 6) -> None:
    """Draw situations, each an observation (B, 5) with its trajectories (B, M, 2, L), side by side."""
    rows = -(-len(seen) // columns)
    page = Image.new("RGB", (columns * PANEL * SMOOTH, rows * PANEL * SMOOTH), "white")
    pen, scale = ImageDraw.Draw(page), PANEL * SMOOTH / FRAME
    goal, left, part, beside, radii = places(seen)
    shown = torch.cat([goal, part[:, None] * goal + beside[:, None] * left, radii[:, None]], 1).tolist()
    for i, (many, (goal_x, goal_y, x, y, radius)) in enumerate(zip(trajectories, shown, strict=True)):
        middle_x, middle_y = (PANEL * SMOOTH * (place + 0.5) for place in (i % columns, i // columns))
        origin = middle_x - scale * goal_x / 2, middle_y + scale * goal_y / 2

        def disc(x: float, y: float, radius: float, colour: str, origin: tuple[float, float] = origin) -> None:
            across, down, size = origin[0] + scale * x, origin[1] - scale * y, scale * radius
            pen.ellipse([across - size, down - size, across + size, down + size], colour)

        disc(x, y, radius, "#c9ccd1")
        disc(goal_x, goal_y, NEAR, "#a6dba0")
        for trajectory in many:
            points = [(0.0, 0.0), *trajectory.T.tolist()]
            pen.line([(origin[0] + scale * a, origin[1] - scale * b) for a, b in points], "#2166ac", 5, "curve")
            for a, b in points[1:]:
                disc(a, b, 0.008, "#2166ac")
        disc(0, 0, 0.02, "#202020")
    page.resize((columns * PANEL, rows * PANEL), Image.Resampling.LANCZOS).quantize(64).save(path, optimize=True)


def main(
    steps: Annotated[int, typer.Option(help="optimizer updates")] = 2400,
    batch: Annotated[int, typer.Option(help="trajectories in an update")] = 48,
    rate: Annotated[float, typer.Option(help="learning rate of AdamW")] = 2e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder for the model's weights, its card and its picture")] = MODEL,
    threads: int = 1,
) -> None:
    """Train the policy, and save it in fp16 with its card and a picture of its trajectories."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    began, model = time.monotonic(), TASK["untrained"]()
    loss = train(model, steps, batch, rate, seed)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.module.half().state_dict(), out / "policy.safetensors")
    model.module.float()
    seen = TASK["situations"](1000, torch.Generator().manual_seed(2))
    text = CARD.format(
        parameters=sum(p.numel() for p in model.module.parameters()) / 1e6,
        rate=rate,
        steps=steps,
        batch=batch,
        seed=seed,
        minutes=(time.monotonic() - began) / 60,
        loss=loss,
        sampling=STEPS,
        success=float(succeeded(drawn(model, seen), seen).float().mean()),
    )
    (out / "README.md").write_text(text)
    several = drawn(model, seen[:6].repeat_interleave(16, 0)).unflatten(0, (6, 16))
    save_panels(several, seen[:6], out.parent.parent / "policy.png")


if __name__ == "__main__":
    typer.run(main)
