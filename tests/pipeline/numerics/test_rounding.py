import numpy as np
import oracle
import pytest
import torch

from intaglio.pipeline.formats.schemes import (
    W8A8_STEP,
    Float,
    IntWeight,
    LayerScheme,
    PerChannel,
    PerGroup,
    TwoLevel,
    w4a8_step,
)
from intaglio.pipeline.numerics import rounding as affine

INT8 = IntWeight(bits=8, granularity=PerChannel())
INT4 = IntWeight(bits=4, granularity=PerGroup(size=16))
TWO_LEVEL = IntWeight(bits=4, granularity=TwoLevel(size=16))


def random_weight(n: int = 5, k: int = 48) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3))


def test_int8_codes_and_scale_of_a_literal_row():
    w = torch.tensor([[1.27, -0.635, 0.005, 0.0]])
    scale = INT8.fit(w)[0]
    assert scale.item() == pytest.approx(0.01, rel=1e-6)
    assert INT8.quantize(w, torch.tensor([[0.01]])).tolist() == [[127, -64, 0, 0]]  # -63.5 and 0.5: half to even


def test_int4_codes_use_each_groups_own_scale():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 16], w[0, 17] = 0.7, -0.8, 70.0, -80.0
    codes = INT4.quantize(w, torch.tensor([[0.1, 10.0]]))
    assert codes[0, [0, 1, 16, 17]].tolist() == [7, -8, 7, -8]
    assert INT4.dequantize(codes, torch.tensor([[0.1, 10.0]]))[0, [0, 17]].tolist() == pytest.approx([0.7, -80.0])


@pytest.mark.parametrize(("form", "group"), [(INT8, 48), (INT4, 16)])
def test_codes_equal_the_oracle(form: IntWeight, group: int):
    w = random_weight()
    scale = form.fit(w)[0]
    expected = oracle.weight_codes(w.numpy(), scale.numpy(), form.low, form.high, group)
    assert np.array_equal(form.quantize(w, scale).numpy(), expected)


@pytest.mark.parametrize("form", [INT8, INT4])
def test_fake_quantize_is_dequantized_codes_and_idempotent(form: IntWeight):
    w = random_weight()
    scale = form.fit(w)[0]
    once = form.fake_quantize(w, scale)
    assert torch.equal(once, form.dequantize(form.quantize(w, scale), scale))
    assert torch.equal(form.fake_quantize(once, scale), once)


def test_error_is_at_most_half_a_scale_inside_the_range():
    w = random_weight()
    scale = INT8.fit(w)[0]
    assert ((INT8.fake_quantize(w, scale) - w).abs() <= scale * 0.5 * (1 + 1e-5)).all()  # 1e-5: float32 rounding


def test_clipping_search_beats_the_largest_magnitude():
    w = random_weight(64, 64)
    largest = affine.groups(w, INT4.grid).abs().amax(-1) / 7
    error = [(INT4.fake_quantize(w, s) - w).square().sum() for s in (INT4.fit(w)[0], largest)]
    assert error[0] < 0.95 * error[1]


def test_zero_channel_stays_zero_and_spoils_no_other():
    w = random_weight(2, 32)
    w[0] = 0
    scale = INT8.fit(w)[0]
    rounded = INT8.fake_quantize(w, scale)
    assert rounded[0].abs().max() == 0
    assert (rounded[1] - w[1]).abs().max() <= scale[1] * 0.5 * (1 + 1e-5)


def test_gradients_are_straight_through_inside_and_cut_outside():
    w = torch.tensor([[0.24, 9.0]], requires_grad=True)
    scale = torch.tensor([[0.1]], requires_grad=True)
    form = IntWeight(bits=4, granularity=PerChannel())
    form.fake_quantize(w, scale).sum().backward()
    assert w.grad is not None
    assert scale.grad is not None
    assert w.grad.tolist() == [[1.0, 0.0]]
    assert scale.grad.item() == pytest.approx((2 - 2.4) + 7)  # LSQ Eq. 3: round(w/s) - w/s, and the upper bound


def test_group_that_does_not_divide_is_an_error_with_numbers():
    with pytest.raises(ValueError, match="in features 40 is not a multiple of the group size 16"):
        affine.groups(torch.zeros(2, 40), INT4.grid)


def test_samples_of_a_batch_have_scales_of_their_own():
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    together = affine.token_amax(torch.cat([x, 20 * x]))
    assert torch.equal(together[:1], affine.token_amax(x))


def test_all_zero_token_stays_zero():
    x = torch.zeros(1, 2, 8)
    x[0, 1] = 3.0
    codes = affine.input_codes(x / affine.token_amax(x))
    assert codes[0, 0].abs().max() == 0
    assert codes[0, 1].tolist() == [127.0] * 8


def test_two_level_codes_of_a_literal_row():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 16], w[0, 17] = 0.875, -1.05, 2.625, -2.8125
    scale, group = torch.tensor([[0.125]]), torch.tensor([[1.0, 3.0]])
    codes = TWO_LEVEL.quantize(w, affine.product_scale(scale, group))
    assert codes[0, [0, 1, 16, 17]].tolist() == [7, -8, 7, -8]  # -2.8125 / 0.375 = -7.5: half to even
    assert affine.eight_bit_codes(codes, group, TWO_LEVEL.grid)[0, [0, 1, 16, 17]].tolist() == [7, -8, 21, -24]
    rounded = TWO_LEVEL.dequantize(codes, affine.product_scale(scale, group))
    assert rounded[0, [0, 1, 16, 17]].tolist() == [0.875, -1.0, 2.625, -3.0]


def test_two_level_codes_equal_the_oracle_and_fit_8_bit():
    w = random_weight(7, 64) * torch.linspace(0.1, 20, 64)
    scale, group = TWO_LEVEL.fit(w)
    assert group is not None
    four, eight = oracle.two_level_codes(w.numpy(), scale.numpy()[:, 0], group.numpy(), 16)
    codes = TWO_LEVEL.quantize(w, affine.product_scale(scale, group))
    assert np.array_equal(codes.numpy(), four)
    assert np.array_equal(affine.eight_bit_codes(codes, group, TWO_LEVEL.grid).numpy(), eight)
    assert np.abs(eight).max() <= 64  # two products with 8-bit inputs fit into 16 bits
    assert eight.max() > 48  # most of these codes are used


def test_no_other_group_integer_is_better():
    w = random_weight(6, 64) * torch.linspace(0.3, 3, 64)
    scale, group = TWO_LEVEL.fit(w)

    def error(integers: torch.Tensor) -> torch.Tensor:
        rounded = TWO_LEVEL.fake_quantize(w, affine.product_scale(scale, integers))
        return affine.groups((rounded - w).square(), TWO_LEVEL.grid).sum(-1)

    every = torch.stack([error(torch.full_like(group, g)) for g in range(1, 9)])
    assert torch.equal(error(group), every.amin(0))


def test_two_levels_cost_little_more_than_a_float_scale_a_group_and_far_less_than_one_a_channel():
    w = random_weight(64, 128)
    scale, group = TWO_LEVEL.fit(w)
    channel = IntWeight(bits=4, granularity=PerChannel())
    errors = [
        (form.fake_quantize(w, s) - w).square().mean()
        for s, form in (
            (affine.product_scale(scale, group), TWO_LEVEL),
            (INT4.fit(w)[0], INT4),
            (channel.fit(w)[0], channel),
        )
    ]
    assert errors[0] < 1.15 * errors[1]
    assert errors[0] < 0.75 * errors[2]


def test_gradients_pass_straight_through_both_levels():
    w = torch.zeros(1, 16)
    w[0, 0], w[0, 1] = 0.72, 9.0
    scale, group = torch.tensor([[0.1]], requires_grad=True), torch.tensor([[3.2]], requires_grad=True)
    w.requires_grad_()
    TWO_LEVEL.fake_quantize(w, affine.product_scale(scale, group)).sum().backward()
    to_code_scale = (2 - 2.4) + 7  # of a code's scale 0.1 * 3, as with one level
    assert w.grad is not None
    assert w.grad[0, :2].tolist() == [1.0, 0.0]
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(to_code_scale * 3)
    assert group.grad is not None
    assert group.grad.item() == pytest.approx(to_code_scale * 0.1)


def test_a_zero_channel_of_two_levels_stays_zero():
    w = random_weight(2, 32)
    w[0] = 0
    scale, group = TWO_LEVEL.fit(w)
    rounded = TWO_LEVEL.fake_quantize(w, affine.product_scale(scale, group))
    assert rounded[0].abs().max() == 0
    assert rounded[1].abs().max() > 0


def test_two_levels_take_their_size_and_belong_to_integer_products():
    assert TWO_LEVEL.bits_per_weight == 4.5
    assert w4a8_step(128).weight.bits_per_weight == 4.0625
    with pytest.raises(ValueError, match="two levels are for 4-bit codes, not 8"):
        IntWeight(bits=8, granularity=TwoLevel(size=16))
    with pytest.raises(ValueError, match="two levels are for products with a quantized input"):
        _ = LayerScheme(weight=TWO_LEVEL, input=Float()).name
    with pytest.raises(ValueError, match="4-bit weights multiply a quantized input in two levels only"):
        _ = LayerScheme(weight=INT4, input=W8A8_STEP.input).name


def test_four_bit_codes_of_a_literal_input():
    x = torch.tensor([-2.0, -1.0, -0.4, 0.0, 0.07, 0.08, 0.4, 1.0, 2.0])
    assert affine.input_codes(x, 4).tolist() == [-8, -7, -3, 0, 0, 1, 3, 7, 7]
    assert affine.input_scale(4) == np.float32(1 / 7)
    assert affine.input_codes(x).tolist()[:2] == [-128, -127]


def test_a_shifted_range_gets_a_code_for_zero_by_moving_at_most_half_a_scale():
    """SiLU: from -0.28 to 6, in scales of 3.14 / 127; a middle of 2.86 is 115.67 scales."""
    amax, shift = affine.with_zero(torch.tensor([3.14]), torch.tensor([2.86]))
    assert amax.item() == pytest.approx(3.14)
    assert shift.item() == pytest.approx(116 * 3.14 / 127)
    codes = affine.input_codes((torch.tensor([0.0, -0.28, 6.0]) - shift) * (1 / amax))
    assert codes.tolist() == [-116, -127, 127]
    assert (codes[0] * affine.input_scale() * amax + shift).item() == pytest.approx(0, abs=1e-6)  # one ulp of 2.86


@pytest.mark.parametrize("bits", [8, 4])
def test_a_range_without_zero_is_widened_up_to_it_and_stays_as_it_is_from_then_on(bits: int):
    amax, shift = torch.tensor([1.0, 1.0, 1e-7, 2.0]), torch.tensor([4.0, -4.0, 3.0, -2.0])
    found = affine.with_zero(amax, shift, bits)
    torch.testing.assert_close(found[0], torch.tensor([2.5, 2.5, 1.5, 2.0]))
    torch.testing.assert_close(found[1], torch.tensor([2.5, -2.5, 1.5, -2.0]))
    generator = torch.Generator().manual_seed(0)
    amax = torch.cat([found[0], torch.rand(10_000, generator=generator) * 3])
    found = affine.with_zero(amax, torch.cat([found[1], torch.randn(10_000, generator=generator)]), bits)
    assert all(map(torch.equal, affine.with_zero(*found, bits), found))
    codes = affine.input_codes((0 - found[1]) * (1 / found[0]), bits)
    zero = codes * affine.input_scale(bits) * found[0] + found[1]
    assert (zero.abs() <= 2e-7 * found[0]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_one_code_stands_for_zero_at_every_step_at_the_least_widening(bits: int):
    """From -0.28 to 6, 5.5 and 4: each range is covered, and none grows by more than a twentieth."""
    high = torch.tensor([6.0, 5.5, 4.0])
    before = affine.half_range(torch.full((3,), -0.28), high)
    amax, shift = affine.with_one_zero(*before, bits)
    codes = affine.shift_codes(amax, shift, bits)
    assert codes.tolist() == ([110] * 3 if bits == 8 else [6] * 3)
    assert (shift - amax < -0.28 + amax / 2 / affine.INPUT_HIGH[bits]).all()
    assert (shift + amax > high - amax / 2 / affine.INPUT_HIGH[bits]).all()
    assert (amax / before[0]).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.05 if bits == 8 else 0.15)
    assert all(map(torch.equal, affine.with_one_zero(amax, shift, bits), (amax, shift)))
    assert affine.input_codes_around(torch.zeros(3) / amax, codes, bits).tolist() == (-codes).tolist()


def test_rows_that_are_fitted_or_rounded_together_do_not_know_of_each_other():
    w = random_weight(affine.ROWS_ELEMENTS // 128 + 3, 128)
    few = w.split(100)
    for form in (INT8, INT4):
        assert torch.equal(form.fit(w)[0], torch.cat([form.fit(rows)[0] for rows in few]))
    for whole, parts in zip(TWO_LEVEL.fit(w), zip(*map(TWO_LEVEL.fit, few), strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    scale = affine.product_scale(*TWO_LEVEL.fit(w))
    whole = affine.codes_float(w, scale, TWO_LEVEL.grid).reshape(w.shape).to(torch.int8)
    torch.testing.assert_close(TWO_LEVEL.quantize(w, scale), whole, rtol=0, atol=0)
