import math

import pytest
import torch
from _efficientdm_training import time_ratios
from _image_distance import feature_distance, kid, psnr_db
from efficientdm import recovered
from eight_bit_inputs import shares

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import w4a4_token, w4a8_token


def test_recovered_is_one_at_the_error_of_eight_bits_and_none_without_a_gain() -> None:
    assert recovered(rounded=0.3, ours=0.1, eight=0.1) == pytest.approx(1)
    assert recovered(rounded=0.3, ours=0.3, eight=0.1) == 0
    assert recovered(rounded=0.3, ours=0.15, eight=0.1) == pytest.approx(0.75)


def test_kid_is_the_unbiased_squared_discrepancy_of_a_cubic_kernel() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    # kernel (a b / 2 + 1)^3: 1 between different axes; x with y on the same axis 8
    assert kid(y, x) == pytest.approx(1 + 1 - 2 * (8 + 1 + 1 + 8) / 4)


def test_kid_is_small_between_sets_of_one_distribution_and_large_between_two() -> None:
    draws = torch.randn(3, 256, 8, generator=torch.Generator().manual_seed(0))
    assert abs(kid(draws[0], draws[1])) < 0.05 < kid(draws[0], draws[2] + 1)


def test_distances_are_of_each_image_to_its_own_reference() -> None:
    reference = torch.ones(2, 3, 8, 8)
    reference[:, :, 4:] = -1
    x = reference.clone()
    x[1] += 0.2
    assert psnr_db(x, reference)[1] == pytest.approx(20)  # 10 log10(2^2 / 0.2^2)
    assert feature_distance(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.zeros(2, 2)).tolist() == pytest.approx(
        [5, math.sqrt(2)]
    )


OURS = [(0, 0.0, 0.5), (20, 10.0, 0.2), (40, 20.0, 0.1)]


def test_time_is_compared_at_the_least_error_that_both_reach() -> None:
    worse = time_ratios(OURS, 30.0, [(0, 0.0, 0.5), (20, 100.0, 0.3), (40, 200.0, 0.2)], 0.0)
    assert (worse["ratio"], worse["ratio_is_bound"]) == (200 / 40, False)
    assert (worse["ratio_to_our_best"], worse["ratio_to_our_best_is_bound"]) == (200 / 50, True)
    better = time_ratios(OURS, 30.0, [(0, 0.0, 0.5), (20, 10.0, 0.1), (40, 20.0, 0.05)], 0.0)
    assert (better["ratio"], better["ratio_is_bound"]) == (10 / 50, False)
    assert (better["ratio_to_our_best"], better["ratio_to_our_best_is_bound"]) == (10 / 50, False)


def test_a_training_that_never_gets_to_where_ours_begins_gives_a_bound() -> None:
    never = time_ratios(OURS, 30.0, [(0, 0.0, 0.9), (20, 100.0, 0.7)], 0.0)
    assert (never["ratio"], never["ratio_is_bound"]) == (100 / 30, True)
    prepared = time_ratios(OURS, 30.0, [(0, 0.0, 0.9), (20, 100.0, 0.7)], 50.0)
    assert prepared["ratio"] == 150 / 30


def test_eight_bit_inputs_take_no_bytes_and_their_rows_count_twice() -> None:
    layers = [Layer(name=name, op="linear", shape=(64, 64), bias=True) for name in "ab"]
    four = QuantPlan(layers, {"a": w4a4_token(32), "b": w4a4_token(32)})
    mixed = QuantPlan(layers, {"a": w4a4_token(32), "b": w4a8_token(32)})
    # 2688 bytes of 8320: 64 * 64 * 4.25 bits, and scales and bias in float32
    assert shares(four, {"a": 10, "b": 30}) == pytest.approx((2688 / 8320, 16 / 256))
    assert shares(mixed, {"a": 10, "b": 30}) == pytest.approx((2688 / 8320, (10 * 16 + 30 * 32) / (40 * 256)))
