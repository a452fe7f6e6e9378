"""Convolutions that pad with more than zeros are a padding and a convolution that can be quantized."""

import copy

import pytest
import torch
from torch import nn

from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.padding import split_padding_
from intaglio.pipeline.model.prepared import unquantizable

SPLIT = {
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "reflect, along one axis": lambda: nn.Conv1d(2, 4, 5, padding=2, stride=2, padding_mode="reflect", bias=False),
    "replicate, along three axes": lambda: nn.Conv3d(2, 4, 3, padding=(1, 0, 2), padding_mode="replicate"),
    "same around an even kernel": lambda: nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2)),
    "circular, in groups": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular"),
    "circular without padding": lambda: nn.Conv2d(2, 4, 1, padding_mode="circular"),
}
WHOLE = {
    "zeros": lambda: nn.Conv2d(2, 4, 3, padding=1),
    "same around an odd kernel": lambda: nn.Conv2d(2, 4, 3, padding="same"),
}


@pytest.mark.parametrize("make", SPLIT.values(), ids=SPLIT)
def test_it_computes_the_same_and_is_a_layer(make):
    torch.manual_seed(0)
    theirs = make().eval()
    ours = nn.ModuleDict({"a": copy.deepcopy(theirs)})
    assert split_padding_(ours) == ("a",)
    assert split_padding_(ours) == ()
    x = torch.randn(3, 2, *([8] * (theirs.weight.dim() - 2)))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(ours)["a"](x), theirs(x))
    assert torch.equal(ours["a"].weight, theirs.weight)
    assert [layer.name for layer in layer_table(ours)] == ["a.conv"]
    assert layer_table(ours)[0].padded is False
    assert unquantizable(ours) == {}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_other_convolutions_stay_as_they_are(make):
    layer = make()
    assert split_padding_(layer) == ()
    assert type(layer) is nn.Conv2d
