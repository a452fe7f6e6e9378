"""A model may change a tensor after a layer has read it."""

import torch
from torch import nn

from intaglio.passes.layer_inputs import SameInputs, layer_inputs, siblings


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.first(x) + self.second(x)
        x += y
        return self.third(x)


def test_inputs_are_those_that_the_layers_read():
    torch.manual_seed(0)
    module, x = InPlace(), torch.randn(2, 4)
    given = x.clone()
    seen = layer_inputs(dict(module.named_children()), lambda inputs: module(inputs["x"]), {"x": x})
    assert torch.equal(seen["first"][0], given)
    assert seen["second"][0] is seen["first"][0]
    assert torch.equal(seen["third"][0], x)
    assert not torch.equal(x, given)
    assert siblings(seen) == [("first", "second"), ("third",)]


def test_layers_that_read_one_tensor_before_and_after_a_change_are_no_siblings():
    same, x = SameInputs(), torch.zeros(2)
    for name in ("first", "second"):
        same.note(name, x)
    x += 1
    same.note("third", x)
    assert same.readers == [("first", "second"), ("third",)]
