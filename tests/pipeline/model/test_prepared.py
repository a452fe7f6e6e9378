import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.prepared import ordinary_, plain_weights_, unquantizable
from intaglio.pipeline.model.ref import ModelRef


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


COMPUTED = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "a parametrization of one's own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "the older weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "the older spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "a mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_becomes_a_parameter_with_the_value_it_has(make):
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    make(layer)
    layer.eval()
    expected = layer(x)
    plain_weights_(layer)
    assert type(layer) is nn.Linear
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
    assert not layer._forward_pre_hooks
    assert torch.equal(layer(x), expected)


def as_attribute(layer: nn.Linear) -> None:
    weight = layer.weight.data
    del layer.weight
    layer.weight = weight


def as_buffer(layer: nn.Linear) -> None:
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)


def in_inference_mode(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight * 2)


@pytest.mark.parametrize("hold", [as_attribute, as_buffer, in_inference_mode])
def test_a_weight_that_is_no_ordinary_parameter_becomes_one(hold):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    hold(layer)
    with torch.inference_mode():
        expected = layer(x).tolist()
    ordinary_(layer)
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight"]
    layer.weight.requires_grad_()
    assert layer(x).tolist() == expected


FACTORY = """
import torch
from diffusers import DDIMScheduler
from intaglio.pipeline.model.checkpoint import DenoiserModel

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, sample, timestep):
        return self.body(sample)

def make():
    return DenoiserModel(Net(), DDIMScheduler(), (3, 8, 8))
"""


def test_a_factory_with_weight_norm_is_opened_with_plain_weights(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    opened = Checkpoint.resolve(ModelRef(path="./net.py:make"), tmp_path)
    assert [layer.name for layer in opened.layers()] == ["body"]
    assert opened.parameter_count() == 3 * 3 * 9 + 3
    assert isinstance(opened.open().module.body.weight, nn.Parameter)


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class OwnLine(nn.Conv1d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


def test_layers_that_cannot_be_quantized_are_named_with_the_reason():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 1),
            "line": nn.Conv1d(4, 4, 1),
            "volume": nn.Conv3d(4, 4, 1, padding_mode="circular"),
            "own_line": OwnLine(4, 4, 1),
            "back": nn.ConvTranspose2d(4, 4, 1),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "depthwise": nn.Conv2d(4, 4, 1, groups=4),
            "mirrored": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "own": Scaled(4, 4),
            "empty": nn.LazyLinear(0),
        }
    )
    model["empty"](torch.zeros(1, 4))
    channels = {layer.name: (layer.channels, layer.groups) for layer in layer_table(model)}
    assert channels == {"linear": (4, 1), "conv": (4, 1), "line": (4, 1), "grouped": (4, 2), "depthwise": (4, 4)}
    assert unquantizable(model) == {
        "volume": "a Conv3d with padding_mode circular",
        "own_line": "a OwnLine has a forward of its own",
        "back": "a transposed convolution (ConvTranspose2d)",
        "mirrored": "a Conv2d with padding_mode reflect",
        "own": "a Scaled has a forward of its own",
        "empty": "a Linear without weights",
    }
