"""Layers of a user's own classes become layers of torch where these compute the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.own_layers import plain_layers_


class Layer(nn.Module):
    """Weight and bias, and an attribute that code around it may read."""

    def __init__(self, *shape: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(shape[0])) if bias else None
        self.scale = 0.5


class Product(Layer):
    def forward(self, x):
        y = x @ self.weight.to(x.dtype).t()
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))


class Scaled(Layer):
    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Summed(Layer):
    def forward(self, x):
        return torch.einsum("...k,nk->...n", x, self.weight)


class Turned(nn.Module):
    """The weight has the shape (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Convolution(Layer):
    def forward(self, x):
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        return x.add_(self.bias.reshape(1, -1, 1, 1))


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        weight = (weight - mean) * (weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


REPLACED = {
    "product": (lambda: Product(5, 4), (2, 3, 4)),
    "without bias": (lambda: Product(4, 4, bias=False), (2, 4)),
    "scaled": (lambda: Scaled(5, 4), (2, 4)),
    "summed": (lambda: Summed(4, 4), (2, 3, 4)),
    "turned": (lambda: Turned(4, 6), (2, 3, 4)),
    "convolution": (lambda: Convolution(5, 4, 3, 3), (2, 4, 7, 6)),
    "standardized": (lambda: Standardized(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "standardized, in groups": (lambda: Standardized(4, 6, 3, groups=2, dilation=2), (2, 4, 8, 8)),
}


@pytest.mark.parametrize(("make", "shape"), REPLACED.values(), ids=REPLACED)
def test_a_layer_that_computes_what_torch_does_is_replaced(make, shape):
    torch.manual_seed(0)
    theirs, x = make().eval(), torch.randn(*shape)
    ours = nn.ModuleDict({"a": copy.deepcopy(theirs)})
    assert plain_layers_(ours) == ("a",)
    assert plain_layers_(ours) == ()
    with torch.no_grad():
        torch.testing.assert_close(ours["a"](x), theirs(x))
    assert type(ours["a"]) in (nn.Linear, nn.Conv2d)
    assert (ours["a"].bias is None) == (getattr(theirs, "bias", None) is None or isinstance(theirs, Summed))
    assert getattr(ours["a"], "scale", 0.5) == 0.5
    assert [layer.name for layer in layer_table(ours)] == ["a"]


class Activated(Layer):
    def forward(self, x):
        return F.gelu(F.linear(x, self.weight, self.bias))


class Twice(Layer):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight, self.bias)


class Gained(Layer):
    def forward(self, x, gain=1.0):
        return gain * F.linear(x, self.weight, self.bias)


class Looked(Layer):
    def forward(self, ids):
        return F.embedding(ids, self.weight)


class Noisy(Layer):
    def forward(self, x):
        return F.linear(x + torch.randn_like(x), self.weight, self.bias)


class Mirrored(Layer):
    """It pads with values of the tensor."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.weight, self.bias)


def hooked() -> nn.Module:
    layer = Product(4, 4)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


KEPT = {
    "activated": lambda: Activated(4, 4),
    "twice": lambda: Twice(4, 4),
    "gained": lambda: Gained(4, 4),
    "looked": lambda: Looked(4, 4),
    "noisy": lambda: Noisy(4, 4),
    "mirrored": lambda: Mirrored(4, 4, 3, 3),
    "hooked": hooked,
    "torch's": lambda: nn.Bilinear(4, 4, 4),
    "torch's embedding": lambda: nn.Embedding(4, 4),
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_other_modules_stay_as_they_are(make):
    torch.manual_seed(0)
    layer = make().eval()
    kind, before = type(layer), layer.weight
    assert plain_layers_(layer) == ()
    assert type(layer) is kind
    assert layer.weight is before
