"""Mixtures of experts are computed for all tokens, and only where that gives what the module gives."""

import copy

import pytest
import torch
from torch import nn

from intaglio.pipeline.model.experts import dense_experts_


class Gate(nn.Module):
    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.weight, self.chosen = nn.Parameter(torch.randn(3, 6)), chosen

    def forward(self, x):
        weights, indices = (x.reshape(-1, 6) @ self.weight.T).softmax(-1).topk(self.chosen)
        return indices, weights, None


class Mixture(nn.Module):
    """Gives each expert the tokens that chose it."""

    def __init__(self, chosen: int = 2, shared: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        self.gate, self.factor = Gate(chosen), factor
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(3)])
        self.shared_experts = nn.Linear(6, 6) if shared else None

    def forward(self, x):
        indices, weights, _ = self.gate(x)
        tokens = x.reshape(-1, 6)
        y = torch.zeros_like(tokens)
        for number, count in enumerate(indices.flatten().bincount(minlength=3).tolist()):
            row, place = (indices == number).nonzero(as_tuple=True)
            assert len(row) == count
            y[row] += self.factor * self.experts[number](tokens[row]) * weights[row, place, None]
        return y.view(x.shape) + (0 if self.shared_experts is None else self.shared_experts(x))


@pytest.mark.parametrize("shared", [False, True])
def test_a_mixture_becomes_dense_and_can_be_exported(shared):
    torch.manual_seed(0)
    model = nn.Sequential(Mixture(shared=shared), nn.Linear(6, 6), Mixture(shared=shared)).eval()
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        expected = model(x)
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, (x,), strict=False)
    assert dense_experts_(model) == ("0", "2")
    assert type(model[0]).__name__ == "Mixture"
    assert dense_experts_(model) == ()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        exported = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), expected)
    assert isinstance(model[0], Mixture)


def test_a_mixture_of_another_kind_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(Mixture(factor=2.0), nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 6)] * 2)}))
    assert dense_experts_(model) == ()
    assert type(model[0]) is Mixture
