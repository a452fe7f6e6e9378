import torch
from torch import nn
from torch.nn import functional

from intaglio.pipeline.model.dataflow import follow

LAYERS = (
    "used",
    "kept",
    "never",
    "dead",
    "before_dead",
    "by_value",
    "attention.out_proj",
    "decides",
    "written",
    "typed",
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in LAYERS:
            if "." not in name:
                setattr(self, name, nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(8, 8)
        self.table.weight = self.used.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.used(x) + self.table(torch.zeros(x.shape[:2], dtype=torch.int64))
        self.dead(self.before_dead(y))
        z = functional.linear(y, self.by_value.weight)
        buffer = torch.zeros(*z.shape[:2], 16)
        buffer[..., :8] = self.written(z)
        z = self.kept(buffer[..., :8]).to(self.typed.weight.dtype) + self.typed(z)
        z = z + self.attention(z, z, z)[0]
        return z + 1 if self.decides(z).sum() > 0 else z


def test_layers_without_an_effect_and_weights_that_others_read_are_found():
    net = Net().eval()
    uses = follow(net, LAYERS, lambda: net(torch.randn(2, 3, 8)))
    assert uses.needed == {"used", "kept", "decides", "written", "typed"}
    assert uses.read == {"by_value", "attention.out_proj"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
