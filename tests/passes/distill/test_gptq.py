"""Codes of GPTQ, and training that starts from them."""

import pytest
import torch
from harness import run_pass
from quantizing import output_error, with_plan

from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.gptq import gptq, second_moment
from intaglio.passes.merge import MergeAdapters
from intaglio.pipeline.artifacts.keys import ADAPTER, PLAN, QUANTIZED
from intaglio.pipeline.formats.layer import structural_schemes
from intaglio.pipeline.formats.schemes import w4a8_token, w4a16


def test_gptq_codes_lose_less_of_the_output_than_the_nearest_ones():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 16, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(16, 64, generator=generator), requires_grad=False)
    mixing = torch.randn(64, 64, generator=generator)
    x = torch.randn(500, 8, generator=generator) @ mixing[:8] + 0.3 * torch.randn(500, 64, generator=generator)
    form = w4a16(32).weight
    scale = form.fit(layer.weight)[0]
    nearest = form.quantize(layer.weight, scale)
    found = gptq(layer.weight, scale, form.grid, second_moment(layer, x))
    assert found.min() >= form.low
    assert found.max() <= form.high

    def error(codes: torch.Tensor) -> float:
        return float((x @ (form.dequantize(codes, scale) - layer.weight).T).square().sum())

    assert error(found) < 0.5 * error(nearest)
    twice = gptq(layer.weight.repeat(2, 1), scale.repeat(2, 1), form.grid, second_moment(layer, x).repeat(2, 1, 1))
    assert torch.equal(twice, found.repeat(2, 1))


@pytest.mark.parametrize(
    ("kind", "padding", "dilation", "groups"),
    [
        (torch.nn.Conv1d, 1, 1, 1),
        (torch.nn.Conv2d, 1, 2, 1),
        (torch.nn.Conv3d, "valid", 1, 1),
        (torch.nn.Conv2d, 1, 1, 3),
    ],
)
def test_the_second_moment_of_a_convolution_is_that_of_its_patches(kind, padding, dilation, groups):
    generator = torch.Generator().manual_seed(0)
    conv = kind(3, 6, 3, stride=2, padding=padding, dilation=dilation, groups=groups, bias=False)
    x = torch.randn(2, 3, *[8] * len(conv.stride), generator=generator)
    moment = second_moment(conv, x)
    w_PNK = conv.weight.detach().reshape(groups, 6 // groups, -1).double()
    energy = (w_PNK @ moment @ w_PNK.mT).diagonal(dim1=1, dim2=2).sum()
    assert float(energy) == pytest.approx(float(conv(x).detach().square().sum()), rel=1e-5)


@pytest.mark.parametrize("base", ["float", "grid"])
def test_training_can_start_from_gptq_codes(measured, tmp_path, base):
    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a8_token",))[-1])
    name = "transformer_blocks.1.ff.net.2"
    assert planned[PLAN].schemes[name] == w4a8_token(32)
    step = Distill(updates=0, start="gptq", base=base)
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "r")
    started = planned | run_pass(step, planned, tmp_path / "s")
    codes = [run_pass(MergeAdapters(), s, tmp_path / "m")[QUANTIZED].layers[name].codes for s in (rounded, started)]
    assert torch.equal(codes[1], started[ADAPTER].layers[name].codes)
    assert not torch.equal(codes[0], codes[1])
    trained = planned | run_pass(step.model_copy(update={"updates": 20, "samples": 4}), planned, tmp_path / "t")
    errors = [output_error(s | run_pass(MergeAdapters(), s, tmp_path / "m")) for s in (rounded, started, trained)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.9 * errors[0]


def test_on_the_grid_a_small_adapter_moves_no_code(measured, tmp_path):
    """Why rates follow the weight's scale: the rounded weight and less than half a scale round to the same codes."""
    planned = with_plan(measured, lambda layer: structural_schemes(layer, (32,), ("w4a16",))[-1])
    step = Distill(updates=3, samples=2, rank=2, rate=1e-4, scale_rate=0, base="grid")
    trained = planned | run_pass(step, planned, tmp_path / "a")
    merged = run_pass(MergeAdapters(), trained, tmp_path / "m")[QUANTIZED]
    for name, layer in trained[ADAPTER].layers.items():
        if layer.codes is not None:
            assert torch.equal(merged.layers[name].codes, layer.codes)
