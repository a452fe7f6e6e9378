"""Choose the basis of layers' inputs in which rounding costs less: scaled channels, rotated blocks.

Shapes: C input channels (the K in features of a linear layer), N out features, T denoising steps, S of them compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.formats.schemes import RoundedWeight
from intaglio.pipeline.model.cost import ModelCost

if TYPE_CHECKING:
    from intaglio.pipeline.numerics.basis import Balance


class BalanceLayers(Pass):
    """Round each layer in the basis of its input in which its output has the least error.

    Without rounding the output is the same in every basis. Channels are scaled first, then rotated; weights are rounded
    once, after both (ViDiT-Q section 4.2: the scale evens out differences between channels that are the same at every
    step, the rotation those that change). Layers that read the same input share a basis. On request a low-rank part of
    each 4-bit weight is computed in float, and only the rest is rounded (SVDQuant, Li et al. 2025).
    """

    name: ClassVar[str] = "balance"
    version: ClassVar[int] = 5
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PLAN, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "scipy")

    exponents: tuple[float, ...] = Field(
        (0.3, 0.5, 0.7),
        description="exponents of the channel scales (SmoothQuant): the share of the input's magnitude that the weight"
        " takes over; all of them are tried",
    )
    block: int = Field(128, ge=1, le=4096, description="channels that are rotated together, at most; 1 rotates none")
    branch: int = Field(
        0,
        ge=0,
        description="rank of the part of each 4-bit weight that stays in float16, its largest singular directions;"
        " 0: none. Weights with fewer input or output channels than four times the rank have no such part",
    )
    gain_db: float = Field(
        0.5, ge=0, description="gain in SQNR, in dB, above which a layer's input is brought into another basis"
    )
    steps: int = Field(4, ge=1, description="timesteps at which bases are compared")
    rows: int = Field(4, ge=1, description="rows of a recorded call that are used")
    tokens: int = Field(512, ge=1, description="tokens of a linear layer's input that are used, at each timestep")

    def forward_rows(self, model: ModelCost) -> int:
        """Return the rows of the compared timesteps, and of every timestep for the ranges in the new basis."""
        return (1 + self.steps) * self.rows + model.steps * self.rows

    def run(self, state: State, ctx: Context) -> Outputs:
        """Choose a balance for each layer whose rounding error it lowers by more than `gain_db`."""
        from intaglio.passes.basis_search import Amounts, branch_of, candidates, groups_of, nearest, with_ranges
        from intaglio.pipeline.model.calls import denoise_with
        from intaglio.pipeline.model.layer_types import LayerModule

        model, plan, trajectory = state[MODEL].open(), state[PLAN], state[TRAJECTORY]
        schemes = {n: s for n, s in trajectory.called(plan.schemes).items() if isinstance(s.weight, RoundedWeight)}
        layers = {n: m for n, m in model.module.named_modules() if n in schemes and isinstance(m, LayerModule)}
        denoise = denoise_with(model.module, model)
        rows = trajectory.some_rows(self.rows)
        count = len(trajectory.timesteps)
        groups = groups_of(layers, denoise, trajectory, Amounts(self.steps, self.rows, self.tokens), ctx)
        chosen: dict[str, tuple[Balance, float]] = {}
        with ctx.progress("balance", len(groups)) as advance:
            for group in groups:
                parts = {name: (layers[name], schemes[name]) for name in group.names}
                compared = list(candidates(parts, group.x, self.exponents, self.block, ctx))
                best = nearest(parts, group.x, compared, self.branch)
                if best is not None and best[1] > self.gain_db:
                    chosen |= dict.fromkeys(group.names, best)
                advance()
        calls = (trajectory.call(step, rows) for step in range(count))
        (balances,) = with_ranges([chosen], layers, denoise, calls)
        bases = {name: balance.balance for name, balance in balances.items()}
        made = {n: branch_of(layers[n], scheme, bases.get(n), self.branch) for n, scheme in schemes.items()}
        branches = {name: branch for name, branch in made.items() if branch is not None}
        gains = [gain for _, gain in chosen.values()]
        ctx.log.info(
            "%d of %d layers are balanced, %.1f dB gained on average",
            len(gains),
            len(layers),
            sum(gains) / max(1, len(gains)),
        )
        if branches:
            ctx.log.info("%d layers have a branch of rank %d", len(branches), self.branch)
        return {PLAN: plan.balanced(balances, branches)}
