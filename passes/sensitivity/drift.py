"""Draw samples with one layer rounded at every step, where this is predicted to be visible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from intaglio.passes.sensitivity.forms import Form

if TYPE_CHECKING:
    import torch

    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.model.call_rows import Start
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise

OUTPUTS_DB = 20
"""A PSNR that is predicted from output errors can be too high by this many dB.

So the limit below which samples are drawn is raised by it, if no errors were predicted along whole trajectories."""


@dataclass(frozen=True)
class Drawn:
    """Everything needed to draw samples, always from the same noise, whichever layer is rounded."""

    ctx: Context
    sampler: Sampler
    denoise: Denoise
    start: Start
    rounded: RoundedLayers

    def samples(self) -> torch.Tensor:
        """Draw the samples with the layers that are in the model now."""
        return self.sampler.sample(self.denoise, self.start)


def measure_drift(table: Sensitivity, drawn: Drawn, below_db: float) -> dict[str, dict[str, float]]:
    """Measure the squared error of samples with one layer rounded at every step, if it is predicted to be large.

    It is large if the predicted PSNR is below `below_db`.
    """
    from scipy.stats import spearmanr

    from intaglio.passes.sensitivity.study import Progress

    below_db += 0 if table.drift_screened else OUTPUTS_DB
    visible = table.samples.peak**2 / 10 ** (below_db / 10)  # the squared error with this PSNR
    pairs = [
        (layer.name, scheme)
        for layer in table.layers
        for scheme in table.error[layer.name]
        if table.predicted(layer.name, scheme) > visible
    ]
    ctx = drawn.ctx
    progress, processes = Progress(ctx, "drift", lambda value: type(value) is float), ctx.processes
    own = pairs[processes.index :: processes.count]
    reference = drawn.samples() if own else drawn.start.noise

    def measure(name: str, scheme: str) -> float:
        form = Form(table.schemes[name][scheme], table.basis_of(name, scheme))
        with drawn.rounded.alone(name, form):
            return float((drawn.samples() - reference).square().mean())

    with ctx.progress("drift of samples", len(pairs)) as advance:
        for name, scheme in own:
            progress.get(f"{name}:{scheme}", partial(measure, name, scheme))
            advance(processes.count)
    done, drift = progress.gathered(), dict[str, dict[str, float]]()
    for name, scheme in pairs:
        drift.setdefault(name, {})[scheme] = done[f"{name}:{scheme}"]
    if len(pairs) > 2:
        measured = [drift[name][scheme] for name, scheme in pairs]
        ways = (table.predicted, table.predicted_by_outputs)
        ranks = (spearmanr([predict(*pair) for pair in pairs], measured).statistic for predict in ways)
        ctx.log.info(
            "drew samples for %d layers and schemes; rank correlation with predictions %.2f, by outputs alone %.2f",
            len(pairs),
            *ranks,
        )
    return drift
