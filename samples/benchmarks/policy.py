"""Drive the gripper of samples/models/policy with compiled policies, beside full precision from the same noise.

    intaglio run samples/policy.yaml
    python samples/benchmarks/policy.py build/policy/onnxruntime-cpu

The situations are new: no step of a recipe saw them. A trajectory succeeds if it ends near the goal and touches no
obstacle. It took the other way if it passes the obstacle on the other side than in full precision.

Shapes: B situations, L waypoints.
"""

import json
import runpy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import intaglio
from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.numerics.quality import cosine_similarity, largest_error

TRAINING = runpy.run_path(str(Path(__file__).parents[1] / "train_policy.py"))
TASK = TRAINING["TASK"]
COLUMNS = {
    "cosine": "cosine, mean",
    "cosine_1_percent": "cosine, lowest 1 %",
    "cosine_min": "cosine, worst",
    "error_max": "largest error",
    "other_way": "other way",
    "success": "success",
}


def side(trajectories: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return True for trajectories (B, 2, L) whose waypoint nearest to the obstacle has it on the right, (B,)."""
    goal, left, part, beside, _ = TRAINING["places"](seen)
    obstacle = part[:, None] * goal + beside[:, None] * left
    apart = trajectories - obstacle[:, :, None]
    nearest = apart[torch.arange(len(seen)), :, apart.norm(dim=1).argmin(1)]
    return goal[:, 0] * nearest[:, 1] - goal[:, 1] * nearest[:, 0] > 0


def distances(driven: torch.Tensor, full: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    """Return the figures of trajectories (B, 2, L), compared with those of full precision."""
    cosine_B = cosine_similarity(driven, full)
    return {
        "cosine": float(cosine_B.mean()),
        "cosine_1_percent": float(cosine_B.quantile(0.01)),
        "cosine_min": float(cosine_B.min()),
        "error_max": float(largest_error(driven, full).max()),
        "other_way": float((side(driven, seen) != side(full, seen)).sum()),
        "success": float(TRAINING["succeeded"](driven, seen).float().mean()),
    }


def main(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="compiled folders, each of one target")],
    situations: Annotated[int, typer.Option(help="trajectories, each in a situation of its own")] = 1000,
    seed: int = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Print how far the trajectories of compiled policies are from full precision, and how many succeed."""
    model = TASK["make"]()
    rng = torch.Generator().manual_seed(seed)
    seen = TASK["situations"](situations, rng)
    start = Start(torch.randn(situations, *model.sample_shape, generator=rng), {"observation": seen}, {})
    sampler = Sampler(model, TASK["STEPS"], 1.0)
    full = sampler.sample(denoise_with(model.module, model), start)
    found = {"full precision": distances(full, full, seen)}
    for folder in folders:
        driven = sampler.sample(denoise_with(intaglio.load(folder), model), start)
        found[str(folder)] = distances(driven, full, seen)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("", *COLUMNS.values(), title=f"{situations} situations")
    for name, row in found.items():
        table.add_row(name, *(f"{row[n]:.6f}" if "cosine" in n else f"{row[n]:.4g}" for n in COLUMNS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
