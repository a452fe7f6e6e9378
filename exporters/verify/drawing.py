"""Draw the same samples in full precision, in simulation and deployed, until their PSNRs can be told apart.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.simulation.references import PART, draw_starts, full_precision_samples

if TYPE_CHECKING:
    from intaglio.exporters.verify.parity import Comparison
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.denoiser import DenoiserModel
    from intaglio.pipeline.model.types import Denoise, Inputs

ROUND = 8
"""Number of samples that are drawn before each check for enough samples: fewer give a poor estimate of the spread."""


def draw_until(
    enough: Callable[[Mapping[str, torch.Tensor]], bool],
    model: DenoiserModel,
    checkpoint: Checkpoint,
    most: int,
    compare: Callable[[], Comparison],
    ctx: Context,
) -> tuple[Comparison, dict[str, torch.Tensor]]:
    """Draw ROUND samples at a time, at most `most` in all, until `enough` returns True for the samples so far.

    `model`, opened from the checkpoint, is in full precision. `compare` turns it into its simulation, opens the
    deployed graph, and returns both. Returns this comparison, and samples (B, ...) of `full_precision`, `simulated` and
    `deployed`. No other step draws samples from these starts to make a choice. Full precision draws them only once for
    all targets and plans.
    """
    sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    parts = draw_starts(sampler, most, ctx, "verify")
    both: Comparison | None = None
    drawn: dict[str, list[torch.Tensor]] = {"full_precision": [], "simulated": [], "deployed": []}
    samples: dict[str, torch.Tensor] = {}
    with ctx.progress("samples", len(parts)) as advance:
        for position in range(0, len(parts), ROUND // PART):
            these = parts[position : position + ROUND // PART]
            # the simulation has taken the model's place: if the store lacks further references, it is opened once more
            whole = denoise_with(model.module, model) if both is None else _opened(checkpoint)
            drawn["full_precision"] += [full_precision_samples(sampler, whole, part, ctx) for part in these]
            both = both or compare()
            for part in these:
                drawn["simulated"].append(sampler.sample(both.simulated, part))
                drawn["deployed"].append(sampler.sample(both.deployed, part))
                advance()
            samples = {name: torch.cat(each) for name, each in drawn.items()}
            if enough(samples):
                break
    assert both is not None  # there is at least one part
    return both, samples


def _opened(checkpoint: Checkpoint) -> Denoise:
    """Return the denoiser in full precision, which opens the model at its first call."""

    @cache
    def opened() -> Denoise:
        model = checkpoint.open()
        return denoise_with(model.module, model)

    def denoise(inputs: Inputs) -> torch.Tensor:
        return opened()(inputs)

    return denoise
