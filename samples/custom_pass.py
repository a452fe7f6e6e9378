"""A pass of your own: `./custom_pass.py:KeepFirst` as a step after `assign`, or on the command line by --insert."""

from intaglio import Context, Outputs, Pass, State
from intaglio.pipeline.artifacts.keys import PLAN
from intaglio.pipeline.formats.schemes import FLOAT


class KeepFirst(Pass):
    """The first and the last layer of the plan stay in float."""

    name = "keep-first"
    requires = frozenset({PLAN})
    provides = frozenset({PLAN})

    def run(self, state: State, ctx: Context) -> Outputs:
        plan = state[PLAN]
        return {PLAN: plan.replace({layer.name: FLOAT for layer in (plan.layers[0], plan.layers[-1])})}
