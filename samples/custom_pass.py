"""A custom pass. Use `./custom_pass.py:KeepEnds` as a step after `assign`, or insert it with `--insert`."""

from intaglio import FLOAT, PLAN, Context, Outputs, Pass, State


class KeepEnds(Pass):
    """Keep the first and the last layer of the plan in float."""

    name = "keep-ends"
    requires = frozenset({PLAN})
    provides = frozenset({PLAN})

    def run(self, state: State, ctx: Context) -> Outputs:
        plan = state[PLAN]
        return {PLAN: plan.replace({layer.name: FLOAT for layer in (plan.layers[0], plan.layers[-1])})}
