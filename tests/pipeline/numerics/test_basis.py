import pytest
import torch
from torch import nn
from torch.nn import functional

from intaglio.passes.distill.trainable import add_adapter, trained_weight
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.quantized import Quantized, QuantizedLayerData
from intaglio.pipeline.errors import ContractError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, Float, LayerScheme, w4a16
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance, LayerBalance, hadamard
from intaglio.pipeline.simulation.layer import QuantizedLayer

CLOCK = StepClock((1.0,))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(channels: int) -> torch.Tensor:
    return (0.5 * random(channels, seed=5)).exp()


def test_literal_rotation():
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    balance = Balance(torch.tensor([1.0, 2.0, -1.0, 4.0]), 2)
    assert balance.input(torch.tensor([[1.0, 1.0, 1.0, 0.5]]), -1).tolist() == [[3.0, -1.0, 1.0, -3.0]]
    assert balance.weight(torch.tensor([[2.0, 4.0, 6.0, 8.0]])).tolist() == [[2.0, 0.0, -2.0, -4.0]]


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_a_balanced_linear_layer_computes_the_same(block: int):
    x, w = random(3, 5, 192), random(32, 192, seed=1)
    balance = Balance.rotated(scales(192), block, torch.Generator().manual_seed(2))
    y, expected = functional.linear(balance.input(x, -1), balance.weight(w)), functional.linear(x, w)
    assert (y - expected).norm() < 1e-5 * expected.norm()  # float32 sums of values that cancel


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 2}])
def test_a_balanced_convolution_computes_the_same_up_to_its_borders(block: int, options: dict[str, int]):
    x, w = random(2, 24, 6, 5), random(8, 24, 3, 3, seed=1)
    balance = Balance.rotated(scales(24), block, torch.Generator().manual_seed(2))
    y = functional.conv2d(balance.input(x, -3), balance.weight(w), **options)
    expected = functional.conv2d(x, w, **options)
    assert (y - expected).norm() < 1e-5 * expected.norm()  # float32 sums of values that cancel


@pytest.mark.parametrize(("groups", "block"), [(2, 4), (24, 1)])
def test_a_balanced_convolution_in_groups_computes_the_same(groups: int, block: int):
    x, w = random(2, 24, 6, 5), random(48, 24 // groups, 3, 3, seed=1)
    balance = Balance.rotated(scales(24), block, torch.Generator().manual_seed(2))
    y = functional.conv2d(balance.input(x, -3), balance.weight(w), groups=groups)
    expected = functional.conv2d(x, w, groups=groups)
    assert (y - expected).norm() < 1e-5 * expected.norm()  # float32 sums of values that cancel
    by_weight = random(*w.shape, seed=4)
    change = (balance.weight(w) * balance.by_weight(by_weight)).sum()
    torch.testing.assert_close(change, (w * by_weight).sum())  # a linear map, and the transposed inverse of it


def test_a_rotation_alone_keeps_lengths_and_the_same_seed_gives_the_same():
    x = random(7, 64)
    one, same, other = (Balance.rotated(torch.ones(64), 64, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    torch.testing.assert_close(one.input(x, -1).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(one.scale_C, same.scale_C)
    assert not torch.equal(one.scale_C, other.scale_C)


def test_a_rotation_spreads_an_outlier_and_a_scale_takes_it_off():
    x, layer = random(64, 64), nn.Linear(64, 32)
    x[:, 9] *= 50
    flat = torch.ones(64)
    flat[9] = 1 / 7  # the rest of the outlier goes into the weight
    plain, rotated, scaled = (
        QuantizedLayer(layer, W8A8_TOKEN, CLOCK, balance=balance)
        for balance in (None, Balance.rotated(torch.ones(64), 64, torch.Generator().manual_seed(0)), Balance(flat))
    )
    exact = layer(x)
    error = [((one(x) - exact).norm() / exact.norm()).item() for one in (plain, rotated, scaled)]
    assert error[1] < 0.5 * error[0]
    assert error[2] < 0.5 * error[0]


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, W8A8_STEP, w4a16(16)])
def test_a_layer_in_another_basis_is_near_the_float_one_and_trains_there(scheme):
    layer, x = nn.Linear(64, 32).requires_grad_(False), random(6, 64)
    balance = Balance.rotated(scales(64), 16, torch.Generator().manual_seed(1))
    amax = balance.input(x, -1).abs().max().reshape(1)
    made = QuantizedLayer(layer, scheme, CLOCK, LayerTables(amax), balance=balance)
    exact = layer(x)
    with made.clock.at(0):
        assert (made(x) - exact).norm() < 0.2 * exact.norm()
    add_adapter(made, 4, torch.Generator().manual_seed(0))
    with made.clock.at(0):
        (made(x) - exact).square().sum().backward()
    expected, grid, trained = balance.weight(layer.weight), made.weight_rounding, trained_weight(made)
    assert torch.equal(grid.float_weight(layer.weight), expected)
    assert trained.b.grad.abs().max() > 0
    trained.b.data.fill_(0.01)
    torch.testing.assert_close(grid.float_weight(layer.weight), expected + 0.01 * trained.a.sum(0))


def test_a_weight_in_another_basis_is_rounded_once():
    """From the exact weight of that basis: rounded before the rotation too, it would be further than half a scale."""
    layer, form = nn.Linear(64, 32), W8A8_TOKEN
    balance = Balance.rotated(scales(64), 16, torch.Generator().manual_seed(1))
    made = QuantizedLayer(layer, form, CLOCK, balance=balance)
    off = (made.rounded_weight() - balance.weight(layer.weight)).abs() / made.weight_rounding.code_scale()
    assert off.max() <= 0.5 * (1 + 1e-5)  # scale / 2, and float32
    assert off.max() > 0.45


def test_where_the_input_alone_is_rounded_the_weight_is_in_its_basis_too():
    layer, x = nn.Linear(64, 32), random(6, 64)
    balance = Balance.rotated(scales(64), 16, torch.Generator().manual_seed(1))
    form = LayerScheme(weight=Float(), input=W8A8_TOKEN.input)
    made = QuantizedLayer(layer, form, CLOCK, balance=balance)
    exact = layer(x)
    assert 0 < (made(x) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("scheme", [W8A8_TOKEN, W8A8_STEP])
def test_what_a_layer_was_called_with_leaves_nothing_behind(scheme: LayerScheme):
    layer, x = nn.Linear(64, 32), random(6, 64)
    balance = Balance.rotated(scales(64), 16, torch.Generator().manual_seed(1))
    made = QuantizedLayer(layer, scheme, CLOCK, LayerTables(torch.full((1,), 4.0)), balance=balance).requires_grad_(
        False
    )
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with made.clock.at(0):
        before = made(x)
        made(100 * random(6, 64, seed=7))
        assert torch.equal(made(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())


def test_blocks_are_powers_of_two_that_divide_and_scales_can_be_divided_by():
    with pytest.raises(ValueError, match="blocks of 3 channels: only a power of two that divides 6"):
        Balance(torch.ones(6), 3)
    with pytest.raises(ValueError, match="blocks of 4 channels: only a power of two that divides 6"):
        Balance(torch.ones(6), 4)
    for bad in (0.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="a channel's scale is zero or not finite"):
            Balance(torch.tensor([1.0, bad]))


def layer_balance(channels: int) -> LayerBalance:
    generator = torch.Generator().manual_seed(0)
    return LayerBalance(Balance.rotated(scales(channels), 16, generator), -torch.ones(3), torch.ones(3), gain_db=1.7)


def same(one: Balance | None, other: Balance | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.scale_C, other.scale_C) and one.block == other.block


def test_a_plan_keeps_its_balances(tmp_path):
    layers = (
        Layer(name="a", op="linear", shape=(8, 32), bias=True),
        Layer(name="b", op="conv", shape=(8, 16, 3, 3), bias=True),
        Layer(name="sibling", op="linear", shape=(8, 32), bias=True),
    )
    shared = layer_balance(32)
    plan = QuantPlan(layers, {"a": W8A8_TOKEN, "b": W8A8_STEP, "sibling": W8A8_TOKEN})
    plan = plan.balanced({"a": shared, "sibling": shared}).balanced({"b": layer_balance(16)})
    plan.save(tmp_path)
    loaded = QuantPlan.load(tmp_path)
    assert loaded.schemes == plan.schemes
    assert sorted(loaded.balances) == ["a", "b", "sibling"]
    for name, layer in plan.balances.items():
        assert same(loaded.balances[name].balance, layer.balance)
        assert torch.equal(loaded.balances[name].low_T, layer.low_T)
        assert torch.equal(loaded.balances[name].high_T, layer.high_T)
        assert loaded.balances[name].gain_db == 1.7
    assert '"rotated": 16' in (tmp_path / "plan.json").read_text()
    assert sorted(plan.replace({"a": FLOAT}).balances) == ["b", "sibling"]
    with pytest.raises(ContractError, match=r"a scale for each input channel: \['b'\]"):
        plan.balanced({"b": layer_balance(32)})
    with pytest.raises(ContractError, match=r"a balance is for a quantized layer.*\['a'\]"):
        plan.replace({"a": FLOAT}).balanced({"a": layer_balance(32)})


def test_a_plan_without_balances_is_one_file(tmp_path):
    QuantPlan((Layer(name="a", op="linear", shape=(8, 32), bias=True),), {"a": FLOAT}).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_integers_keep_their_basis(tmp_path):
    """Siblings may share one, and others have none."""
    shared = layer_balance(32).balance
    layers = {
        name: QuantizedLayerData(W8A8_TOKEN, torch.ones(8, 32, dtype=torch.int8), torch.ones(8, 1), balance=balance)
        for name, balance in {"a": shared, "b": shared, "c": None}.items()
    }
    quantized = Quantized((1.0,), layers)
    quantized.save(tmp_path)
    loaded = Quantized.load(tmp_path)
    for name in layers:
        assert same(loaded.layers[name].balance, quantized.layers[name].balance)
