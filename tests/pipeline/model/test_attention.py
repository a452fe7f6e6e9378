"""Attentions of torch compute the same with a layer for each projection."""

import copy
from pathlib import Path

import pytest
import torch
from harness import run_pass
from torch import nn

from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.attention import split_attention_
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.prepared import unquantizable
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.stored_tensors import StoredTensor

ROWS, QUERIES, KEYS, WIDTH, HEADS = 2, 5, 4, 12, 3
MADE = {
    "usual": {},
    "rows second": {"batch_first": False},
    "no biases": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 9},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLED = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "mask": {"attn_mask": torch.arange(KEYS) > torch.arange(QUERIES)[:, None]},
    "added mask": {"attn_mask": torch.linspace(-2, 2, KEYS * QUERIES).view(QUERIES, KEYS), "need_weights": False},
    "mask of each head": {"attn_mask": torch.linspace(-2, 2, 6 * KEYS * QUERIES).view(6, QUERIES, KEYS)},
    "padding": {"key_padding_mask": torch.tensor([[False] * KEYS, [False, False, True, True]])},
    "both": {
        "key_padding_mask": torch.tensor([[False] * KEYS, [False, False, True, True]]),
        "attn_mask": torch.tensor([[False, True, False, False]]).expand(QUERIES, KEYS),
        "need_weights": False,
    },
}


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | options).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases too, which torch sets to zero
    return made


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("call", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("options", MADE.values(), ids=MADE)
def test_it_computes_what_torch_does(options, call):
    theirs = attention(**options)
    ours = copy.deepcopy(theirs)
    assert split_attention_(ours) == ("",)
    assert split_attention_(ours) == ()
    ours = copy.deepcopy(ours)
    widths = {"query": WIDTH, "key": options.get("kdim", WIDTH), "value": options.get("vdim", WIDTH)}
    lengths = {"query": QUERIES, "key": KEYS, "value": KEYS}
    given = {name: torch.randn(ROWS, lengths[name], widths[name]) for name in widths}
    if not theirs.batch_first:
        given = {name: x.transpose(0, 1) for name, x in given.items()}
    with torch.no_grad():
        expected, found = theirs(**given, **call), ours(**given, **call)
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


def test_one_sample_needs_no_axis_of_rows():
    theirs = attention()
    x = torch.randn(QUERIES, WIDTH)
    with torch.no_grad():
        expected = theirs(x, x, x)
        split_attention_(theirs)
        torch.testing.assert_close(theirs(x, x, x), expected)


def test_code_that_reads_the_weights_finds_them():
    theirs = attention()
    weight, bias = theirs.in_proj_weight.detach().clone(), theirs.in_proj_bias.detach().clone()
    split_attention_(theirs)
    assert torch.equal(theirs.in_proj_weight, weight)
    assert torch.equal(theirs.in_proj_bias, bias)
    assert torch.equal(theirs.k_proj_weight, weight[WIDTH : 2 * WIDTH])
    assert isinstance(theirs, nn.MultiheadAttention)
    assert [layer.name for layer in layer_table(theirs)] == ["out_proj", "q_proj", "k_proj", "v_proj"]
    assert unquantizable(theirs) == {}


def test_stored_weights_stay_in_their_file():
    theirs = attention()
    x = torch.randn(ROWS, QUERIES, WIDTH)
    with torch.no_grad():
        expected = theirs(x, x, x)[0]
    whole, reads = theirs.in_proj_weight.detach(), []
    stored = StoredTensor(whole.shape, whole.dtype, lambda: reads.append(1) or whole).as_parameter()
    theirs._parameters["in_proj_weight"] = stored
    split_attention_(theirs)
    assert not reads
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, x, x)[0], expected)
    assert len(reads) == 3


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return x @ self.in_proj_weight.T


def test_a_class_of_ones_own_stays_as_it_is_and_is_named():
    own = Own(8, 2)
    assert split_attention_(own) == ()
    assert unquantizable(own)[""] == "a Own computes its projections by itself"


FACTORY = """
import torch
from diffusers import DDIMScheduler
from intaglio import DenoiserModel
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, sample, timestep):
        x = sample + torch.sin(timestep.float() / 100)[:, None, None]
        return self.decoder(x, self.encoder(x))


def make():
    torch.manual_seed(0)
    return DenoiserModel(Net().eval(), sample_shape=(4, 8), scheduler=DDIMScheduler())
"""
LAYERS = {f"encoder.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")}


def test_all_layers_of_torchs_transformers_take_part_in_the_calls(tmp_path: Path):
    (tmp_path / "net.py").write_text(FACTORY)
    model = Checkpoint.resolve(ModelRef(path="./net.py:make", sampling_steps=2), tmp_path)
    artifacts = {MODEL: model, TARGET: load_target("onnxruntime-cpu")}
    trajectory = run_pass(Calibrate(samples=2), artifacts, tmp_path / "scratch")[TRAJECTORY]
    names = {layer.name for layer in model.layers()}
    assert names == trajectory.amax.keys()
    assert names > LAYERS | {"decoder.multihead_attn.k_proj", "decoder.linear2"}
