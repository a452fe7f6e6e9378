import weakref

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from intaglio.passes.distill.trainable import add_adapter, trained_weight
from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W8A8_STEP,
    W8A8_TOKEN,
    LayerScheme,
    w4a4_token,
    w4a8_token,
    w4a16,
    with_output,
    with_shift,
)
from intaglio.pipeline.model.calls import clocked
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.rounding import group_integers
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import quantize_model, simulate

CLOCK = StepClock((900.0, 500.0, 100.0))


def linear(k: int = 32, n: int = 6) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n).requires_grad_(False)


def test_token_layer_equals_the_integer_oracle():
    layer = QuantizedLayer(linear(), W8A8_TOKEN, CLOCK)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    x[2] = 0
    codes, scale = layer.weight_codes().numpy(), layer.weight_rounding.scale.detach().numpy()[:, 0]
    x_codes, y, *_ = oracle.layer(x.numpy(), codes, scale, layer.layer.bias.numpy())
    assert np.array_equal(layer.input_codes(x)[0].numpy(), x_codes)
    assert np.allclose(layer(x).detach().numpy(), y, rtol=1e-5, atol=1e-6)  # float32 sums of 32 products


@pytest.mark.parametrize(("scheme", "high"), [(w4a8_token(16), 127), (w4a4_token(16), 7)])
def test_two_level_layer_equals_the_integer_oracle(scheme: LayerScheme, high: int):
    layer = QuantizedLayer(linear(64), scheme, CLOCK)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    scale, group = layer.weight_rounding.scale.detach().numpy()[:, 0], layer.weight_rounding.group.detach().numpy()
    four, eight = oracle.two_level_codes(layer.layer.weight.numpy(), scale, group, 16)
    x_codes, y, *_ = oracle.layer(x.numpy(), eight, scale, layer.layer.bias.numpy(), high=high)
    assert np.array_equal(layer.weight_codes().numpy(), four)
    assert np.array_equal(layer.input_codes(x)[0].numpy(), x_codes)
    assert np.allclose(layer(x).detach().numpy(), y, rtol=1e-5, atol=1e-6)  # float32 sums of 64 products


def test_step_layer_uses_the_range_of_the_timestep_it_is_called_with():
    amax = torch.tensor([1.0, 2.0, 4.0])
    layer = QuantizedLayer(linear(), W8A8_STEP, CLOCK, LayerTables(amax))
    x = torch.full((1, 32), 1.0)
    codes = clocked(lambda inputs: layer.input_codes(x).codes, CLOCK, "t")
    for timestep, code in ((900.0, 127), (480.0, 64), (0.0, 32)):  # 127 / 2 = 63.5 and 127 / 4 = 31.75
        assert codes({"t": torch.tensor([timestep])}).unique().tolist() == [code]


def test_a_step_holds_inside_its_with_and_not_behind_an_exception():
    clock = StepClock((900.0, 500.0, 100.0))
    with clock.at(1):
        assert clock.step == 1
        with clock.at(2):
            assert clock.step == 2
        assert clock.step == 1
    with pytest.raises(KeyError), clock.at(0):
        raise KeyError
    with pytest.raises(RuntimeError, match="no denoising step is set"):
        _ = clock.step
    with pytest.raises(IndexError, match="step 3 of 3"), clock.at(3):
        pass


def test_a_layer_with_a_scale_a_step_cannot_be_called_without_one():
    x = torch.ones(1, 32)
    with pytest.raises(RuntimeError, match=r"call the quantized model inside `with clock.at\(step\):`"):
        QuantizedLayer(linear(), W8A8_STEP, CLOCK, LayerTables(torch.ones(3)))(x)
    assert QuantizedLayer(linear(), W8A8_TOKEN, CLOCK)(x).isfinite().all()  # a scale a token needs no step


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(4, 6, 1, bias=False)]
)
def test_convolution_at_8_bit_is_near_the_float_one(conv: nn.Conv2d):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conv.requires_grad_(False)
    layer = QuantizedLayer(conv, W8A8_STEP, CLOCK, LayerTables(x.abs().max().expand(3)))
    with CLOCK.at(0):
        assert (layer(x) - conv(x)).norm() / conv(x).norm() < 0.02


def test_weight_only_layer_leaves_its_input_alone():
    base = linear(64)
    layer = QuantizedLayer(base, w4a16(16), CLOCK)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.rounded_weight().detach().T + base.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_adapter_starts_as_nothing_and_is_rounded_with_the_weight():
    layer = QuantizedLayer(linear(), W8A8_TOKEN, CLOCK)
    before = layer.weight_codes()
    add_adapter(layer, 4, torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight_codes(), before)
    trained = trained_weight(layer)
    trained.b.data.fill_(0.05)
    expected = layer.layer.weight + 0.05 * trained.a.sum(0)
    moved, scale = layer.weight_codes(), layer.weight_rounding.scale
    assert not torch.equal(moved, before)
    assert torch.equal(moved, torch.round((expected / scale).clamp(-127, 127)).to(torch.int8))


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, w4a8_token(16)])
def test_a_simulation_needs_no_float_weight(scheme: LayerScheme):
    layer = QuantizedLayer(linear(), scheme, CLOCK)
    grid = layer.weight_rounding
    group = None if grid.group is None else group_integers(grid.group)
    data = QuantizedLayerData(scheme, layer.weight_codes(), grid.scale.detach(), group)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(linear())
    model[0].weight.data.fill_(torch.nan)
    float_weight = weakref.ref(model[0].weight)
    simulate(model, Quantized(CLOCK.timesteps, {"0": data}))
    assert torch.equal(model(x), layer(x))
    assert float_weight() is None  # its memory is free


def test_the_weight_is_rounded_again_when_the_cache_is_cleared():
    layer = QuantizedLayer(linear(), W8A8_TOKEN, CLOCK)
    with torch.no_grad():
        before = layer.rounded_weight()
        layer.layer.weight.mul_(0.5)
        assert layer.rounded_weight() is before
        layer.cache.clear()
        assert not torch.equal(layer.rounded_weight(), before)


def test_quantize_model_replaces_what_the_schemes_say():
    model = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4))
    replaced = quantize_model(model, {"0": FLOAT, "2": W8A8_TOKEN}, CLOCK)
    assert list(replaced) == ["2"]
    assert isinstance(model[0], nn.Linear)
    assert model[2] is replaced["2"]


def test_other_modules_cannot_be_quantized():
    with pytest.raises(ValueError, match="0 is a SiLU: only Linear, Conv1d, Conv2d and Conv3d"):
        quantize_model(nn.Sequential(nn.SiLU()), {"0": W8A8_TOKEN}, CLOCK)


def test_step_scheme_needs_ranges():
    with pytest.raises(ValueError, match="needs the calibrated input ranges"):
        QuantizedLayer(linear(), W8A8_STEP, CLOCK)


def test_rounded_output_needs_ranges_and_a_convolution():
    with pytest.raises(ValueError, match="only a convolution can have a rounded output"):
        QuantizedLayer(linear(), with_output(W8A8_STEP), CLOCK, LayerTables(torch.ones(3), None, torch.ones(3)))
    with pytest.raises(ValueError, match="a rounded output needs the calibrated output ranges"):
        QuantizedLayer(nn.Conv2d(4, 4, 3), with_output(W8A8_STEP), CLOCK, LayerTables(torch.ones(3)))
    with pytest.raises(ValueError, match="only a layer whose input has one scale for each step"):
        _ = with_output(W8A8_TOKEN).name


def test_gradients_pass_through_a_rounded_output():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    tables = LayerTables(torch.full((3,), 4.0), None, torch.full((3,), 9.0))
    layer = QuantizedLayer(conv, with_output(W8A8_STEP), CLOCK, tables)
    plain = QuantizedLayer(conv, W8A8_STEP, CLOCK, tables)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for one in (layer, plain):
        conv.weight.grad = None
        scale = one.weight_rounding.scale.requires_grad_()
        with CLOCK.at(0):
            one(x).square().sum().backward()
        grads.append((conv.weight.grad.clone(), scale.grad.clone()))
    for rounded, exact in zip(*grads, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()  # the outputs differ by their rounding


def test_a_shift_uses_codes_that_a_symmetric_range_leaves_idle():
    """All-positive inputs: the error of 4-bit codes is halved."""
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = None
    errors = []
    for scheme in (w4a4_token(16), with_shift(w4a4_token(16))):
        layer = QuantizedLayer(linear(64), scheme, CLOCK)
        exact = x @ layer.rounded_weight().T + layer.layer.bias
        errors.append((layer(x) - exact).norm().item())
    assert errors[1] < 0.5 * errors[0]


def test_a_shift_of_a_step_layer_is_exact():
    """Codes of x - c, and c times the row sums: a constant input equal to c loses nothing."""
    shift = torch.tensor([3.0, 2.0, 1.0])
    layer = QuantizedLayer(linear(64), with_shift(W8A8_STEP), CLOCK, LayerTables(torch.ones(3), shift))
    x = torch.full((1, 64), 2.0)
    with CLOCK.at(1):
        assert layer.input_codes(x).codes.abs().max() == 0
        torch.testing.assert_close(layer(x), x @ layer.rounded_weight().T + layer.layer.bias)


@pytest.mark.parametrize(
    "window",
    [
        {"padding": 1},
        {"padding": (2, 0), "stride": 2},
        {"padding": 2, "dilation": 2, "bias": False},
        {"padding": "same", "groups": 2},
    ],
)
def test_zeros_around_a_shifted_input_are_exact(window):
    """On codes' own values nothing is lost, neither inside nor at the edges."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **window).requires_grad_(False)
    tables = LayerTables(torch.full((3,), 3.14), torch.full((3,), 2.86))
    layer = QuantizedLayer(conv, with_shift(W8A8_STEP), CLOCK, tables)
    codes = torch.randint(-11, 244, (2, 4, 6, 5), generator=torch.Generator().manual_seed(1))  # 116 scales are 2.87
    x = codes * (3.14 / 127)
    exact = conv._conv_forward(x, layer.rounded_weight(), conv.bias)
    with CLOCK.at(1):
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)  # float32 sums of 36 products


def test_the_zeros_of_a_padded_convolution_have_a_code_at_every_step():
    tables = LayerTables(torch.tensor([3.14, 1.0, 2.0]), torch.tensor([2.86, 4.0, 0.0]))
    layer = QuantizedLayer(nn.Conv2d(4, 4, 3, padding=1), with_shift(W8A8_STEP), CLOCK, tables)
    for step, code in enumerate((-116, -127, 0)):  # the range 3 to 5 is widened to 0 to 5
        with CLOCK.at(step):
            codes = layer.input_codes(torch.full((1, 4, 2, 2), 5.0)).codes
        assert codes.shape == (1, 4, 4, 4)
        assert codes[:, :, 0].unique().tolist() == [code]
    assert layer.tables.shift_T.tolist() == pytest.approx([116 * 3.14 / 127, 2.5, 0.0])
    unpadded = QuantizedLayer(nn.Conv2d(4, 4, 3), with_shift(W8A8_STEP), CLOCK, tables)
    assert torch.equal(unpadded.tables.shift_T, tables.shift_T)


def test_a_shift_in_front_of_a_rounded_output_is_a_zero_point():
    """The padded product adds codes of zero, the same at every step, and is rounded with the shift in it."""
    tables = LayerTables(torch.tensor([3.14, 3.0, 2.5]), torch.tensor([2.86, 2.7, 2.3]), torch.full((3,), 9.0))
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    layer = QuantizedLayer(conv, with_shift(with_output(W8A8_STEP)), CLOCK, tables)
    assert (layer.tables.shift_T / layer.tables.amax_T * 127).tolist() == pytest.approx([114, 114, 114], abs=1e-4)
    x = nn.functional.silu(torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1)) * 2)
    for step in range(3):
        with CLOCK.at(step):
            q, _, amax, _ = layer.input_codes(x)
            product = layer(x) - conv.bias.reshape(-1, 1, 1)
            zeros = layer.input_codes(torch.zeros(1, 4, 2, 2)).codes
        assert q.shape == x.shape
        assert zeros.unique().tolist() == [-114]
        exact = nn.functional.conv2d((q + 114) * (amax / 127), layer.rounded_weight(), padding=1)
        assert (product - exact).abs().max() <= 9 / 127 / 2 + 1e-5  # half a code of the output
        torch.testing.assert_close(product / (9 / 127), torch.round(product / (9 / 127)), rtol=0, atol=1e-3)


def test_a_shift_needs_its_middle():
    with pytest.raises(ValueError, match="the middle of its range at each step"):
        QuantizedLayer(linear(), with_shift(W8A8_STEP), CLOCK, LayerTables(torch.ones(3)))
    with pytest.raises(ValueError, match="a float input has no shift"):
        with_shift(FLOAT)
