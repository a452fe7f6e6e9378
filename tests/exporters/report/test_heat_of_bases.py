"""A layer that is rounded in another basis is shown with the errors of this basis."""

import torch

from intaglio.exporters.report.figures.heat import heat_map
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import W8A8_TOKEN
from intaglio.pipeline.numerics.basis import Balance, LayerBalance
from intaglio.pipeline.numerics.quality import SampleRange

LAYER = Layer(name="to_q", op="linear", shape=(32, 64), bias=False)
SCALED = LayerBalance(Balance(torch.full((64,), 2.0)), torch.zeros(1), torch.ones(1))
LABEL = "w8a8_token in scaled"
TABLE = Sensitivity(
    ((0, 1),),
    (1.0,),
    (LAYER,),
    {"to_q": {"w8a8_token": W8A8_TOKEN, LABEL: W8A8_TOKEN}},
    {"to_q": {"w8a8_token": (1e-2,), LABEL: (1e-4,)}},
    in_basis={"to_q": {LABEL: "scaled"}},
    bases={"scaled": {"to_q": SCALED}},
    samples=SampleRange(0.0, 1.0, 1.0),
)


def test_errors_are_those_of_the_basis_that_the_plan_has():
    plain = QuantPlan((LAYER,), {"to_q": W8A8_TOKEN})
    for plan, label, decibels in ((plain, "w8a8_token", "20"), (plain.balanced({"to_q": SCALED}), LABEL, "40")):
        assert TABLE.label_of(plan, "to_q") == label
        ((_, (row,)),) = heat_map(TABLE, plan).blocks
        assert row.samples.text == decibels
